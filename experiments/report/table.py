"""What a table is."""

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
