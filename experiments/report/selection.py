"""Rules that prune a reranker's candidates: thresholds that find themselves, and margins that ship with an adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.table import Table


def selection_calibration_table(record: Mapping[str, Any]) -> Table:
    """One row for each K and first threshold; two numbers are the range over the orders of the queries."""
    rows = []
    for row in record["results"]["rows"]:
        who = "the walk" if row["start"] is None else f"online, from {row['start']:g}"
        columns = row["thresholds"], row["report"]["agreement"], row["report"]["compute"]
        rows.append([str(row["top_k"]), who, *map(_range, columns)])
    return Table(["K", "threshold", "it ends at", "agreement", "compute"], rows)


def selection_margins_table(record: Mapping[str, Any]) -> Table:
    """One row for each number of candidates and K: the margin needed there, and what the widest of them came to."""
    rows = []
    for row in record["results"]["rows"]:
        means = [f"{row['report'][name]:.3f}" for name in ("agreement", "executions", "compute")]
        rows.append([str(row["candidates"]), str(row["top_k"]), f"{row['needed']:.2f}", *means])
    return Table(["candidates", "K", "margin needed", "agreement", "executions", "compute"], rows)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"
