"""Tables in the documentation, made from records: `python -m experiments.report.docs docs/*.md README.md`.

A table stands between two comments and names the files that it is made from and its kind:

    <!-- table: results/policies.jsonl metrics -->
    <!-- end -->
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.report import benchmark_lines
from experiments.report.comparison import Comparison, read_records
from experiments.report.tables import (
    Table,
    comparison_notes,
    compact_table,
    markdown,
    metrics_table,
    notes,
    perplexity_table,
    run_table,
    spending_table,
)
from rap_env.errors import RapError, UnknownName

_START, _END = "<!-- table:", "<!-- end -->"
_MARKED = re.compile(rf"^({_START} *(.+?) *-->)\n(.*?)^{_END}$", re.MULTILINE | re.DOTALL)

Named = Mapping[str, list[dict]]  # records by their file's name


def _together(table: Callable[[Comparison], Table]) -> Callable[[Named], list[str]]:
    """A table of one comparison, whose records may lie in several files."""

    def lines(named: Named) -> list[str]:
        comparison = Comparison.of([record for records in named.values() for record in records])
        return markdown(table(comparison), comparison_notes(comparison))

    return lines


def _side_by_side(table: Callable[[Mapping[str, Comparison]], Table]) -> Callable[[Named], list[str]]:
    """A table of several comparisons, each with a file of its own."""

    def lines(named: Named) -> list[str]:
        comparisons = {name: Comparison.of(records) for name, records in named.items()}
        every_note = [note for comparison in comparisons.values() for note in comparison_notes(comparison)]
        return markdown(table(comparisons), list(dict.fromkeys(every_note)))

    return lines


def _runs(named: Named) -> list[str]:
    records = [record for of_file in named.values() for record in of_file]
    return markdown(run_table(*records), notes(records))


def _benchmarks(named: Named) -> list[str]:
    printed = [line for name, records in named.items() for line in (*benchmark_lines(name, records[0]), "")]
    return ["```text", *printed[:-1], "```"]


KINDS: dict[str, Callable[[Named], list[str]]] = {
    "metrics": _together(metrics_table),
    "spending": _together(spending_table),
    "compact": _side_by_side(compact_table),
    "perplexity": _side_by_side(perplexity_table),
    "run": _runs,
    "benchmark": _benchmarks,
}


def rewritten(text: str, root: Path) -> str:
    """A document with what stands between its markers made anew.

    Args:
        text: Markdown.
        root: Folder that the paths in the markers start at.

    Raises:
        UnknownName: There is no such kind of table.
        ValueError: A marker has no end, or names no file.
        OSError: A file can't be read.
    """

    def replace(found: re.Match) -> str:
        *paths, kind = found[2].split()
        if kind not in KINDS:
            raise UnknownName("kind of table", kind, KINDS)
        if not paths or _START in found[3]:
            raise ValueError(f"expected files, a kind and a line {_END!r} after them; got {found[1]!r}")
        lines = KINDS[kind]({Path(path).stem: read_records(root / path) for path in paths})
        return "\n".join([found[1], *lines, _END])

    if text.count(_START) != len(_MARKED.findall(text)):
        raise ValueError(f"expected a line {_END!r} after each {_START!r}; there is one without")
    return _MARKED.sub(replace, text)


def main(arguments: Sequence[str]) -> None:
    """Rewrites documents in place and names those that changed."""
    for path in map(Path, arguments):
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text, Path())
        except (RapError, OSError, ValueError) as error:
            sys.exit(f"error: {path}: {error}")
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
