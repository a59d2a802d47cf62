"""What rerankers are asked: queries with the documents that BM25 finds, and a small collection made from text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.rerank_training.data import Collection, Document
from experiments.rerank_training.rivals import Bm25
from rap_env.calibration.corpus import packaged_corpus
from rap_env.errors import InvalidConfig

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_QUERY_WORDS = range(7, 31)
_PASSAGE_WORDS = 60
_LEAST_WORDS_LEFT = 30


@dataclass(frozen=True)
class Request:
    """A query and its candidates.

    Attributes:
        name: The query's name in its collection.
        query: Its text.
        documents: Texts by document, BM25's best first.
    """

    name: str
    query: str
    documents: dict[str, str]


def packaged_collection(seed: int) -> Collection:
    """A collection made from the text that ships with the package: it needs no file, and is small and easy.

    The texts are cut into passages of about 60 words. A query is a sentence that was taken out of a passage; that
    passage, without the sentence, is relevant with grade 2, the others of the same text with grade 1.

    Args:
        seed: Of the draw of sentences.
    """
    rng = np.random.default_rng([seed, 2])
    documents, queries, grades = {}, {}, {}
    texts = [text for name in ("calibration", "evaluation") for text in packaged_corpus(name).documents]
    for number, text in enumerate(texts):
        passages = {f"{number}.{place}": sentences for place, sentences in enumerate(_passages(text))}
        for name, sentences in passages.items():
            query, rest = _parted(sentences, rng)
            documents[name] = Document("", " ".join(rest))
            if query is not None:
                queries[name], grades[name] = query, {each: 2 if each == name else 1 for each in passages}
    return Collection(documents, queries, grades)


def _parted(sentences: list[str], rng: np.random.Generator) -> tuple[str | None, list[str]]:
    """A sentence and the others; none where too little would be left."""
    askable = [place for place, each in enumerate(sentences) if len(each.split()) in _QUERY_WORDS]
    if askable:
        taken = askable[rng.integers(len(askable))]
        rest = sentences[:taken] + sentences[taken + 1 :]
        if sum(len(each.split()) for each in rest) >= _LEAST_WORDS_LEFT:
            return sentences[taken], rest
    return None, sentences


def _passages(text: str) -> list[list[str]]:
    """A text's sentences in groups; a short last group goes with the one in front of it."""
    passages: list[list[str]] = [[]]
    for sentence in filter(None, (each.strip() for each in _SENTENCE_END.split(text))):
        if sum(len(each.split()) for each in passages[-1]) >= _PASSAGE_WORDS:
            passages.append([])
        passages[-1].append(sentence)
    if len(passages) > 1 and sum(len(each.split()) for each in passages[-1]) < _LEAST_WORDS_LEFT:
        passages[-2:] = [passages[-2] + passages[-1]]
    return passages


def requests_of(collection: Collection, queries: Sequence[str], n_candidates: int) -> list[Request]:
    """The requests of some queries.

    Where BM25 finds fewer documents, the first others of the collection fill the places, so that all requests are of
    one size.

    Args:
        collection: Documents and queries.
        queries: Names.
        n_candidates: Documents of each request.

    Raises:
        InvalidConfig: The collection has fewer documents.
    """
    texts = {name: document.text for name, document in collection.documents.items() if document.text}
    if len(texts) < n_candidates:
        raise InvalidConfig(f"candidates: expected at most the {len(texts)} documents there are; got {n_candidates}")
    bm25 = Bm25(texts)
    return [_request(name, collection.queries[name], texts, bm25, n_candidates) for name in queries]


def _request(name: str, query: str, texts: Mapping[str, str], bm25: Bm25, n_candidates: int) -> Request:
    found = list(bm25.best(query, n_candidates))
    others = [each for each in texts if each not in set(found)]
    return Request(name, query, {each: texts[each] for each in (found + others)[:n_candidates]})
