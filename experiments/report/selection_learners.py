"""Pruning of a reranker's candidates: tuned rules and learners on held-out queries."""

from collections.abc import Mapping
from typing import Any

from agents.selection_rivals import PUBLISHED
from experiments.report.table import Table


def selection_learners_table(record: Mapping[str, Any]) -> Table:
    """One row for each K and way to decide, with what was chosen for the target agreement.

    In brackets 95% paired bootstrap intervals over queries and seeds of what a learner computes minus what the rule
    computes at the learner's agreement. A star: nothing reached the target on the queries that were tuned on.
    """
    results, rows = record["results"], []
    for k in record["config"]["top_ks"]:
        for name, of_k in results["rules"].items():
            found = of_k[str(k)]
            settings = ", ".join(f"{key} {value:g}" for key, value in found["settings"].items())
            rows.append([str(k), name + _star(found), settings, *_means(found["report"]), "", ""])
        for name, of_k in results["learned"].items():
            found = of_k[str(k)]
            one = found["prices"][str(found["price"])]
            others = {rule: each for rule, each in one["minus"].items() if rule != PUBLISHED}
            best = min(others, key=lambda rule: others[rule]["rule_compute"])
            differences = [_interval(one["minus"][PUBLISHED]), f"{_interval(others[best])} ({best})"]
            rows.append(
                [str(k), name + _star(found), f"price {found['price']:g}", *_means(one["report"]), *differences]
            )
    columns = ["K", "who decides", "chosen", "agreement", "executions", "compute"]
    return Table([*columns, "compute minus published rule", "minus the best other rule"], rows)


def _star(found: Mapping[str, Any]) -> str:
    return "" if found["reaches_target"] else " *"


def _means(means: Mapping[str, float]) -> list[str]:
    return [f"{means[name]:.3f}" for name in ("agreement", "executions", "compute")]


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
