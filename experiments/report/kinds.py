"""Agents on contexts of several kinds of text: what they lose on each kind, and against the agent that loses least."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.records import dense_scores
from experiments.report.amortisation import Amortisation, within_family
from experiments.report.metrics import plain_mean, with_spread
from experiments.report.table import Table, number


def family_kinds_table(records: Sequence[dict[str, Any]]) -> Table:
    """Held-out loss over dense of each agent on all contexts and on those of each kind; the least loss first.

    Below, what each other agent loses more than the first: of equal seeds, so that both read the same text.

    Args:
        records: Of one family whose contexts have kinds of text; an agent's token budgets are told apart.

    Raises:
        ValueError: The records do not belong together, or contexts have no kinds.
    """
    Amortisation(records)  # refuses what does not belong together
    within, rows = within_family(records[0]), records[0]["results"]["rows"]
    of_context = np.array([row.get("kind", "") for row in rows])[within]
    if not all(of_context):
        raise ValueError("expected contexts that are each of a kind of text; there are others")
    losses: dict[tuple[str, int], dict[int, np.ndarray]] = defaultdict(dict)
    for record in records:
        results, (main, *_others) = record["results"], record["results"]["evaluators"]
        scores = np.array([row["reports"][main]["score"] for row in results["rows"]])
        lost = (np.array(dense_scores(results, main)) - scores)[within]
        losses[results["agent"], record["config"]["token_budget"]][results["seed"]] = lost
    kinds = sorted(set(of_context.tolist()))

    def cells(of_seeds: np.ndarray) -> list[str]:
        columns = [np.ones_like(of_context, dtype=bool), *(of_context == kind for kind in kinds)]
        return [number(*with_spread(of_seeds[:, column], plain_mean)) for column in columns]

    ranked = sorted(losses, key=lambda key: _all(losses[key]).mean())
    table = [
        [agent, f"{budget}", f"{len(losses[agent, budget])}", *cells(_all(losses[agent, budget]))]
        for agent, budget in ranked
    ]
    best = losses[ranked[0]]
    for agent, budget in ranked[1:]:
        other = losses[agent, budget]
        if seeds := sorted(best.keys() & other.keys()):
            more = np.stack([other[seed] - best[seed] for seed in seeds])
            below = int((more.mean(axis=1) > 0.0).sum())
            table.append(
                [f"{agent} minus {ranked[0][0]}", f"{budget}", f"{below} of {len(seeds)} above 0", *cells(more)]
            )
    return Table(["agent", "token budget", "seeds", "held-out loss over dense", *kinds], table)


def _all(of_seeds: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.stack(list(of_seeds.values()))
