"""Records the score paths of a reranker."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rap_env.rerank.paths import ScorePaths


class Request(NamedTuple):
    """One to record.

    Attributes:
        name: Of the query.
        query: Its text.
        documents: Texts of the candidates.
        grades: Relevance of each of them, NaN where it is not known; None for none.
    """

    name: str
    query: str
    documents: Sequence[str]
    grades: Sequence[float] | None = None


class Recordable(Protocol):
    """What paths are recorded of: a `Reranker`."""

    def score_path(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """See `Reranker.score_path`."""

    def similarities(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """See `Reranker.similarities`."""

    def token_counts(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """See `Reranker.token_counts`."""


def record_paths(
    reranker: Recordable,
    requests: Iterable[Request],
    provenance: Mapping[str, Any],
    progress: Callable[[int], None] = lambda n_done: None,
) -> ScorePaths:
    """Reads every candidate of some requests with all layers.

    Args:
        reranker: That scores.
        requests: At least one.
        provenance: JSON values that say which model, documents and settings these are.
        progress: Is told how many requests were read.

    Raises:
        RankingFailed: As `Reranker.score_path`.
        PathsUnreadable: As `ScorePaths`.
    """
    columns: tuple[list, ...] = ([], [], [], [], [])
    for n_done, (name, query, documents, grades) in enumerate(requests, 1):
        unknown = np.full(len(documents), np.nan)
        row = (
            name,
            reranker.score_path(query, documents),
            reranker.token_counts(query, documents),
            unknown if grades is None else np.asarray(grades, float),
            reranker.similarities(query, documents),
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        progress(n_done)
    *described, similarities = map(tuple, columns)
    return ScorePaths(*described, provenance, similarities)
