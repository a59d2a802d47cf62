"""Part `memory`: predicted against measured peaks of importance and scoring."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import counted
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.scoring import ScoringPlan
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.mask import PruningMask
from rap_env.memory.measured import measured_peak, return_freed_memory


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
    evaluator = PerplexityEvaluator(windows, "calibration")

    def rank(exact: bool) -> int:
        greedy_sequential_importance(llm, windows, removals=1, exact=exact)
        n_sites = len(llm.shape.sites)  # the exact rule evaluates a round together, the lazy one holds streams
        return evaluator.peak_bytes(llm, n_sites) if exact else evaluator.peak_bytes(llm, 1, n_sites + 1)

    def score(batch_tokens: int, n_masks: int) -> int:
        plan = ScoringPlan(pairs, batch_tokens)
        for _result in plan.run(llm, masks[:n_masks]):
            pass
        return plan.peak_bytes(llm.shape, n_masks)

    cases: dict[str, Callable[[], int]] = {
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
            predicted_bytes = run()
        results[name] = {"predicted_bytes": predicted_bytes, "measured_bytes": peak.peak_bytes}
        step()
    return {"cases": results}


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"{name}: predicted {case['predicted_bytes'] / 1e6:.0f} MB, measured {case['measured_bytes'] / 1e6:.0f} MB"
        for name, case in sorted(results["cases"].items())
    ]
