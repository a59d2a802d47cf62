"""Whether learning pays in the simulated serving problem: `python -m experiments.serving_learners FILE`.

The gate, written before any run: an algorithm wins only if the 95% paired bootstrap interval of its held-out reward
minus that of the tuned hysteresis lies above 0, over at least 100 held-out episodes and three seeds of training, where
each resample draws both episodes and seeds. Whatever comes out is reported as it is.

Hysteresis is tuned on episodes that training may draw; the held-out ones have seeds that training never draws, and all
policies play the same ones. The clairvoyant search knows the whole episode, is no policy, and bounds the others only as
far as its beam sees.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.serving_learners import ALGORITHMS, learn
from agents.serving_oracle import Clairvoyant
from agents.serving_rivals import Played, ServingPolicy, play, rivals, tuned_hysteresis
from experiments.progress import phase
from experiments.records import provenance, write_record
from rap_env.envs.serving import TRAINING_SEEDS, ServingEnv
from rap_env.errors import InvalidConfig
from rap_env.serving.tables import ServingTable, embedded_table

RIVAL, ORACLE = "tuned hysteresis", "clairvoyant"
_FEWEST_EPISODES, _FEWEST_SEEDS = 100, 3  # of the gate
_RESAMPLES = 10_000


def compare(
    table: ServingTable,
    steps: Mapping[str, int],
    seeds: Sequence[int],
    n_tuning: int,
    n_held_out: int,
    beam: int = 8,
) -> dict[str, Any]:
    """Tunes, trains, and plays all policies on the same held-out episodes.

    Args:
        table: What serving costs.
        steps: Environment steps to train each algorithm for.
        seeds: Of the trainings.
        n_tuning: Episodes that hysteresis is tuned on.
        n_held_out: Episodes that all are compared on.
        beam: Of the clairvoyant search.

    Returns:
        For each policy its `reward` by seed and held-out episode, the means of its `terms` and `counts`, and its
        `difference` to the tuned hysteresis; beside them `thresholds` of that, `wins` of each algorithm by the gate,
        and `seconds` of each part.

    Raises:
        InvalidConfig: There is nothing to tune, train or play.
        UnknownName: There is no such algorithm.
    """
    if min(n_tuning, n_held_out, len(seeds), len(steps)) < 1:
        raise InvalidConfig("expected at least one episode to tune on, held-out episode, seed, and algorithm")
    env, seconds = ServingEnv(table), {}
    started = time.perf_counter()
    with phase("tuning hysteresis") as progress:
        hysteresis = tuned_hysteresis(env, range(n_tuning), progress=progress)
    seconds["tuning"] = time.perf_counter() - started
    rules = rivals(env, hysteresis)
    players: dict[str, list[ServingPolicy]] = {name: [rule] for name, rule in rules.items()}
    for algorithm, n_steps in steps.items():
        started = time.perf_counter()
        players[algorithm] = []
        for seed in seeds:
            with phase(f"{algorithm}, seed {seed}") as progress:
                report = lambda done, progress=progress, n=n_steps: progress(min(done, n), n)  # noqa: E731
                players[algorithm].append(learn(algorithm, lambda: ServingEnv(table), n_steps, seed, report))
        seconds[algorithm] = time.perf_counter() - started
    players[ORACLE] = [Clairvoyant(beam, others=list(rules.values()))]
    played: dict[str, list[list[Played]]] = {}
    for name, policies in players.items():
        started = time.perf_counter()
        with phase(f"playing {name}") as progress:
            played[name] = [_held_out(env, policy, n_held_out, progress) for policy in policies]
        seconds[f"playing {name}"] = time.perf_counter() - started
    rewards = {name: np.array([[one.reward for one in of_seed] for of_seed in all_]) for name, all_ in played.items()}
    return {
        "policies": {
            name: {
                "reward": rewards[name],
                "terms": _means([one.terms for of_seed in all_ for one in of_seed]),
                "counts": _means([one.counts for of_seed in all_ for one in of_seed]),
                "difference": paired_difference(rewards[name], rewards[RIVAL][0]),
            }
            for name, all_ in played.items()
        },
        "thresholds": asdict(hysteresis.thresholds),
        "wins": {name: _wins(rewards[name], rewards[RIVAL][0]) for name in steps},
        "seconds": seconds,
    }


def paired_difference(rewards: np.ndarray, of_rival: np.ndarray) -> dict[str, float]:
    """Mean of rewards [S, E] of S seeds minus a rival's [E] in the same E episodes, with its 95% bootstrap interval.

    Each resample draws seeds and episodes anew, so that the interval holds for other seeds too, as far as S tell.
    """
    rng, difference = np.random.default_rng(0), rewards - of_rival
    n_seeds, n_episodes = difference.shape
    means = np.empty(_RESAMPLES)
    for place in range(_RESAMPLES):
        of_seeds = difference[rng.integers(n_seeds, size=n_seeds)].mean(axis=0)
        means[place] = of_seeds[rng.integers(n_episodes, size=n_episodes)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def _wins(rewards: np.ndarray, of_rival: np.ndarray) -> bool:
    enough = rewards.shape[0] >= _FEWEST_SEEDS and rewards.shape[1] >= _FEWEST_EPISODES
    return enough and paired_difference(rewards, of_rival)["low"] > 0.0


def _held_out(env: ServingEnv, policy: ServingPolicy, n_episodes: int, progress) -> list[Played]:
    played = []
    for place in range(n_episodes):
        played.append(play(env, policy, {"episode_seed": TRAINING_SEEDS + place}))
        progress(place + 1, n_episodes)
    return played


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def lines(results: Mapping[str, Any]) -> list[str]:
    """What is printed, the best policy first."""
    means = {name: float(np.mean(found["reward"])) for name, found in results["policies"].items()}
    printed = [f"{'policy':<18} {'reward':>7}  minus {RIVAL}: 95% interval"]
    for name in sorted(means, key=means.__getitem__, reverse=True):
        one = results["policies"][name]["difference"]
        verdict = {True: "  wins", False: "  does not win"}.get(results["wins"].get(name), "")
        printed.append(
            f"{name:<18} {means[name]:7.4f}  {one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]{verdict}"
        )
    return printed


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, compares, prints, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--table", type=Path, help="a ServingTable; by default the embedded model's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--tuning-episodes", type=int, default=200)
    parser.add_argument("--held-out-episodes", type=int, default=128)
    defaults = {"ppo": 400_000, "recurrent_ppo": 50_000, "dqn": 80_000}
    for name in ALGORITHMS:
        flag = f"--{name.replace('_', '-')}-steps"
        parser.add_argument(flag, type=int, default=defaults[name], help="of each training; 0 leaves it out")
    options = parser.parse_args(arguments)
    if options.record.exists():
        parser.error(f"{options.record} exists, and records are written once")
    table = ServingTable.load(options.table) if options.table else embedded_table()
    steps = {name: n for name in ALGORITHMS if (n := getattr(options, f"{name}_steps"))}
    origin = provenance()  # before the run, which may be long
    results = compare(table, steps, options.seeds, options.tuning_episodes, options.held_out_episodes)
    print("\n".join(lines(results)))
    env = ServingEnv(table)
    config = {
        "steps": steps,
        "seeds": options.seeds,
        "tuning_episodes": options.tuning_episodes,
        "held_out_episodes": options.held_out_episodes,
        "table": asdict(table),
        "setting": asdict(env.setting),
        "targets": asdict(env.targets),
        "reward_weights": env.reward_weights,
        "decide_seconds": env.decide_seconds,
    }
    write_record(options.record, {"config": config, "provenance": origin, "results": results})


if __name__ == "__main__":
    main()
