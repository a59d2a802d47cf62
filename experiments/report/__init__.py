"""Reports over records: tables, figures and one page. Nothing here runs a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import gpu, part
from experiments.report.amortisation import amortisation_figure, is_family
from experiments.report.closing import closing_metrics
from experiments.report.comparison import Comparison
from experiments.report.drawing import PageFigure, page_of_one
from experiments.report.kept import kept_picture
from experiments.report.leaderboard import is_leaderboard, leaderboard_figure
from experiments.report.page import write_page
from experiments.report.tables import run_table, table_lines
from rap_env.files import write_over

__all__ = ["benchmark_lines", "closing_metrics", "kept_picture", "report_on", "run_table"]


def report_on(records: Sequence[dict[str, Any]], page: Path | None) -> list[str]:
    """What the records of one comparison say, or those of one family of contexts under several token budgets.

    Args:
        records: At least one; of one comparison but for token budgets, or the rows of a leaderboard.
        page: Where the page with the figures is written; None writes none.

    Returns:
        Lines of Markdown.

    Raises:
        ValueError: The records do not belong together.
    """
    named, budgets = {"": records}, {record["config"].get("token_budget") for record in records}
    if is_leaderboard(records):
        return [*table_lines("leaderboard", named), "", *_page_of(leaderboard_figure(records), page)]
    family = [*table_lines("family", named), ""] if is_family(records) else []
    if len(budgets) > 1 and family:
        return [*family, *_page_of(amortisation_figure(records), page)]
    lines = [*table_lines("run", named), ""] if len(records) == 1 else []
    lines += family
    lines += [*table_lines("metrics", named), "", "Loss over dense on the search half after so many tokens:", ""]
    lines += table_lines("spending", named)
    return [*lines, "", f"page: {write_page(Comparison(records), page)}"] if page else lines


def _page_of(figure: PageFigure, page: Path | None) -> list[str]:
    return [f"page: {write_over(page, page_of_one(figure))}"] if page else []


def benchmark_lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """What a benchmark printed when it wrote its record.

    Raises:
        UnknownName: There is no such part.
    """
    module = gpu if name == "gpu" else part(name)  # scripts/gpu_check.py measures that one
    return [f"## {name}", *module.lines(record["results"])]
