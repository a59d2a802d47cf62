"""Writers of one store that were killed: what was lost, and what was measured twice."""

from collections.abc import Mapping
from typing import Any

from experiments.report.table import Table


def kills_table(record: Mapping[str, Any]) -> Table:
    """One row for each database."""
    columns = ["store", "writers", "kills", "finished evaluations", "lost", "measured twice", "begun again"]
    keys = ("writers", "kills", "finished", "lost", "measured_twice", "begun_again")
    return Table(columns, [[name, *(f"{of[key]:,}" for key in keys)] for name, of in record["results"].items()])
