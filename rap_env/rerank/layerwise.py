"""What rerankers share that read all documents of a request layer by layer, whatever model reads them."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rap_env.errors import RankingFailed
from rap_env.rerank.selection import Decider, Ranking, Selection
from rap_env.rerank.similarity import SimilarityExit, among


class Reading(Protocol):
    """The documents of a request between two layers."""

    def keep(self, ids: Sequence[int]) -> None:
        """Reads on only these of the documents that are still read; takes numbers, ascending."""


class LayerwiseReranker:
    """Ranks documents by scores after the last layer; with a decider, some of them leave after earlier ones.

    Threads may share a reranker; their requests are answered one after another.

    Args:
        decider: After which layer who leaves, or who is not read at all; None reads every document with all layers.
    """

    def __init__(self, decider: Decider | SimilarityExit | None) -> None:
        self.decider = decider
        self._lock = threading.Lock()

    @property
    def n_layers(self) -> int:
        raise NotImplementedError

    def _read(self, query: str, documents: Sequence[str]) -> Iterator[tuple[int, Any]]:
        """The documents after each layer, as a `Reading`."""
        raise NotImplementedError

    def _scores(self, reading: Any) -> np.ndarray:
        """Scores of the documents that are still read, in the order of their numbers [n]."""
        raise NotImplementedError

    def similarities(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Of each document to the query before any layer is run [n], for a `SimilarityExit`."""
        raise NotImplementedError

    def rank(
        self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """Ranks documents, in the form of `sentence_transformers.CrossEncoder.rank`.

        Args:
            query: What is asked for.
            documents: Any number, empty ones too.
            top_k: How many are returned; None for all.
            return_documents: Whether the documents are returned as well.

        Returns:
            For each of the best documents, the best first, `corpus_id` (its place in `documents`), `score` and, if
            asked for, `text`. Equal scores keep the order of the documents. Where a decider selects documents early,
            the order is that of selection first, and scores are those of the layer that a document has left after.

        Raises:
            RankingFailed: The request has another form, the query has no room in the model's context, or a score is
                not a finite number. Later requests are answered.
            WeightsUnavailable: Weights that are not in memory can't be read; requests are answered again once they can.
        """
        ranking = self.ranking(query, documents, top_k)
        return [
            {"corpus_id": index, "score": ranking.scores[index]}
            | ({"text": documents[index]} if return_documents else {})
            for index in ranking.ids
        ]

    @torch.inference_mode()
    def ranking(self, query: str, documents: Sequence[str], top_k: int | None = None) -> Ranking:
        """As `rank`, with the scores of all documents and how many layers read each of them."""
        check_request(query, documents, top_k)
        if not documents:
            return Ranking((), (), ())
        with self._lock:
            kept, decider = list(range(len(documents))), self.decider
            if isinstance(decider, SimilarityExit):
                kept, decider = decider.kept(self.similarities(query, documents), top_k), decider.decider
            read = [documents[number] for number in kept]
            return among(self._ranking(query, read, top_k, decider), kept, len(documents))

    def _ranking(self, query: str, documents: Sequence[str], top_k: int | None, decider: Decider | None) -> Ranking:
        selection = Selection(len(documents), top_k, self.n_layers, decider)
        with contextlib.closing(self._read(query, documents)) as reading:
            for layer, left in reading:
                selection.after(layer, self._scores(left) if selection.needs_scores(layer) else None)
                if not selection.active:
                    break
                left.keep(selection.active)
        return selection.ranking

    @torch.inference_mode()
    def score_path(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Scores of all documents after every layer [layers, n], of which `replay` makes rankings without the model.

        Raises:
            RankingFailed: As `rank`; also without documents.
        """
        check_request(query, documents, None)
        if not documents:
            raise RankingFailed("expected at least 1 document; got none")
        with self._lock, contextlib.closing(self._read(query, documents)) as reading:
            return np.stack([self._scores(left) for _layer, left in reading])


def check_request(query: str, documents: Sequence[str], top_k: int | None) -> None:
    """Refuses requests of another form; raises `RankingFailed`."""
    if not isinstance(query, str):
        raise RankingFailed(f"expected a query of type str; got {type(query).__name__}")
    if isinstance(documents, str) or not all(isinstance(document, str) for document in documents):
        raise RankingFailed("expected a list of documents of type str")
    if top_k is not None and top_k < 1:
        raise RankingFailed(f"expected top_k of at least 1, or None; got {top_k}")
