"""What stored records say: `python -m experiments.report results/policies.jsonl -o page.html` prints Markdown."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.records import read_records
from experiments.report import benchmark_lines, report_on
from experiments.report.frontier import frontier_page
from experiments.report.tables import table_lines
from rap_env.errors import RapError
from rap_env.files import write_over

_DESCRIPTION = "Prints tables of what runs have recorded, as Markdown; with -o also writes a page with the figures."


def main(arguments: Sequence[str]) -> None:
    """Prints tables of the records that the paths hold; a single file with a benchmark's record prints its lines."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=_DESCRIPTION)
    parser.add_argument(
        "records",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a table (results/NAME.jsonl), a run's record.json, a sweep's folder, or a benchmark's record;"
        " those of one name are one comparison",
    )
    parser.add_argument("-o", "--output", type=Path, help="HTML page to write; of several comparisons one each")
    parser.add_argument(
        "--frontier",
        action="store_true",
        help="the records differ in how the model was made smaller: bytes against quality (experiment=frontier)",
    )
    options = parser.parse_args(arguments)
    lines = _frontier if options.frontier else _lines
    try:
        print("\n".join(lines(options.records, options.output)))
    except (RapError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _lines(paths: Sequence[Path], page: Path | None) -> list[str]:
    comparisons, lines = {}, []
    for path in paths:
        records = read_records(path)
        if path.suffix == ".json" and "rows" not in records[0]["results"]:
            lines += [*benchmark_lines(path.stem, records[0]), ""]
        else:
            comparisons.setdefault(path.resolve().stem, []).extend(records)
    for name, records in comparisons.items():
        own = page.with_stem(f"{page.stem}-{name}") if page and len(comparisons) > 1 else page
        lines += [f"## {name}", "", *report_on(records, own), ""]
    return lines


def _frontier(paths: Sequence[Path], page: Path | None) -> list[str]:
    records = [record for path in paths for record in read_records(path)]
    lines = table_lines("frontier", {"frontier": records})
    return [*lines, "", f"page: {write_over(page, frontier_page(records))}"] if page else lines


if __name__ == "__main__":
    main(sys.argv[1:])
