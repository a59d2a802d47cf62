"""Queries made from the corpus itself: a title, or a sentence, asks for the document that it was taken from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.rerank_training.data import Document

_SENTENCE_END = re.compile(r"\s\.\s+")  # as this collection is written; "no. 3" and "3.5" go on
_SENTENCE_WORDS = range(8, 31)
_LEAST_WORDS_LEFT = 30


@dataclass(frozen=True)
class PseudoQuery:
    """A text from a document, and what is left of the document without it.

    Attributes:
        kind: `title` or `sentence`.
        text: The query.
        source: The document's name.
        rest: The document without the query, so that equal words alone don't give it away.
    """

    kind: str
    text: str
    source: str
    rest: str


def pseudo_queries(documents: Mapping[str, Document], seed: int) -> list[PseudoQuery]:
    """The title of each document, and one sentence of it drawn by chance, where enough text is left without them."""
    rng = np.random.default_rng([seed, 1])
    made = []
    for name, document in documents.items():
        made.append(PseudoQuery("title", document.title, name, document.body))
        sentences = [each for each in _SENTENCE_END.split(document.body) if len(each.split()) in _SENTENCE_WORDS]
        if sentences:
            sentence = sentences[rng.integers(len(sentences))]
            rest = Document(document.title, document.body.replace(sentence, " ", 1)).text
            made.append(PseudoQuery("sentence", sentence, name, rest))
    return [each for each in made if each.text and len(each.rest.split()) >= _LEAST_WORDS_LEFT]
