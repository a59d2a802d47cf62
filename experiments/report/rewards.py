"""What rewards are worth: how much of what a search gains on tasks of its own kind it gains on other tasks too."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.table import Table, number

BASELINE = "greedy_gsi"
_HOME, _PUBLIC = "home", "public"  # names of reports


def carry_over_rewards_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy at home and on public tasks by the name of the runs, and the gain over the greedy order in both.

    Each task counts once. A gain is the mean over contexts and seeds, with the range over seeds. Beside it stands the
    gain as a part of what the greedy order loses against the dense model: more is hardly there to be gained.

    Args:
        records: Of `experiment=carry_over_reward`, whose names say what each was rewarded by.

    Raises:
        ValueError: Runs of a name lack those of the greedy order.
    """
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    dense_accuracies = {record["config"]["name"]: record["results"]["dense"] for record in records}
    for record in records:
        accuracies = {report: _accuracy(record["results"]["rows"], report) for report in (_HOME, _PUBLIC)}
        found[record["config"]["name"]][record["results"]["agent"]].append(accuracies)
    rows = []
    for name, agents in found.items():
        if BASELINE not in agents:
            raise ValueError(f"expected runs of {BASELINE} among those of {name}; there are {', '.join(agents)}")
        baseline, dense = agents[BASELINE][0], dense_accuracies[name]
        for agent, runs in agents.items():
            cells, gains = [name, agent, f"{len(runs)}"], {}
            for report in (_HOME, _PUBLIC):
                of_seeds = [run[report] - baseline[report] for run in runs]
                gains[report] = float(np.mean(of_seeds))
                cells += [f"{np.mean([run[report] for run in runs]):.3f}"]
                lost = dense[report] - baseline[report]
                part = f"{gains[report] / lost:.0%}" if agent != BASELINE and lost > 0.0 else ""
                cells += ["" if agent == BASELINE else number(gains[report], min(of_seeds), max(of_seeds)), part]
            cells += ["" if gains[_HOME] <= 0.0 else f"{gains[_PUBLIC] / gains[_HOME]:.2f}"]
            rows.append(cells)
    gain = ["gain", "of what greedy loses"]
    return Table(
        ["rewarded by", "agent", "runs", "accuracy at home", *gain, "on public tasks", *gain, "gains' ratio"], rows
    )


def _accuracy(rows: Sequence[Mapping[str, Any]], report: str) -> float:
    """Mean over contexts and tasks."""
    return float(np.mean([[metrics["acc"] for metrics in row["reports"][report]["tasks"].values()] for row in rows]))
