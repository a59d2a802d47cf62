"""Tables in the documentation, made from records: `python -m experiments.report.docs docs/*.md README.md`.

A table stands between two comments and names the files that it is made from and its kind:

    <!-- table: results/policies.jsonl metrics -->
    <!-- end -->

The kinds are those of `table_lines`, for one record those of `_OF_ONE_RECORD`, and `benchmark`: what was printed.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.records import read_records
from experiments.report import benchmark_lines
from experiments.report.carry_over import carry_over_table
from experiments.report.contexts import CONTEXT_TABLES
from experiments.report.kills import kills_table
from experiments.report.rerank_training import rerank_teachers_table, rerank_training_table
from experiments.report.reranking import RERANKING_TABLES
from experiments.report.selection import selection_calibration_table, selection_margins_table
from experiments.report.selection_learners import selection_learners_table
from experiments.report.serving import SERVING_TABLES
from experiments.report.serving_learners import serving_learners_table
from experiments.report.serving_validation import serving_validation_table
from experiments.report.tables import table_lines
from rap_env.errors import RapError
from rap_env.files import write_over

_OF_ONE_RECORD = {
    **SERVING_TABLES,
    **RERANKING_TABLES,
    **CONTEXT_TABLES,
    "carry_over": carry_over_table,
    "kills": kills_table,
    "rerank_teachers": rerank_teachers_table,
    "rerank_training": rerank_training_table,
    "serving_learners": serving_learners_table,
    "serving_validation": serving_validation_table,
    "selection_calibration": selection_calibration_table,
    "selection_margins": selection_margins_table,
    "selection_learners": selection_learners_table,
}
_START, _END = "<!-- table:", "<!-- end -->"
_MARKED = re.compile(rf"^({_START} *(.+?) *-->)\n(.*?)^{_END}$", re.MULTILINE | re.DOTALL)


def rewritten(text: str, root: Path) -> str:
    """A document with what stands between its markers made anew.

    Args:
        text: Markdown.
        root: Folder that the paths in the markers start at.

    Raises:
        UnknownName: There is no such kind of table or benchmark.
        ValueError: A marker has no end, or names no file.
        OSError: A file can't be read.
    """

    def replace(found: re.Match) -> str:
        *paths, kind = found[2].split()
        if not paths:
            raise ValueError(f"expected files and a kind of table; got {found[1]!r}")
        named = {Path(path).stem: read_records(root / path) for path in paths}
        if kind in _OF_ONE_RECORD:
            lines = [line for records in named.values() for line in _OF_ONE_RECORD[kind](records[0]).markdown]
        else:
            lines = _benchmarks(named) if kind == "benchmark" else table_lines(kind, named)
        return "\n".join([found[1], *lines, _END])

    if text.count(_START) != len(_MARKED.findall(text)):
        raise ValueError(f"expected a line {_END!r} after each {_START!r}; there is one without")
    return _MARKED.sub(replace, text)


def _benchmarks(named: Mapping[str, list[dict]]) -> list[str]:
    printed = [line for part, records in named.items() for line in ("", *benchmark_lines(part, records[0]))]
    return ["```text", *printed[1:], "```"]


def main(arguments: Sequence[str]) -> None:
    """Rewrites documents in place and names those that changed."""
    for path in map(Path, arguments):
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text, Path())
        except (RapError, OSError, ValueError) as error:
            sys.exit(f"error: {path}: {error}")
        if new != text:
            write_over(path, new)
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
