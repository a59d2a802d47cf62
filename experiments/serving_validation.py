"""Holds the simulated serving problem against the live model: `python -m experiments.serving_validation FILE`.

A table is measured; then each episode is played twice: by the engine on the real model, in real time, and by the
simulation that `rap/Serving-v0` is made of, with that table. Both take the largest mask of the ladder that holds what
is in flight and what waits. Episodes are of the seeds that training never draws.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import rap_env
from agents.serving_rivals import GreedyByTable, play
from experiments.progress import phase
from experiments.records import provenance, write_record
from experiments.serving_table import STAND_INS, even_ladder
from rap_env.envs.serving import TRAINING_SEEDS, ServingEnv
from rap_env.errors import InfeasibleBudget
from rap_env.llm.live import LiveModel
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.serving import Controller, Engine, Limits, Options, RecordedMemory, Request, Status
from rap_env.serving import Sequence as Served
from rap_env.serving.episodes import Episode, draw_episode
from rap_env.serving.jobs import Targets
from rap_env.serving.tables import ServingTable
from rap_env.serving.timing import measure_table

_IDLE_SECONDS = 0.005  # between two steps while nothing is asked


class LargestThatFits:
    """Decides on the first of some masks that a budget holds.

    Args:
        masks: From the largest down.
    """

    def __init__(self, model: LiveModel, masks: Sequence[PruningMask]) -> None:
        self._shape, self._masks = model.llm.shape, masks

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask.

        Raises:
            InfeasibleBudget: None fits.
        """
        for mask in self._masks:
            needed_bytes = footprint(self._shape, mask, workload).peak_bytes
            if needed_bytes <= budget_bytes:
                return mask
        raise InfeasibleBudget(budget_bytes, needed_bytes, workload)


def play_live(
    model: LiveModel,
    masks: Sequence[PruningMask],
    table: ServingTable,
    episode: Episode,
    whole_bytes: int,
    targets: Targets,
) -> dict[str, float]:
    """Plays an episode on the real model, in real time.

    Args:
        model: The first mask is applied to it in the end.
        masks: The table's.
        table: Says how many sequences and tokens a step takes.
        episode: What happens.
        whole_bytes: What a budget share of 1 means.
        targets: When a request is in time.

    Returns:
        What happened until the episode's end, under the names of `Counts`, and `kept_share` of the weights, the mean
        over time.
    """
    began = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began

    budgets = [share * whole_bytes for share in episode.memory.shares]
    memory = RecordedMemory(episode.memory.seconds, budgets, clock)
    limits = Limits(margin=0.0, slack=0.0, window_seconds=0.0)
    decider = LargestThatFits(model, masks)
    controller = Controller(model.llm.shape, {"ladder": decider}, memory, clock, table.read_tokens, limits)
    options = Options(table.max_batch, table.read_tokens, patience_seconds=targets.patience_seconds)
    engine, coming, sequences = Engine(model, controller, options, clock), list(episode.arrivals), []
    generated, kept = 0, []
    while (now := clock()) < episode.duration_seconds:
        while coming and coming[0].seconds <= now:
            arrival = coming.pop(0)
            sequences.append(engine.submit(Request((1,) * arrival.prompt_tokens, arrival.generated_tokens)))
        if engine.idle:
            time.sleep(_IDLE_SECONDS)
        step = engine.step()
        generated += step.generated_tokens
        kept.append((clock() - now, step.mask.weight_bytes / masks[0].weight_bytes))
    model.switch(masks[0])
    ended = [one for one in sequences if one.status is Status.FINISHED]
    return {
        "arrived": len(sequences),
        "served": len(ended),
        "in_time": sum(_in_time(one, targets) for one in ended),
        "refused": sum(one.status is Status.REFUSED for one in sequences),
        "generated_tokens": generated,
        "evictions": sum(one.evictions for one in sequences),
        "switches": controller.switches,
        "kept_share": float(np.average([share for _, share in kept], weights=[seconds for seconds, _ in kept])),
    }


def _in_time(one: Served, targets: Targets) -> bool:
    later = (one.ended_seconds - one.first_seconds) / max(1, len(one.generated) - 1)
    first = one.first_seconds - one.arrived_seconds
    return first <= targets.first_token_seconds and later <= targets.token_seconds


def play_simulated(env: ServingEnv, episode: Episode) -> dict[str, float]:
    """The same of the simulation; `kept_share` is the mean over its decisions."""
    played = play(env, GreedyByTable(), {"episode": episode})
    shares = [env.table.levels[level].kept_share for level in played.levels]
    return {**played.counts, "kept_share": float(np.mean(shares))}


def validate(name: str, seeds: Sequence[int], repeats: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures a table, and plays episodes both ways."""
    llm = rap_env.load_llm(name, granularity="group")
    WeightStore(llm)
    model, ladder = LiveModel(llm), even_ladder(llm, **STAND_INS)
    env = ServingEnv(measure_table(model, ladder, repeats=repeats))
    setting = env.setting
    model.warm_up(env.table.read_tokens, ladder.masks, setting.longest_prompt_tokens + setting.longest_generated_tokens)
    episodes = []
    for number, seed in enumerate(seeds):
        progress(number, len(seeds))
        episode = draw_episode(seed, env.setting)
        live = play_live(model, ladder.masks, env.table, episode, env.whole_bytes, env.targets)
        simulated = play_simulated(env, episode)
        episodes.append({"seed": seed, "live": live, "simulated": {key: simulated[key] for key in live}})
    return {"table": asdict(env.table), "setting": asdict(env.setting), "episodes": episodes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, plays, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--model", default="smollm2-135m", help="as load_llm takes it")
    parser.add_argument("--episodes", type=int, default=12, help="of a minute each")
    parser.add_argument("--repeats", type=int, default=3, help="how often each step and switch of the table is timed")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    origin = provenance()  # before the run, which takes minutes
    seeds = range(TRAINING_SEEDS, TRAINING_SEEDS + options.episodes)
    with phase("episodes") as progress:
        results = validate(options.model, seeds, options.repeats, progress)
    config = {"model": options.model, "episodes": options.episodes, "repeats": options.repeats}
    print(write_record(options.record, {"config": config, "provenance": origin, "results": results}))


if __name__ == "__main__":
    main()
