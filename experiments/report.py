"""What stored records say: `python -m experiments.report results/ppo/*.json` prints Markdown.

Records of benchmark parts (`results/benchmark/gsi.json`) print what the benchmark printed. Records of comparisons
(`outputs/compare/quick/*.json`) print a table each, and a page with its figures is written.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.comparison import Comparison, is_comparison
from experiments.merit import merit_table, spending_table
from experiments.page import write_page
from experiments.records import read_record
from rap_env.errors import RapError, UnknownName

_COLUMNS = ("accuracy", "smooth_accuracy", "reward")


def seed_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines: for each policy the mean over records (seeds) and, in brackets, their standard deviation."""
    per_policy = defaultdict(list)
    for record in records:
        for name, means in record["results"]["summary"].items():
            per_policy[name].append(means)
    lines = [
        "| policy | seeds | footprint GB | accuracy | smooth accuracy | reward | violations |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in per_policy.items():
        cells = [_with_spread([run[column] for run in runs if column in run]) for column in _COLUMNS]
        violations = f"{sum(run['violations'] for run in runs)} of {sum(run['scenarios'] for run in runs)}"
        footprint = f"{mean(run['footprint_gb'] for run in runs):.3f}"
        lines.append("| " + " | ".join([name, str(len(runs)), footprint, *cells, violations]) + " |")
    return lines


def benchmark_lines(part: str, record: dict[str, Any]) -> list[str]:
    """What the benchmark printed when it wrote a part's record.

    Raises:
        UnknownName: The file is not named as a part is.
    """
    from experiments.benchmark import PARTS  # here: it loads every judge, which tables of seeds don't need

    if part not in PARTS:
        raise UnknownName("benchmark part", part, PARTS)
    return [f"## {part}", *PARTS[part].lines(record["results"])]


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return ""  # an evaluation by text has no smooth accuracy
    spread = f" ({stdev(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Prints what records say.")
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default="page.html",
        help="page (page.html); of several comparisons page-NAME.html",
    )
    options = parser.parse_args(arguments)
    try:
        print("\n".join(_lines({path: read_record(path) for path in options.records}, options.output)))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _lines(records: dict[Path, dict[str, Any]], page: Path) -> list[str]:
    compared = [record for record in records.values() if is_comparison(record)]
    seeds = [record for record in records.values() if "summary" in record["results"]]
    lines = seed_table(seeds) if seeds else []
    for path, record in records.items():
        if not is_comparison(record) and "summary" not in record["results"]:
            lines += benchmark_lines(path.stem, record)
    by_name = defaultdict(list)
    for record in compared:
        by_name[record["config"]["name"]].append(record)
    for name, of_name in by_name.items():
        comparison = Comparison.of(of_name)
        path = page if len(by_name) == 1 else page.with_stem(f"{page.stem}-{name}")
        lines += [f"## {name}", "", *markdown_table(*merit_table(comparison)), ""]
        lines += ["Loss over dense on the search half after so many evaluations:", ""]
        lines += [*markdown_table(*spending_table(comparison)), ""]
        lines += [f"page: {write_page(comparison, path)}", ""]
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
