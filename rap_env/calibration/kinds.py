"""Kinds of text, each as two corpora that share no document: one to search on, one to report on.

Prose is any text file. Code is what every user has: the sources of Python's standard library. Dialogue and question
answering are made of rows of multiple-choice data sets, JSON lines with a question and its choices.
"""

import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rap_env.calibration.corpus import Corpus, local_corpus
from rap_env.errors import CorpusUnavailable
from rap_env.reading import reading

Pair = tuple[Corpus, Corpus]  # to search on, to report on
_SOURCE_BYTES = range(8_000, 60_000)  # neither stubs nor the few modules that would be half of all text
_TURNS = 8  # questions of a dialogue


def prose(search_paths: str | Sequence[str], report_paths: str | Sequence[str]) -> Pair:
    """Text files, or folders of them; raises `CorpusUnavailable` as `local_corpus` does."""
    return local_corpus(search_paths), local_corpus(report_paths)


def code() -> Pair:
    """Modules of Python's standard library, in turn for the search and the report.

    Another version of Python has another text: what is evaluated is told by the digest of its tokens.

    Raises:
        CorpusUnavailable: The library's sources are not there.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size in _SOURCE_BYTES]
    return _dealt("Python's standard library", [file.read_text(encoding="utf-8", errors="replace") for file in files])


def dialogue(path: str | os.PathLike) -> Pair:
    """Chats of eight turns, made of questions and their right choices: short, everyday, one speaker after the other.

    Args:
        path: JSON lines with `question`, `choices` and `gold`, as PIQA's.

    Raises:
        CorpusUnavailable: The file is missing, or has other rows.
    """
    rows = _rows(path, {"question": str, "choices": list, "gold": int})
    with reading(path, "rows whose `gold` is one of the choices", CorpusUnavailable):
        turns = [f"User: {row['question']}\nAssistant: {row['choices'][row['gold']]}\n" for row in rows]
    chats = ["".join(turns[first : first + _TURNS]) + "\n" for first in range(0, len(turns), _TURNS)]
    return _dealt(f"dialogue of {Path(path).name}", chats)


def questions(path: str | os.PathLike) -> Pair:
    """Passages, each with a question on it and the answer.

    Args:
        path: JSON lines with `passage`, `question` and `label` (0 or 1), as BoolQ's.

    Raises:
        CorpusUnavailable: The file is missing, or has other rows.
    """
    asked: dict[str, str] = {}  # several questions on a passage stand together, lest it be in both corpora
    for row in _rows(path, {"passage": str, "question": str, "label": int}):
        answer = "yes" if row["label"] else "no"
        asked[row["passage"]] = asked.get(row["passage"], "") + f"Question: {row['question']}?\nAnswer: {answer}\n"
    return _dealt(f"questions of {Path(path).name}", [f"{passage}\n{text}\n" for passage, text in asked.items()])


def _dealt(name: str, documents: Sequence[str]) -> Pair:
    return Corpus(f"{name}, even", tuple(documents[0::2])), Corpus(f"{name}, odd", tuple(documents[1::2]))


def _rows(path: str | os.PathLike, kinds: Mapping[str, type]) -> list[Mapping[str, Any]]:
    """JSON objects of a file, a line each, whose columns are of the types given."""
    file = Path(os.path.expanduser(path))
    with reading(file, "JSON lines", CorpusUnavailable):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in kinds.items())):
            expected = " and ".join(f"{name!r} ({kind.__name__})" for name, kind in kinds.items())
            raise CorpusUnavailable(f"{file}, row {number}: expected {expected}; got {str(row)[:80]}")
    return rows
