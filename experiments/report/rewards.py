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

    Each task counts once. A gain is the mean over contexts and seeds, with the range over seeds.

    Args:
        records: Of `experiment=carry_over_reward`, whose names say what each was rewarded by.

    Raises:
        ValueError: Runs of a name lack those of the greedy order.
    """
    found: dict[str, dict[str, dict[str, list[np.ndarray]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        for report in (_HOME, _PUBLIC):
            of_agent = found[record["config"]["name"]][record["results"]["agent"]]
            of_agent[report].append(np.array([_accuracy(row, report) for row in record["results"]["rows"]]))
    rows = []
    for name, agents in found.items():
        if BASELINE not in agents:
            raise ValueError(f"expected runs of {BASELINE} among those of {name}; there are {', '.join(agents)}")
        for agent, of_reports in agents.items():
            cells = [name, agent, f"{len(of_reports[_HOME])}"]
            gains = {}
            for report in (_HOME, _PUBLIC):
                baseline = agents[BASELINE][report][0]
                of_seeds = [float(accuracies.mean() - baseline.mean()) for accuracies in of_reports[report]]
                gains[report] = float(np.mean(of_seeds))
                cells += [f"{np.mean(of_reports[report]):.3f}"]
                cells += ["" if agent == BASELINE else number(gains[report], min(of_seeds), max(of_seeds))]
            cells += ["" if gains[_HOME] <= 0.0 else f"{gains[_PUBLIC] / gains[_HOME]:.2f}"]
            rows.append(cells)
    columns = ["rewarded by", "agent", "runs", "accuracy at home", "gain", "on public tasks", "gain", "public / home"]
    return Table(columns, rows)


def _accuracy(row: Mapping[str, Any], report: str) -> float:
    return float(np.mean([metrics["acc"] for metrics in row["reports"][report]["tasks"].values()]))
