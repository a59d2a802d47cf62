"""Part `bits`: number formats of sites chosen by a table, against as many bytes saved from the front or at random."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import counted
from rap_env.calibration import packaged_corpus
from rap_env.calibration.corpus import local_text
from rap_env.calibration.sampling import consecutive_windows
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.bits import BASE, FormatTable, MixedFormats


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measures the table on one text; on another the loss of what it chooses at budgets between the extremes."""
    options = bench.options["bits"]
    mixed = MixedFormats(bench.build_llm(granularity="block", weights="full", kv_cache="full"))
    searched, reported = (
        PerplexityEvaluator(_windows(bench, options[half], packaged), half)
        for half, packaged in (("table", "calibration"), ("report", "evaluation"))
    )
    n_rows = len(mixed.llm.shape.components) * len(set(options["formats"]) - {BASE})
    step = counted(progress, n_rows + 2 + 4 * options["budgets"])
    table = mixed.table(searched, options["formats"], lambda _done, _total: step())

    def reports(weights: dict[str, str]) -> dict[str, Any]:
        n_sites = sum(row.weights != BASE for row in table.chosen(weights))
        loss = step(mixed.loss(reported, weights))
        return {"loss": loss, "weight_bytes": table.weight_bytes(weights), "sites": n_sites}

    smallest = {name: rows[0].weights for name, rows in table.sites.items()}
    largest = {name: rows[-1].weights for name, rows in table.sites.items()}
    shuffled = np.random.default_rng(options["seed"]).permutation(list(table.sites)).tolist()
    extremes = {"largest": reports(largest), "smallest": reports(smallest)}
    found = []
    for number in range(options["budgets"], 0, -1):
        span = extremes["largest"]["weight_bytes"] - table.least_bytes
        budget = table.least_bytes + span * number // (options["budgets"] + 1)
        chosen = table.cheapest(budget)
        ways = {"table": chosen} | {
            name: _until_it_fits(table, largest, smallest, order, budget)
            for name, order in (("front", list(table.sites)), ("random", shuffled))
        }
        found.append(
            {
                "budget_bytes": budget,
                "weights": chosen,
                "predicted": table.increase(chosen),
                "measured": step(mixed.loss(searched, chosen)) - table.loss,
                **{name: reports(weights) for name, weights in ways.items()},
            }
        )
    return {"table": asdict(table), "extremes": extremes, "budgets": found}


def _windows(bench: Bench, options: dict[str, Any], packaged: str) -> torch.Tensor:
    text = local_text(options["text"]) if options["text"] else "".join(packaged_corpus(packaged).documents)
    return consecutive_windows(text, bench.llm.tokenizer, options["window_tokens"], options["windows"])


def _until_it_fits(
    table: FormatTable, largest: dict[str, str], smallest: dict[str, str], order: Sequence[str], budget_bytes: int
) -> dict[str, str]:
    """Sites go from their largest to their smallest format in an order, as few as the budget asks for."""
    weights = dict(largest)
    for name in order:
        if table.weight_bytes(weights) <= budget_bytes:
            break
        weights[name] = smallest[name]
    return weights


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed; losses are above that of each site in its largest format."""
    largest, smallest = (results["extremes"][name] for name in ("largest", "smallest"))
    above = largest["loss"]
    printed = [f"all sites in their largest format: {_mb(largest)}; loss {above:.4f}"]
    for found in results["budgets"]:
        ways = [
            f"{name} {found[name]['loss'] - above:+.4f} ({found[name]['sites']} sites, {_mb(found[name])})"
            for name in ("table", "front", "random")
        ]
        budget, predicted, measured = found["budget_bytes"] / 1e6, found["predicted"], found["measured"]
        searched = f"on the table's text {predicted:+.4f} predicted, {measured:+.4f} measured"
        printed.append(f"at most {budget:.1f} MB: loss {', '.join(ways)}; {searched}")
    return [*printed, f"all in their smallest: {_mb(smallest)}; loss {smallest['loss'] - above:+.4f}"]


def _mb(found: dict[str, Any]) -> str:
    return f"{found['weight_bytes'] / 1e6:.1f} MB"
