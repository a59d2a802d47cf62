"""The simulated service against the live one, episode by episode."""

from collections.abc import Mapping
from typing import Any

from experiments.report.table import Table

_WHOLE = {"served": "served", "in_time": "in time", "generated_tokens": "tokens", "switches": "switches"}


def serving_validation_table(record: Mapping[str, Any]) -> Table:
    """One row an episode, each quantity as `live / simulated`, and their sums, of `kept_share` the mean."""
    episodes = record["results"]["episodes"]
    rows = [[str(number), *_cells([each])] for number, each in enumerate(episodes, 1)]
    return Table(["episode", "requests", *_WHOLE.values(), "weights kept"], [*rows, ["all", *_cells(episodes)]])


def _cells(episodes: list[Mapping[str, Any]]) -> list[str]:
    live, simulated = ([each[side] for each in episodes] for side in ("live", "simulated"))
    sums = [f"{sum(one[name] for one in live):,.0f} / {sum(one[name] for one in simulated):,.0f}" for name in _WHOLE]
    shares = [sum(one["kept_share"] for one in side) / len(side) for side in (live, simulated)]
    return [f"{sum(one['arrived'] for one in live):,}", *sums, f"{shares[0]:.2f} / {shares[1]:.2f}"]
