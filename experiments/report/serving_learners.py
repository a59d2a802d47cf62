"""Controllers of the simulated service: reward on held-out episodes, against tuned hysteresis."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.report.table import Table


def serving_learners_table(record: Mapping[str, Any]) -> Table:
    """One row a policy, the best first; in brackets 95% paired bootstrap intervals over episodes and seeds."""
    policies = record["results"]["policies"]
    rows = []
    for name, each in sorted(policies.items(), key=lambda item: -item[1]["difference"]["mean"]):
        difference = each["difference"]
        interval = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        rows.append([name, f"{np.mean(each['reward']):.3f}", interval])
    return Table(["policy", "reward", "minus tuned hysteresis"], rows)
