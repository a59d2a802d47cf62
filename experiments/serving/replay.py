"""One system serves a trace: `python -m experiments.serving.replay SPEC.json RESULT.json`, as a child of `serve`.

It runs under a memory limit that its parent enforces (`experiments.serving.child`).
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from experiments.recipes.build import build_llm
from experiments.serving.child import announce_ready
from experiments.serving.systems import System, deciders_of
from rap_env.llm.live import LiveModel
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy
from rap_env.serving import Controller, Engine, LimitedProcess, Limits, Options, RecordedMemory, Request, Sequence, Step
from rap_env.serving.coarse import CoarseWidths
from rap_env.serving.controller import Decider

_IDLE_SECONDS = 0.02  # between two steps while nothing is asked
_MASKS = 24  # that are told, those with the most tokens


def main() -> None:
    spec_path, result_path = map(Path, sys.argv[1:])
    with result_path.open("w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=file, flush=True)  # whatever is killed, what ended before is known

        serve(json.loads(spec_path.read_text(encoding="utf-8")), write)


def serve(spec: Mapping[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Loads the model, says that it is ready, and serves all requests as they arrive.

    Args:
        spec: What `experiments.serve` wrote: the composed config, the system, requests and memory.
        write: Takes what became of each sequence as it ends, and of all steps at the end.
    """
    config, system = OmegaConf.create(spec["config"]), System(**spec["system"])
    config.model.weights, config.model.kv_cache = system.weights, system.kv_cache
    llm, _corpus = build_llm(config)
    WeightStore(llm)
    scenario = Scenario(Workload(**spec["static"]["workload"]), spec["static"]["budget_bytes"])
    folders = {name: Path(path) for name, path in spec["policies"].items()}
    deciders = deciders_of(system, llm.shape, folders, scenario, spec["coarse_step"])
    # In a thread of its own, as a service does: the C library gives it memory apart from the holes that loading left
    # behind, which small blocks would fill up here and there with tens of megabytes that no prediction has.
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        thread.submit(_serve_loaded, LiveModel(llm), deciders, scenario, system, spec, write).result()


def _serve_loaded(
    model: LiveModel,
    deciders: Mapping[str, Decider],
    scenario: Scenario,
    system: System,
    spec: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
) -> None:
    llm, options = model.llm, Options(**spec["options"])
    recorded = RecordedMemory(spec["memory"]["seconds"], spec["memory"]["n_bytes"], lambda: time.monotonic() - begun)
    controller = Controller(
        llm.shape, deciders, lambda: memory(), time.monotonic, options.read_tokens, Limits(**spec["limits"])
    )
    levels = CoarseWidths(DensePolicy(llm.shape), llm.shape, spec["coarse_step"]).levels()
    model.warm_up(options.read_tokens, levels, max(len(one["prompt"]) + len(one["answer"]) for one in spec["requests"]))
    if system.decides == "static":
        model.switch(deciders["static"].decide(scenario.workload, scenario.budget_bytes))
    engine = Engine(model, controller, options)
    baseline_bytes = psutil.Process().memory_info().rss - engine.needed_bytes
    activation_bytes = controller.activation_bytes(options.max_batch)
    memory = LimitedProcess(recorded, baseline_bytes, lambda: engine.written_bytes)
    begun = time.monotonic()
    engine.step()  # the first limit may be below what the whole model takes
    begun = time.monotonic()
    announce_ready(baseline_bytes)
    processor = time.process_time()
    write({"baseline_bytes": baseline_bytes, "activation_bytes": activation_bytes})
    told = _Told(begun, PruningMask.all_kept(llm.shape).weight_bytes, write, Counter())
    _run(engine, controller, spec["requests"], begun, told)
    write(
        {
            "seconds": time.monotonic() - begun,
            "processor_seconds": time.process_time() - processor,
            "failures": dict(controller.failures),
            "masks": [[mask.widths, n_tokens] for mask, n_tokens in told.masks.most_common(_MASKS)],
        }
    )


def _run(engine: Engine, controller: Controller, requests: list[dict[str, Any]], begun: float, told: "_Told") -> None:
    coming, before = iter(requests), engine.mask
    upcoming = next(coming, None)
    while upcoming is not None or not engine.idle:
        while upcoming is not None and time.monotonic() - begun >= upcoming["seconds"]:
            answer = tuple(upcoming["answer"])
            engine.submit(Request(tuple(upcoming["prompt"]), len(answer), seed=upcoming["number"], answer=answer), told)
            upcoming = next(coming, None)
        idle = engine.idle
        step = engine.step()
        if not idle or step.switched:
            wanted = {"decisions": controller.switches, "wanted_bytes": controller.mask.weight_bytes}
            told.write({"step": _of_step(step, before, begun) | wanted})
            before = step.mask
        if idle:
            time.sleep(_IDLE_SECONDS)


@dataclass(frozen=True)
class _Told:
    """Writes what became of a sequence once it has ended.

    Attributes:
        begun: Second 0, by the engine's clock.
        all_bytes: Weight bytes of all components.
        write: Takes the line.
        masks: Tokens that each mask generated.
    """

    begun: float
    all_bytes: int
    write: Callable[[dict[str, Any]], None]
    masks: Counter[PruningMask]

    def __call__(self, sequence: Sequence) -> None:
        if sequence.ended_seconds is None:
            return
        self.masks.update(sequence.masks)
        kept = [mask.weight_bytes / self.all_bytes for mask in sequence.masks]
        self.write(
            {
                "number": sequence.request.seed,
                "arrived_seconds": _since(sequence.arrived_seconds, self.begun),
                "first_seconds": _since(sequence.first_seconds, self.begun),
                "ended_seconds": _since(sequence.ended_seconds, self.begun),
                "generated_tokens": len(sequence.generated),
                "log_likelihood": sum(sequence.log_likelihoods),
                "kept_ratio": sum(kept) / len(kept) if kept else None,
                "status": sequence.status.value,
                "error": sequence.error,
                "evictions": sequence.evictions,
            }
        )


def _since(seconds: float | None, begun: float) -> float | None:
    return None if seconds is None else seconds - begun


def _of_step(step: Step, before: PruningMask, begun: float) -> dict[str, Any]:
    return {
        "began_seconds": round(step.began_seconds - begun, 4),
        **{name: round(getattr(step, name), 6) for name in ("decide_seconds", "switch_seconds", "read_seconds")},
        **{name: getattr(step, name) for name in ("read_tokens", "generated_tokens", "running", "waiting", "switched")},
        "needed_bytes": step.needed_bytes,
        "budget_bytes": int(step.budget_bytes),
        "weight_bytes": step.mask.weight_bytes,
        "kv_bytes_per_token": step.mask.kv_bytes_per_token,
        "moved_bytes": _moved(before, step.mask),
    }


def _moved(before: PruningMask, after: PruningMask) -> int:
    """Bytes of weights that left or came."""
    rows = () if before is after else zip(before.components, before.keep, after.keep, strict=True)
    return sum(row.weight_bytes for row, was, is_now in rows if was != is_now)


if __name__ == "__main__":
    main()
