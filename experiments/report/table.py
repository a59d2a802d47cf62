"""What a table is."""

from typing import NamedTuple


class Table(NamedTuple):
    """Names of the columns, and cells."""

    columns: list[str]
    rows: list[list[str]]
