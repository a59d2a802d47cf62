"""Part `gsi`: exact and lazy greedy importance against the plain rule with whole forwards, over calibration seeds."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from scipy.stats import kendalltau

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import counted, in_type, plain_loss, speedup, timed
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION
from rap_env.importance.lazy import LazyRounds, split_windows
from rap_env.importance.rounds import ExactRounds, Rounds
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Runs the three rules round by round, in turn, on each calibration seed's windows."""
    options = bench.options["gsi"]
    step = counted(progress, options["quality_removals"] * len(options["seeds"]))
    llm, upstream = bench.llm, bench.upstream(bench.llm)
    runs = [{"seed": seed} | _race(llm, upstream, bench.windows(seed), options, step) for seed in options["seeds"]]
    plain, exact, lazy = ([run["seconds"][name] for run in runs] for name in ("plain", "exact", "lazy"))
    return {
        "plain_dtype": str(upstream.dtype),
        "exact_against_plain": speedup(plain, exact),
        "lazy_against_plain": speedup(plain, lazy),
        "lazy_against_exact": speedup(exact, lazy),
        "runs": runs,
        "between_seeds": _between_seeds(bench, runs),
    }


def _race(
    llm: SwitchableLLM, upstream: SwitchableLLM, windows: torch.Tensor, options: dict[str, Any], step: Callable
) -> dict[str, Any]:
    freed = {component.name: 1 for component in llm.shape.components}
    meters = {"exact": [_meter(llm, windows)], "lazy": [_meter(llm, part) for part in split_windows(windows)]}
    makers = {"exact": ExactRounds, "lazy": LazyRounds}
    seconds, rules = {"plain": 0.0}, {}
    for name, maker in makers.items():
        seconds[name], rules[name] = timed(lambda maker=maker, name=name: maker(*meters[name], freed=freed))
    at_removals: dict[str, dict] = {}
    removed: dict[str, list] = {name: [] for name in rules}
    checks = []
    for index in range(options["quality_removals"]):
        mask, loss = rules["exact"].mask, rules["exact"].loss
        for name, rounds in rules.items():
            taken, removal = timed(rounds.remove_least_important)
            removed[name].append(removal)
            seconds[name] += taken if index < options["removals"] else 0.0
        if index < options["removals"]:
            trials = {c.name: mask.drop(c) for c in mask.kept[index % options["plain_every"] :: options["plain_every"]]}
            taken, losses = timed(
                lambda trials=trials: [plain_loss(upstream, windows, trial) for trial in trials.values()]
            )
            seconds["plain"] += taken * len(mask.kept) / len(trials)
            losses = dict(zip(trials, losses, strict=True))
            checks.append(_check(losses, rules["exact"], loss, removed["exact"][-1].name))
        if index + 1 == options["removals"]:
            at_removals = {name: _cost(rounds, meters[name]) for name, rounds in rules.items()}
        step()
    gaps = [lazy.loss / exact.loss - 1 for exact, lazy in zip(removed["exact"], removed["lazy"], strict=True)]
    orders = {name: [*(r.name for r in removed[name]), *rules[name].left()] for name in rules}
    return {
        "seconds": seconds,
        "cost_at_removals": at_removals,
        "cost": {name: _cost(rounds, meters[name]) for name, rounds in rules.items()},
        "orders": orders,
        "losses": {name: [r.loss for r in removed[name]] for name in rules},
        "lazy_loss_above_exact": gaps,
        "agreement": _agreement(*orders.values(), (options["removals"], options["quality_removals"])),
        "plain_checks": checks,
    }


def _check(losses: dict[str, float], exact: Rounds, loss_before: float, choice: str) -> dict[str, Any]:
    """How far the plain losses of a round are from the exact rule's, and whether they would choose the same."""
    differences = [abs(loss - loss_before - exact.increases[name]) for name, loss in losses.items()]
    complete = len(losses) == len(exact.mask.kept) + 1
    return {
        "masks": len(losses),
        "largest_difference": max(differences),
        "same_choice": min(losses, key=losses.__getitem__) == choice if complete else None,
    }


def _cost(rounds: Rounds, meters: Sequence[Meter]) -> dict[str, int]:
    return {"evaluations": len(rounds.tried), "tokens": sum(meter.budget.spent for meter in meters)}


def _meter(llm: SwitchableLLM, windows: torch.Tensor) -> Meter:
    return Meter(llm, PerplexityEvaluator(windows, CALIBRATION))


def _agreement(first: Sequence[str], second: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """Kendall's tau over all components, and the shared part of the first k for each size."""
    positions = [first.index(name) for name in second]
    overlaps = {f"top_{size}_overlap": len({*first[:size]} & {*second[:size]}) / size for size in sizes}
    return {"kendall_tau": float(kendalltau(range(len(positions)), positions).statistic)} | overlaps


def _between_seeds(bench: Bench, runs: list[dict]) -> dict[str, Any]:
    """How much the calibration sample matters: agreement of the exact orders, and each mask's loss on each sample."""
    sizes = (len(runs[0]["plain_checks"]), len(runs[0]["losses"]["exact"]))
    orders = [run["orders"]["exact"] for run in runs]
    pairs = [_agreement(first, second, sizes) for first, second in combinations(orders, 2)]
    meters = [_meter(bench.llm, bench.windows(run["seed"])) for run in runs]
    dense = PruningMask.all_kept(bench.llm.shape)
    losses = {
        f"after_{size}": [
            [-meter.evaluate([dense.drop(*order[:size])])[0].score for meter in meters] for order in orders
        ]
        for size in sizes
    }
    return {"agreement_of_pairs": pairs, "loss_of_rows_mask_on_columns_sample": losses}


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    dtype, comparisons = in_type(results), ("exact_against_plain", "lazy_against_plain", "lazy_against_exact")
    names = [name.replace("_", " ").replace("plain", f"plain{dtype}") for name in comparisons]
    ratios = [results[name]["ratio"] for name in comparisons]
    printed = [f"{name}: {ratio:.1f} times faster" for name, ratio in zip(names, ratios, strict=True)]
    for run in results["runs"]:
        gaps, timed_rounds, costs = run["lazy_loss_above_exact"], len(run["plain_checks"]), run["cost_at_removals"]
        printed.append(
            f"seed {run['seed']}: lazy loss above exact at most {max(gaps[:timed_rounds]):.2%} up to {timed_rounds}"
            f" removals, {max(gaps):.2%} up to {len(gaps)}; Kendall tau {run['agreement']['kendall_tau']:.2f};"
            f" {costs['lazy']['evaluations']} of {costs['exact']['evaluations']} masks"
        )
    return printed + [f"between samples: {pair}" for pair in results["between_seeds"]["agreement_of_pairs"]]
