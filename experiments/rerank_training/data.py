"""A retrieval collection in BEIR's form, and which of its queries are learned from, tuned on and reported."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rap_env.errors import RecordUnreadable
from rap_env.reading import reading


@dataclass(frozen=True)
class Document:
    """A title, and the text after it; either may be empty."""

    title: str
    body: str

    @property
    def text(self) -> str:
        """Title and body."""
        return f"{self.title} {self.body}".strip()


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and what people judged.

    Attributes:
        documents: By document.
        queries: By query.
        grades: By query and document: 1 and more are relevant, more is better; what is missing was not judged.
    """

    documents: dict[str, Document]
    queries: dict[str, str]
    grades: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Split:
    """Queries to learn from, to choose settings on, and to report; no query is in two of them."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    report: tuple[str, ...]


def load_collection(folder: str | Path) -> Collection:
    """Reads `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels.tsv` (with a header).

    Texts that begin with their title are cut there, and white space is one space. Queries without a relevant document
    are left out, as measures have no value for them.

    Raises:
        RecordUnreadable: A file is missing, or a line does not have this form, or names a query or document that is not
            there.
    """
    with reading(folder, "a retrieval collection", RecordUnreadable):
        return _collection(Path(folder))


def _collection(folder: Path) -> Collection:
    documents = {row["_id"]: _document(row) for row in _rows(folder / "corpus.jsonl", "_id", "title", "text")}
    queries = {row["_id"]: _one_line(row["text"]) for row in _rows(folder / "queries.jsonl", "_id", "text")}
    grades: dict[str, dict[str, int]] = {}
    for number, line in enumerate((folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:], 2):
        try:
            query, document, grade = line.split("\t")
            if query not in queries or document not in documents:
                raise ValueError("no such query or document")
            grades.setdefault(query, {})[document] = int(grade)
        except ValueError as error:
            raise ValueError(f"{folder / 'qrels.tsv'}, line {number}: {error}; got {line!r}") from error
    queries = {name: text for name, text in queries.items() if max(grades.get(name, {}).values(), default=0) > 0}
    return Collection(documents, queries, {name: grades[name] for name in queries})


def _document(row: dict[str, str]) -> Document:
    title, text = _one_line(row["title"]), _one_line(row["text"])
    return Document(title, text.removeprefix(title).strip())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rows(path: Path, *keys: str) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if odd := [key for key in keys if not isinstance(row[key], str)]:
                raise TypeError(f"{odd[0]} is no text")
            rows.append({key: row[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected JSON with {', '.join(keys)}; got {line[:80]!r}"
            ) from error
    return rows


def split_queries(queries: Sequence[str], n_validation: int, n_report: int, seed: int) -> Split:
    """Shuffles queries: the first are learned from, the next are validation queries, the last are reported.

    Raises:
        ValueError: Nothing would be left to learn from.
    """
    n_training = len(queries) - n_validation - n_report
    if n_training < 1:
        raise ValueError(f"expected more than {n_validation + n_report} queries; got {len(queries)}")
    order = [queries[index] for index in np.random.default_rng(seed).permutation(len(queries))]
    return Split(
        training=tuple(order[:n_training]),
        validation=tuple(order[n_training : n_training + n_validation]),
        report=tuple(order[n_training + n_validation :]),
    )
