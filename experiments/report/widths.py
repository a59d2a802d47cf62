"""The table of compensations: what makes up for dropped channels, from how much calibration text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report.table import Table


def compensation_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Perplexity on the main evaluator's report: a row for each compensation, a column for each budget and text.

    Args:
        records: Of one agent each, which differ in `widths` alone.

    Raises:
        ValueError: Two records are of the same compensation and text.
    """
    cells: dict[tuple[str, str], dict[tuple[float, int], float]] = {}
    for record in records:
        widths, results = record["config"]["widths"], record["results"]
        ridge = "" if widths["compensation"] != "ridge" else widths["ridge"] or "chosen"
        of_row = cells.setdefault((widths["compensation"], str(ridge)), {})
        for row in results["rows"]:
            column = round(1.0 - row["budget_ratio"], 3), widths["n_samples"]
            if column in of_row:
                raise ValueError(f"expected one record for each compensation and text; there are two of {widths}")
            of_row[column] = float(np.exp(-row["reports"][results["evaluators"][0]]["score"]))
    columns = sorted({column for of_row in cells.values() for column in of_row})
    names = [f"{100 * freed:.1f}% of all bytes, {windows} windows" for freed, windows in columns]
    rows = [
        [*name, *(f"{of_row[column]:.2f}" if column in of_row else "-" for column in columns)]
        for name, of_row in sorted(cells.items())
    ]
    return Table(["compensation", "ridge", *names], rows)
