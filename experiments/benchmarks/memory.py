"""Part `memory`: measured peaks of importance and scoring beside the weights."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import counted
from rap_env.evaluation.scoring import ScoringPlan
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.measured import measured_peak, return_freed_memory
from rap_env.memory.workload import Workload


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures each case's peak above what was in use before, after one run to warm up.

    Freed memory is returned to the system from here on, for otherwise what the C library keeps counts too; it slows
    the process down, so this part comes last.
    """
    llm, windows = bench.llm, bench.windows()
    pairs = bench.evaluator.plan(llm).pairs
    return_freed_memory()
    dense = PruningMask.all_kept(llm.shape)
    masks = [dense.drop(component) for component in dense.components[:8]]

    def rank(exact: bool) -> None:
        greedy_sequential_importance(llm, windows, removals=1, exact=exact)

    def score(batch_tokens: int, n_masks: int) -> None:
        for _result in ScoringPlan(pairs, batch_tokens).run(llm, masks[:n_masks]):
            pass

    cases: dict[str, Callable[[], None]] = {
        "lazy importance": lambda: rank(exact=False),
        "exact importance": lambda: rank(exact=True),
        "scoring, 4,096 tokens at once": lambda: score(4096, 1),
        "scoring, 1,024 tokens at once": lambda: score(1024, 1),
        "scoring 8 masks, 1,024 tokens at once": lambda: score(1024, 8),
    }
    results, step = {}, counted(progress, len(cases))
    for name, run in cases.items():
        run()
        with measured_peak(llm.device) as peak:
            run()
        results[name] = peak.peak_bytes
        step()
    return {"peak_bytes": results, "weights_bytes": footprint(llm.shape, dense, Workload(1, 1)).weights_bytes}


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    weights_bytes = results["weights_bytes"]
    return [
        f"{name}: {n_bytes / 1e6:.0f} MB, {n_bytes / weights_bytes:.0%} of the weights"
        for name, n_bytes in sorted(results["peak_bytes"].items())
    ]
