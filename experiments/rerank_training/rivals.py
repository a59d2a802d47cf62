"""Rankings that need no training: BM25, the packaged sentence encoder, and sums of standardised scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log

import bm25s
import numpy as np

from rap_env.llm.sentences import encode_sentences

Scores = Mapping[str, float]  # of documents, by their names
_K1, _B = 1.5, 0.75


class Bm25:
    """BM25 as bm25s computes it by default (Lucene's form, k1 1.5, b 0.75), English stop words, no stemming.

    Args:
        texts: By document.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._names = list(texts)
        words = _words(list(texts.values()))
        self._index = bm25s.BM25(k1=_K1, b=_B)
        self._index.index(words, show_progress=False)
        self._mean_words = float(np.mean([len(each) for each in words.ids]))
        spelled = {index: word for word, index in words.vocab.items()}
        self._frequencies = Counter(spelled[index] for each in words.ids for index in set(each))

    def best(self, query: str, n_documents: int) -> dict[str, float]:
        """The documents with the highest scores above 0, best first."""
        n_documents = min(n_documents, len(self._names))
        found, scores = self._index.retrieve(_words([query]), k=n_documents, show_progress=False, leave_progress=False)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return {self._names[index]: score for index, score in pairs if score > 0}

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """Scores of texts that need not be among the documents; how rare a word is, the documents say."""
        asked = _spelled(query)
        return [self._score(asked, Counter(_spelled(text))) for text in texts]

    def _score(self, asked: Sequence[str], counts: Counter) -> float:
        length = _K1 * (1 - _B + _B * counts.total() / self._mean_words)
        return sum(self._rarity(word) * counts[word] / (counts[word] + length) for word in asked if counts[word])

    def _rarity(self, word: str) -> float:
        frequency = self._frequencies[word]
        return log(1 + (len(self._names) - frequency + 0.5) / (frequency + 0.5))


def _words(texts: Sequence[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(list(texts), stopwords="en", show_progress=False)


def _spelled(text: str) -> list[str]:
    return bm25s.tokenize([text], stopwords="en", show_progress=False, return_ids=False)[0]


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
    return summed((first, second), (1 - second_weight, second_weight))


def summed(scores: Sequence[Scores], weights: Sequence[float]) -> dict[str, float]:
    """The same of any number of scorers."""
    names = list(scores[0])
    parts = [
        weight * standardised([each[name] for name in names]) for each, weight in zip(scores, weights, strict=True)
    ]
    return dict(zip(names, np.sum(parts, axis=0).tolist(), strict=True))


def standardised(values: Sequence[float]) -> np.ndarray:
    """Values less their mean, over their standard deviation; zeros where they are equal."""
    centred = np.asarray(values) - np.mean(values)
    return centred / (centred.std() or 1.0)
