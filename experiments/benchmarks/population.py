"""Part `population`: masks mutated from a parent, evaluated together against one by one with the same engine."""

from collections.abc import Callable
from itertools import permutations
from statistics import median
from typing import Any

import numpy as np

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, forward_flops, gemm_flops_per_second, speedup
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.perplexity import TextEvaluator
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites


def swapped(parent: PruningMask, n_swaps: int, rng: np.random.Generator) -> PruningMask:
    """Drops and restores components of one kind, as EvoPress mutates (arXiv 2410.14649)."""
    mask = parent
    for _ in range(n_swaps):
        restored = mask.dropped[rng.integers(len(mask.dropped))]
        same_kind = [component for component in mask.kept if component.site.kind == restored.site.kind]
        mask = mask.drop(same_kind[rng.integers(len(same_kind))]).restore(restored)
    return mask


def offspring(parent: PruningMask, n_masks: int, most_swaps: int, rng: np.random.Generator) -> list[PruningMask]:
    """Distinct mutants; with up to 3 swaps their number is the lower of two draws, as in EvoPress."""
    masks: set[PruningMask] = set()
    while len(masks) < n_masks:
        n_swaps = int(rng.integers(1, most_swaps + 1, size=2).min())
        masks |= {swapped(parent, n_swaps, rng)} - {parent}
    return sorted(masks, key=lambda mask: mask.digest)


def shifted(llm: SwitchableLLM, parent: PruningMask, n_masks: int, rng: np.random.Generator) -> list[PruningMask]:
    """Distinct mutants of which one site has a part less than the parent's, and another of its kind one more."""
    widths, bits = parent.widths, parent.kept_parts
    pairs = [
        (narrower, wider)
        for (narrower, (site, _)), (wider, (other, parts)) in permutations(enumerate(bits), 2)
        if site.kind == other.kind and widths[narrower] > 0 and widths[wider] < len(parts)
    ]
    masks: set[PruningMask] = set()
    while len(masks) < n_masks:
        narrower, wider = pairs[rng.integers(len(pairs))]
        shift = {narrower: -1, wider: 1}
        masks.add(
            PruningMask.from_widths(llm.shape, [width + shift.get(place, 0) for place, width in enumerate(widths)])
        )
    return sorted(masks, key=lambda mask: mask.digest)


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Evaluates a fresh population in each repeat: single swaps, EvoPress's one to three, and shifts between widths."""
    llm, evaluator, order, options = bench.llm, bench.evaluator, bench.order, bench.options["population"]
    parent = PruningMask.all_kept(llm.shape).drop(*order[: len(order) - round(options["kept_ratio"] * len(order))])
    step, results = counted(progress, 3 * 2 * options["repeats"]), {}
    evaluator.evaluate(llm)  # encodes the requests
    for name, most_swaps in (("one_swap", 1), ("one_to_three_swaps", 3)):
        populations = [
            offspring(parent, options["masks"], most_swaps, np.random.default_rng([repeat, most_swaps]))
            for repeat in range(options["repeats"])
        ]
        results[name] = _together(llm, evaluator, populations, step)
    groups = bench.build_llm(granularity="group")
    widths = [int(options["kept_ratio"] * len(bits)) for _site, bits in PruningMask.all_kept(groups.shape).kept_parts]
    narrow = PruningMask.from_widths(groups.shape, widths)
    populations = [
        shifted(groups, narrow, options["masks"], np.random.default_rng([repeat, 0]))
        for repeat in range(options["repeats"])
    ]
    results["one_shift"] = _together(groups, evaluator, populations, step)
    return results | {
        "gemm_flops_per_second": gemm_flops_per_second(llm),
        "parent_dropped": [c.name for c in parent.dropped],
    }


def _together(
    llm: SwitchableLLM, evaluator: Evaluator, populations: list[list[PruningMask]], step: Callable
) -> dict[str, Any]:
    tokens, head_rows, batches = _forwarded(evaluator, llm)
    executions: list[int] = []

    def together(repeat: int) -> dict:
        before = llm.site_executions
        scores = dict(evaluator.evaluate_many(llm, populations[repeat]))
        executions.append(llm.site_executions - before)
        return step(scores)

    def one_by_one(repeat: int) -> dict:
        return step({mask: next(evaluator.evaluate_many(llm, [mask]))[1] for mask in populations[repeat]})

    seconds, scores = alternate({"plain": one_by_one, "ours": together}, len(populations))
    separate = [sum(len(list(kept_sites(mask))) for mask in population) for population in populations]
    flops = [sum(forward_flops(llm, mask, tokens, head_rows) for mask in masks) for masks in populations]
    return {
        "speedup": speedup(seconds["plain"], seconds["ours"]),
        "identical": scores["plain"] == scores["ours"],
        "masks": len(populations[0]),
        "shared_executions_ratios": [
            apart * batches / shared for apart, shared in zip(separate, executions, strict=True)
        ],
        "one_by_one_flops_per_second": [count / taken for count, taken in zip(flops, seconds["plain"], strict=True)],
    }


def _forwarded(evaluator: Evaluator, llm: SwitchableLLM) -> tuple[int, int, int]:
    """Of an evaluation: tokens, positions at which the masked model's logits are computed, and batches."""
    if isinstance(evaluator, TextEvaluator):
        return evaluator.tokens(llm), len(evaluator.windows) * evaluator.target_tokens, len(evaluator.batches())
    plan = evaluator.plan(llm)
    return plan.tokens, plan.head_rows, plan.batches


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    gemm, printed = results["gemm_flops_per_second"], []
    for name in [name for name in ("one_swap", "one_to_three_swaps", "one_shift") if name in results]:
        part = results[name]
        printed.append(
            f"{name.replace('_', ' ')}: {part['speedup']['ratio']:.2f} times faster together, identical:"
            f" {part['identical']}; {median(part['shared_executions_ratios']):.2f} times fewer site executions;"
            f" one by one at {median(part['one_by_one_flops_per_second']) / gemm:.0%} of the GEMM rate"
        )
    return printed
