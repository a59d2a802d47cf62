"""What a list's scores are to be: by signals that need no training, and by the label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.rerank_training.rivals import Bm25, standardised
from rap_env.llm.sentences import encode_sentences


@dataclass(frozen=True)
class TeacherWeights:
    """What counts how much, in logits. Each signal is standardised over the list; one of weight 0 is not computed.

    Attributes:
        likelihood: Of the query's likelihood after each document, by the model without what is learned.
        bm25: Of BM25.
        encoder: Of the packaged sentence encoder's cosines.
        first: Added to the first document, which is the one to choose.
    """

    likelihood: float = 2.0
    bm25: float = 0.0
    encoder: float = 0.0
    first: float = 2.0


class Teacher:
    """Says what the softmax of a list's scores is to be.

    Args:
        weights: What counts how much.
        bm25: Over the collection; a list's texts need not be in it.
    """

    def __init__(self, weights: TeacherWeights, bm25: Bm25) -> None:
        self._weights, self._bm25 = weights, bm25
        self._vectors: dict[str, np.ndarray] = {}

    def shares(self, query: str, texts: Sequence[str], likelihoods: Sequence[float]) -> torch.Tensor:
        """The shares of the documents [N], float32.

        Args:
            query: Its text.
            texts: Of the documents, the one to choose first.
            likelihoods: Of the query after each document [N]; what they are is ignored where their weight is 0.
        """
        weights = self._weights
        logits = weights.likelihood * standardised(likelihoods) if weights.likelihood else np.zeros(len(texts))
        if weights.bm25:
            logits = logits + weights.bm25 * standardised(self._bm25.scores(query, texts))
        if weights.encoder:
            logits = logits + weights.encoder * standardised(self._cosines(query, texts))
        logits[0] += weights.first
        return torch.from_numpy(logits).float().softmax(0)

    def _cosines(self, query: str, texts: Sequence[str]) -> list[float]:
        new = [text for text in dict.fromkeys([query, *texts]) if text not in self._vectors]
        if new:
            self._vectors |= dict(zip(new, encode_sentences(new), strict=True))
        return [float(self._vectors[query] @ self._vectors[text]) for text in texts]
