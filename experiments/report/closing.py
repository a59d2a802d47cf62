"""What a finished run comes to, as the numbers that its tracker logs at the end."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.records import dense_scores
from experiments.report.amortisation import within_family
from rap_env.components import KINDS


def closing_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of one run by name; what is not finite, or does not exist for it, is left out.

    `objective` is the mean reward on the search half. `held_out/` and `outside/` are contexts within and beyond the
    sampler's ranges: the loss over dense of the main evaluator's report, infinite where a budget is violated. On these
    contexts it differs from the regret by what the best known mask loses, which one run can't know. `search/regret` is
    against the best mask that the search itself evaluated. `cost/` is what the search took, `kept/` the share of
    the components of each kind that masks keep.
    """
    results, search = record["results"], record["results"]["search"]
    rows, main = results["rows"], results["evaluators"][0]
    within, dense = within_family(record), dense_scores(results, main)
    scores = [-math.inf if row["violation"] else row["reports"][main]["score"] for row in rows]
    lost = np.array(dense) - scores
    missed = [row["best_evaluated"] - row["search"]["score"] for row in rows if row["best_evaluated"] is not None]
    n_held_out = int(within.sum())
    metrics = {
        "objective": results["objective"],
        "held_out/loss_over_dense": _mean(lost[within]),
        "outside/loss_over_dense": _mean(lost[~within]),
        "search/regret": _mean(missed),
        "violations": _mean([row["violation"] for row in rows]),
        "cost/tokens": search["tokens"],
        "cost/evaluations_per_context": search["tokens"] / search["tokens_each"] / n_held_out
        if n_held_out
        else math.nan,
        "cost/measured_seconds": search["measured_seconds"],
        "cost/decision_milliseconds": float(np.median([row["decision_milliseconds"] for row in rows])),
    }
    metrics |= {f"kept/{kind}": _kept(rows, results["components"], kind) for kind in KINDS}
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _kept(rows, components, kind: str) -> float:
    of_kind = {name for name in components if f".{kind}" in name}
    return 1.0 - _mean([len(of_kind & set(row["dropped"])) / len(of_kind) for row in rows]) if of_kind else math.nan
