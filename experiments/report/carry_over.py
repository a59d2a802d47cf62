"""The table of masks that were measured on data nobody searched on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.report.metrics import plain_mean, with_spread
from experiments.report.table import Table, number

METRICS = ("acc", "smooth_acc")
_LOSS = "loss over dense"


def carry_over_table(record: Mapping[str, Any]) -> Table:
    """A row for what was measured and each agent: its mean, and how far it is from that of the first two agents.

    Differences are of equal seeds and contexts; their spread is that over the seeds.
    """
    references, rows, found = list(record["results"]["agents"])[:2], [], _measured(record)
    for measured, values in found.items():
        for agent, own in values.items():
            cells = [measured, agent, f"{own.mean():.3f}"]
            for reference in references:
                difference = with_spread(own - values[reference], plain_mean)
                cells.append("" if agent == reference else number(*difference))
            rows.append(cells)
    n_seeds, n_contexts = found[_LOSS][references[0]].shape
    mean = f"mean of {n_seeds} seeds and {n_contexts} contexts"
    return Table(["measured", "agent", mean, *(f"minus {reference}" for reference in references)], rows)


def _measured(record: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Of everything that was measured, by agent: [seeds, contexts]."""
    results = record["results"]
    found = {_LOSS: {agent: np.array(of_agent["loss"]) for agent, of_agent in results["agents"].items()}}
    for task, dense in results["dense"].items():
        for metric in METRICS:
            found[f"{metric} of {task} (dense {dense[metric]:.3f})"] = {
                agent: np.array([[one[metric] for one in of_seed] for of_seed in of_agent["measured"][task]])
                for agent, of_agent in results["agents"].items()
            }
    return found
