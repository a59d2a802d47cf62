"""Part `sites`: what each site is worth alone, by shared streams against whole forwards of upstream's model."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, in_type, plain_loss, speedup
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.site_curves import measure_site_curves


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures all points of all sites in each repeat, and some of them by whole forwards and one by one, scaled up."""
    options, llm = bench.options["sites"], bench.build_llm(granularity="group")
    upstream = bench.upstream(llm, granularity="group")
    windows = bench.windows()
    evaluator = PerplexityEvaluator(windows, "calibration")
    masks = list(measure_site_curves(Meter(llm, evaluator), options["levels"]).known)
    trials = masks[:: options["plain_every"]]
    step, share = counted(progress, 3 * options["repeats"]), len(trials) / len(masks)
    ways = {
        "plain": lambda _: step({mask: -plain_loss(upstream, windows, mask) for mask in trials}),
        "one by one": lambda _: step({mask: next(evaluator.evaluate_many(llm, [mask]))[1].score for mask in trials}),
        "together": lambda _: step({mask: own.score for mask, own in evaluator.evaluate_many(llm, masks)}),
    }
    seconds, scores = alternate(ways, options["repeats"])
    plain, alone = ([taken / share for taken in seconds[name]] for name in ("plain", "one by one"))
    together = scores["together"][0]
    return {
        "masks": len(masks),
        "plain_dtype": str(upstream.dtype),
        "tokens": windows.numel(),
        "against_plain": speedup(plain, seconds["together"]),
        "against_one_by_one": speedup(alone, seconds["together"]),
        "identical": all(together[mask] == score for mask, score in scores["one by one"][0].items()),
        "largest_difference_from_plain": max(abs(together[mask] - score) for mask, score in scores["plain"][0].items()),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    return [
        f"{results['masks']} masks of one narrow site on {results['tokens']:,} tokens:"
        f" {results['against_plain']['ratio']:.2f} times faster than whole forwards of upstream's model"
        f"{in_type(results)},"
        f" {results['against_one_by_one']['ratio']:.2f} times than one by one, identical: {results['identical']};"
        f" losses within {results['largest_difference_from_plain']:.4f} of upstream's"
    ]
