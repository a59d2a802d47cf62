"""Score paths: what a reranker's scores were after every layer, recorded once, to decide on again without the model."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import PathsUnreadable
from rap_env.files import write_once
from rap_env.reading import reading, unpacked_arrays

_FORM = 2
_WITHOUT_SIMILARITIES = 1  # an earlier form, which is read too
_DTYPES = {
    "form": "int64",
    "counts": "int64",
    "scores": "float64",
    "tokens": "int64",
    "grades": "float64",
    "similarities": "float64",
    "names": "uint8",
    "provenance": "uint8",
}


@dataclass(frozen=True)
class ScorePaths:
    """Of many queries, by the same model.

    Attributes:
        queries: A name for each query.
        scores: Of all candidates of each query after every layer, each [layers, n].
        tokens: Of each candidate with what follows it in the prompt, without what all share in front, each [n].
        grades: Relevance of each candidate, higher is better, NaN where it is not known, each [n].
        provenance: Where they come from: JSON values.
        similarities: Of each candidate's input embedding to the query's, each [n], see `Reranker.similarities`; empty
            where they were not recorded.

    Raises:
        PathsUnreadable: Something has another shape, a name comes twice, or a score is not a finite number.
    """

    queries: tuple[str, ...]
    scores: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    grades: tuple[np.ndarray, ...]
    provenance: Mapping[str, Any]
    similarities: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if not self.queries or len(set(self.queries)) < len(self.queries):
            raise PathsUnreadable("queries: expected at least one, and a name of its own for each")
        if not len(self.queries) == len(self.scores) == len(self.tokens) == len(self.grades):
            raise PathsUnreadable("expected scores, tokens and grades for each query")
        for name, scores, tokens, grades in zip(self.queries, self.scores, self.tokens, self.grades, strict=True):
            if scores.ndim != 2 or len(scores) != len(self.scores[0]) or len(scores) < 2 or not scores.shape[1]:
                raise PathsUnreadable(
                    f"query {name!r}: expected scores [layers, n] of candidates after as many layers as others have,"
                    f" at least two; got {list(scores.shape)}"
                )
            if tokens.shape != grades.shape or tokens.shape != scores.shape[1:]:
                raise PathsUnreadable(f"query {name!r}: expected tokens and grades for each candidate")
            if not np.isfinite(scores).all() or not (tokens > 0).all():
                raise PathsUnreadable(f"query {name!r}: expected finite scores, and at least one token each")
        known = [(len(own), bool(np.isfinite(own).all())) for own in self.similarities]
        if known and known != [(len(tokens), True) for tokens in self.tokens]:
            raise PathsUnreadable("similarities: expected a finite one of each candidate, or none at all")

    @property
    def n_layers(self) -> int:
        return len(self.scores[0])

    def part(self, queries: Sequence[str]) -> "ScorePaths":
        """The paths of some queries, in their order."""
        places = [self.queries.index(name) for name in queries]
        columns = (tuple(column[place] for place in places) for column in (self.scores, self.tokens, self.grades))
        similarities = tuple(self.similarities[place] for place in places if self.similarities)
        return ScorePaths(tuple(queries), *columns, self.provenance, similarities)

    def first(self, n: int) -> "ScorePaths":
        """The paths of the first n candidates of each query; a candidate's scores don't depend on the others."""
        columns = (tuple(own[..., :n] for own in column) for column in (self.scores, self.tokens, self.grades))
        return ScorePaths(self.queries, *columns, self.provenance, tuple(own[:n] for own in self.similarities))

    def spreads(self) -> np.ndarray:
        """The usual spread of scores after each layer [layers]: the median over queries of the standard deviation.

        Where scores do not differ at all it is 1.
        """
        usual = np.median([scores.std(axis=1) for scores in self.scores], axis=0)
        return np.where(usual > 0, usual, 1.0)

    def save(self, path: str | Path) -> Path:
        """Writes an .npz file of numeric arrays, which must not exist yet; it is returned.

        Raises:
            FileExistsError: There is a file already.
        """
        arrays = {
            "form": np.array(_FORM),
            "counts": np.array([scores.shape[1] for scores in self.scores]),
            "scores": np.concatenate(self.scores, axis=1),
            "tokens": np.concatenate(self.tokens),
            "grades": np.concatenate(self.grades),
            "similarities": np.concatenate([*self.similarities, np.zeros(0)]),
            "names": _encoded(list(self.queries)),
            "provenance": _encoded(dict(self.provenance)),
        }
        file = io.BytesIO()
        np.savez_compressed(file, **{name: array.astype(_DTYPES[name]) for name, array in arrays.items()})
        return write_once(Path(path), file.getvalue())

    @staticmethod
    def load(path: str | Path) -> "ScorePaths":
        """Reads such a file; nothing in it is run.

        Raises:
            FileNotFoundError: There is no such file.
            PathsUnreadable: The file is damaged, or holds something else.
        """
        content = Path(path).read_bytes()
        with reading(path, "an .npz file of score paths", PathsUnreadable):
            arrays = _arrays(content)
            if arrays["form"] not in (_WITHOUT_SIMILARITIES, _FORM):
                raise PathsUnreadable(f"expected form {_WITHOUT_SIMILARITIES} or {_FORM}; got {arrays['form']}")
            counts = arrays["counts"].tolist()
            n_candidates = arrays["scores"].shape[-1]
            if min(counts, default=0) < 1 or sum(counts) != n_candidates:
                raise PathsUnreadable(f"expected scores of {sum(counts)} candidates; got {n_candidates}")
            ends = list(pairwise(accumulate(counts, initial=0)))
            columns = [
                tuple(arrays[name][..., first:end] for first, end in ends) for name in ("scores", "tokens", "grades")
            ]
            of_all = arrays["similarities"]
            similarities = tuple(of_all[first:end] for first, end in ends) if of_all.size else ()
            return ScorePaths(tuple(_decoded(arrays["names"])), *columns, _decoded(arrays["provenance"]), similarities)


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    arrays = unpacked_arrays(content)
    if arrays["form"] == _WITHOUT_SIMILARITIES:
        arrays["similarities"] = np.zeros(0)
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype:
            raise PathsUnreadable(f"expected {name} of type {dtype}; got {arrays[name].dtype}")
    return arrays


def _encoded(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), np.uint8)


def _decoded(array: np.ndarray) -> Any:
    return json.loads(array.tobytes().decode())
