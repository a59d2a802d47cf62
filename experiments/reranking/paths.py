"""Scores after every layer, for the thresholds, for the full model's order and for the picture; kept in files."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reranking.process import Process
from rap_env.errors import RecordUnreadable
from rap_env.files import write_over
from rap_env.reading import reading


def paths_of(
    numbers: Sequence[int],
    n_candidates: int,
    start: Callable[[], Process],
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[int, Mapping[str, Any]]:
    """Scores of requests after every layer, from files where they are there.

    Args:
        numbers: Of the requests.
        n_candidates: Documents of each. A document's scores don't depend on the others, so the first columns are what
            a request of fewer documents has.
        start: Starts a process that reads all documents with all layers.
        folder: For the files, one for each request.
        progress: Is told how many are done, and how many there are.

    Returns:
        By number, `path` [layers, n] and `tokens` [n] of the documents.

    Raises:
        RecordUnreadable: A file is damaged: remove it, and it is measured again.
    """
    folder.mkdir(exist_ok=True)
    files = {number: folder / f"{number}.json" for number in numbers}
    missing = [number for number, file in files.items() if not file.exists()]
    if missing:
        with contextlib.closing(start()) as process:
            for done, number in enumerate(missing, 1):
                write_over(files[number], json.dumps(process.path(number, n_candidates)))
                progress(done, len(missing))
    return {number: _read(file) for number, file in files.items()}


def _read(file: Path) -> Mapping[str, Any]:
    with reading(file, "scores after every layer", RecordUnreadable):
        found = json.loads(file.read_text(encoding="utf-8"))
        path = np.array(found["path"], dtype=float)
        if path.ndim != 2 or path.shape[1:] != np.shape(found["tokens"]) or not np.isfinite(path).all():
            raise ValueError("expected finite scores [layers, n], and tokens [n]")
        return found | {"path": path}
