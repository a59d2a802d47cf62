"""Part `workers`: Ray workers against one process, what storing and handing out cost, and what follows for many."""

import functools
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.queueing import Costs, largest, throughput
from experiments.benchmarks.timing import alternate, counted, speedup, timed
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.remote import RemoteEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.workers import Workers
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
WORKERS_EACH = 16  # of each driver, where there are several
BILLION = 10**9


class InstantEvaluator(Evaluator):
    """Evaluates without running anything: what is left of a batch's time is that of handing it out."""

    name = "instant"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"evaluator": "instant"}

    def tokens(self, llm: SwitchableLLM) -> int:
        return 1

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        for mask in masks:
            yield mask, Evaluation(-1.0, {"text": {"loss": 1.0, "items": 1}}, 1, 0.0)


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Evaluates the same fresh masks by one worker, two, and this process with one thread and with two lanes."""
    import ray

    options, llm = bench.options["workers"], bench.llm
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so have workers
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        load = functools.partial(load_llm, **{k: v for k, v in bench.options["model"].items() if k != "_target_"})
        pools = {n: Workers(load, n, options["batch_masks"]) for n in (1, 2)}
        results = _timed_ways(llm, pools, options, progress)
        results |= {"hand_out_seconds": _hand_out_seconds(llm, pools[1], options)}
    finally:
        ray.shutdown()
        torch.set_num_threads(threads)
    results |= {"stores": {}, "known_bytes": _known_bytes(llm)}
    for location in [None, *options["stores"]]:
        name = "sqlite" if location is None else location.partition(":")[0]
        results["stores"][name] = _store_costs(llm, location, options["stored"])
    return results | {"simulated": _simulated(results, options["batch_masks"])}


def fresh_masks(llm: SwitchableLLM, n_masks: int, kept_ratio: float, seed: int) -> list[PruningMask]:
    """Distinct random masks; fewer where a tiny model has not so many."""
    generator, dense = np.random.default_rng(seed), PruningMask.all_kept(llm.shape)
    n_masks = min(n_masks, 2 ** len(dense.keep) // 2)
    masks: dict[PruningMask, None] = {}
    while len(masks) < n_masks:
        keep = generator.random(len(dense.keep)) < kept_ratio
        masks[PruningMask(dense.components, tuple(keep.tolist()))] = None
    return list(masks)


def _timed_ways(llm: SwitchableLLM, pools: Mapping[int, Workers], options: Mapping, progress: Callable) -> dict:
    n_windows, n_tokens = options["windows"]
    windows = torch.randint(0, llm.shape.vocab_size, (n_windows, n_tokens), generator=torch.Generator().manual_seed(0))
    text = PerplexityEvaluator(windows, "random")
    loads: list[float] = []

    def evaluate(evaluator: Evaluator, n_threads: int, repeat: int) -> list[Evaluation]:
        masks = fresh_masks(llm, options["masks"], options["kept_ratio"], repeat)
        torch.set_num_threads(n_threads)
        loads.append(os.getloadavg()[0])
        try:
            with tempfile.TemporaryDirectory() as folder, ResultStore(Path(folder) / "results.db") as store:
                return step(Meter(llm, evaluator, store).evaluate(masks))
        finally:
            torch.set_num_threads(1)

    ways = {
        "one worker": functools.partial(evaluate, RemoteEvaluator(text, pools[1]), 1),
        "two workers": functools.partial(evaluate, RemoteEvaluator(text, pools[2]), 1),
        "one process": functools.partial(evaluate, text, 1),
        "two lanes": functools.partial(evaluate, text, 2),
    }
    step = counted(progress, len(ways) * (options["repeats"] + 1))
    for way in ways.values():
        way(2**16)  # workers load their models, and the first call allocates
    seconds, found = alternate(ways, options["repeats"])
    exact = [
        found["one process"][repeat] == found[way][repeat]
        for way in ("one worker", "two workers")
        for repeat in range(options["repeats"])
    ]
    return {
        "seconds": seconds,
        "masks": options["masks"],
        "two_workers": speedup(seconds["one worker"], seconds["two workers"]),
        "two_lanes": speedup(seconds["one process"], seconds["two lanes"]),
        "one_worker": speedup(seconds["one process"], seconds["one worker"]),
        "identical": all(exact),
        "task_seconds": [each.seconds for evaluations in found["one worker"] for each in evaluations],
        "load_averages": loads[len(ways) :],
    }


def _hand_out_seconds(llm: SwitchableLLM, workers: Workers, options: Mapping[str, Any]) -> float:
    """The driver's time for a batch that takes no time."""
    masks = fresh_masks(llm, options["handed_out"], 0.75, seed=1)
    evaluator = InstantEvaluator()
    list(workers.evaluate_many(evaluator, llm, masks[:8]))
    seconds, found = timed(lambda: list(workers.evaluate_many(evaluator, llm, masks)))
    return seconds / -(-len(found) // options["batch_masks"])


def _store_costs(llm: SwitchableLLM, location: str | None, n_results: int) -> dict[str, float]:
    """What claiming, storing and looking up cost for each result, and its bytes, of real identities."""
    meter = Meter(llm, PerplexityEvaluator(torch.zeros((1, 2), dtype=torch.long), "stored"))
    identities = [meter.identity(mask) for mask in fresh_masks(llm, n_results, 0.75, seed=2)]
    identities = [identity | {"benchmark": time.time()} for identity in identities]  # not stored by an earlier run
    result = {"score": -3.123456789012345, "tasks": {"stored": {"loss": 3.123456789012345, "items": 1}}}
    result |= {"tokens": 2048, "seconds": 0.123456789012345}
    with tempfile.TemporaryDirectory() as folder, ResultStore(location or Path(folder) / "results.db") as store:
        before = store.bytes
        claiming, _ = timed(lambda: store.claim(identities))
        puts = [timed(lambda identity=identity: store.put(identity, result))[0] for identity in identities]
        looking_up, _ = timed(lambda: store.get_many(identities))
        n_bytes = (store.bytes - before) / len(puts)
    each = {"claim_seconds": claiming / len(puts), "look_up_seconds": looking_up / len(puts)}
    return each | {"put_seconds": median(puts), "result_bytes": n_bytes}


def _known_bytes(llm: SwitchableLLM) -> float:
    """Memory that a driver keeps for each mask that it knows."""
    meter = Meter(llm, InstantEvaluator())
    masks = fresh_masks(llm, 1000, 0.75, seed=3)
    keeps = [mask.keep for mask in masks]
    del masks
    tracemalloc.start()
    meter.evaluate([PruningMask(llm.shape.components, tuple(list(keep))) for keep in keeps])
    current, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return current / len(keeps)


def _simulated(results: Mapping[str, Any], batch_masks: int) -> list[dict[str, Any]]:
    """Throughput against workers, for tasks as measured and thirty times as long, by layout."""
    rows = []
    for name, store in results["stores"].items():
        for factor in (1, 30):
            tasks = [factor * seconds for seconds in results["task_seconds"]]
            costs = Costs(tasks, results["hand_out_seconds"], store["put_seconds"] + store["claim_seconds"])
            for each in (None, WORKERS_EACH):
                layout = {"batch_masks": batch_masks, "workers_each": each}
                rates = [throughput(costs, n, **layout) for n in SIZES]
                row = {"store": name, "factor": factor, "workers_each": each, "sizes": SIZES, "rates": rates}
                rows.append(row | {"alone": 1 / float(np.mean(tasks)), "largest": largest(costs, 0.9, SIZES, **layout)})
    return rows


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    made = []
    for name, key in (
        ("two workers with a core each, against one", "two_workers"),
        ("two lanes in one process, against one", "two_lanes"),
        ("one worker, against the process itself", "one_worker"),
    ):
        of = results[key]
        made.append(
            f"{name}: {of['ratio']:.2f} times [{min(of['ratios']):.2f}, {max(of['ratios']):.2f}],"
            f" {of['repeats']} repeats of {results['masks']} masks"
        )
    tasks, load = results["task_seconds"], results["load_averages"]
    made.append(
        f"an evaluation: {median(tasks):.2f} s [{min(tasks):.2f}, {max(tasks):.2f}] in one worker; equal results:"
        f" {results['identical']}; load average {min(load):.1f} to {max(load):.1f}"
    )
    made.append(f"handing out a batch: {1000 * results['hand_out_seconds']:.2f} ms of the driver")
    for name, of in results["stores"].items():
        claim, put, look_up = (1000 * of[f"{what}_seconds"] for what in ("claim", "put", "look_up"))
        made.append(
            f"{name}, a result: {put:.2f} ms to store, {claim:.3f} ms to claim and {look_up:.3f} ms to look up"
            f" among many; {of['result_bytes']:,.0f} bytes, {BILLION * of['result_bytes'] / 1e12:.1f} TB for a billion"
        )
    made.append(
        f"a mask that a driver knows: {results['known_bytes']:,.0f} bytes of memory,"
        f" {BILLION * results['known_bytes'] / 1e12:.1f} TB for a billion"
    )
    return made + [_simulated_line(row) for row in results["simulated"]]


def _simulated_line(row: Mapping[str, Any]) -> str:
    layout = f"drivers of {row['workers_each']} workers" if row["workers_each"] else "one driver"
    shown = ", ".join(
        f"{n:,}: {rate:.3g}" for n, rate in zip(row["sizes"], row["rates"], strict=True) if n in (1, 2, 16, 128, 1000)
    )
    return (
        f"simulated, {row['store']}, {layout}, tasks of {1 / row['alone']:.2f} s: evaluations a second by workers"
        f" {shown}; at 90% up to {row['largest']:,} workers"
    )
