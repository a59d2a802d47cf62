"""Rankings that need no training: BM25, the packaged sentence encoder, and sums of standardised scores."""

from collections.abc import Mapping, Sequence

import bm25s
import numpy as np

from rap_env.llm.sentences import encode_sentences

Scores = Mapping[str, float]  # of documents, by their names


class Bm25:
    """BM25 as bm25s computes it by default (Lucene's form, k1 1.5, b 0.75), English stop words, no stemming.

    Args:
        texts: By document.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._names = list(texts)
        self._index = bm25s.BM25()
        self._index.index(_words(list(texts.values())), show_progress=False)

    def best(self, query: str, n_documents: int) -> dict[str, float]:
        """The documents with the highest scores above 0, best first."""
        n_documents = min(n_documents, len(self._names))
        found, scores = self._index.retrieve(_words([query]), k=n_documents, show_progress=False, leave_progress=False)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return {self._names[index]: score for index, score in pairs if score > 0}


def _words(texts: Sequence[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)


def encoder_scores(
    queries: Mapping[str, str], candidates: Mapping[str, Scores], texts: Mapping[str, str]
) -> dict[str, Scores]:
    """Cosines of the packaged sentence encoder, which reads the first 256 tokens of a text.

    Args:
        queries: Texts by query.
        candidates: Documents by query.
        texts: By document.
    """
    needed = sorted({name for names in candidates.values() for name in names})
    rows = dict(zip(needed, encode_sentences([texts[name] for name in needed]), strict=True))
    vectors = dict(zip(queries, encode_sentences(list(queries.values())), strict=True))
    return {query: {name: float(vectors[query] @ rows[name]) for name in names} for query, names in candidates.items()}


def fused(first: Scores, second: Scores, second_weight: float) -> dict[str, float]:
    """Weighted sums of two scorers' scores for the same documents, each standardised over these documents."""
    names = list(first)
    sums = (1 - second_weight) * _standardised([first[name] for name in names])
    sums = sums + second_weight * _standardised([second[name] for name in names])
    return dict(zip(names, sums.tolist(), strict=True))


def _standardised(values: Sequence[float]) -> np.ndarray:
    centred = np.asarray(values) - np.mean(values)
    return centred / (centred.std() or 1.0)
