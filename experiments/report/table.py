"""What a table is."""

import math
from typing import NamedTuple


class Table(NamedTuple):
    """Names of the columns, and cells."""

    columns: list[str]
    rows: list[list[str]]

    @property
    def markdown(self) -> list[str]:
        """The lines of a Markdown table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return ["| " + " | ".join(cells) + " |" for cells in lines]


def number(value: float, low: float, high: float) -> str:
    """A cell with both ends of its spread, where there are any; a dash for what is not finite."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if low == high else f"{value:.3f} [{low:.3f}, {high:.3f}]"
