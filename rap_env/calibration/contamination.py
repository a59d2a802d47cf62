"""Refuses calibration text that holds pieces of the evaluation items.

The rule is that of GPT-3 (arXiv 2005.14165, appendix C), which lm-eval's decontamination follows: text and item clash
if they share 13 consecutive words, ignoring case, spacing and punctuation. GPT-3 lets the number of words sink to 8
for short items, because fewer collide by chance; so an item of 8 to 12 words clashes if all its words stand in the
text in a row, and an item of fewer words is not checked.

Punctuation separates words, so that WikiText's `mid @-@ 1990s` and `it 's` equal `mid-1990s` and `it's`. WikiText's
`<unk>` becomes the word `unk`, which hides an overlap unless 13 words in a row are free of it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rap_env.calibration.corpus import Corpus
from rap_env.errors import ContaminationFound

_WORD = re.compile(r"[^\W_]+")
_SHORTEST_ITEM_WORDS = 8
_SHOWN_OVERLAPS = 3

# words in a row -> hash of those words -> (task, item) pairs in which they stand
_Index = dict[int, dict[int, list[tuple[str, int]]]]


@dataclass(frozen=True)
class Overlap:
    """The first words in a row that a document shares with an evaluation item.

    Attributes:
        document: Index of the calibration document.
        word: Index of the first shared word among the document's words.
        task: Name of the task.
        item: Index of the item in the task.
        words: The shared words, normalised.
    """

    document: int
    word: int
    task: str
    item: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"document {self.document} at word {self.word} and {self.task} item {self.item}: '{' '.join(self.words)}'"
        )


def find_overlaps(documents: Iterable[str], items: Mapping[str, Sequence[str]], n: int = 13) -> list[Overlap]:
    """Finds the evaluation items that share words with calibration documents.

    Args:
        documents: Calibration texts.
        items: Task name -> texts of its items.
        n: Words in a row that make an overlap.

    Returns:
        One overlap for each pair of document and item that clash, in the order of the text.
    """
    index = _index_items(items, n)
    overlaps = []
    for number, document in enumerate(documents):
        words = _words(document)
        first: dict[tuple[str, int], Overlap] = {}
        for length, owners in index.items():
            for start, shared in enumerate(_runs(words, length)):
                for owner in owners.get(hash(shared), ()):
                    first.setdefault(owner, Overlap(number, start, *owner, shared))
        overlaps += sorted(first.values(), key=lambda overlap: (overlap.word, overlap.task, overlap.item))
    return overlaps


def refuse_contamination(corpus: Corpus, items: Mapping[str, Sequence[str]]) -> None:
    """Passes clean text and raises on any other.

    Args:
        corpus: Calibration text.
        items: Task name -> texts of its items, those that results are reported on.

    Raises:
        ContaminationFound: A document shares 13 words in a row with an item.
    """
    overlaps = find_overlaps(corpus.documents, items)
    if overlaps:
        shown = "; ".join(str(overlap) for overlap in overlaps[:_SHOWN_OVERLAPS])
        more = f"; and {len(overlaps) - _SHOWN_OVERLAPS} more" if len(overlaps) > _SHOWN_OVERLAPS else ""
        raise ContaminationFound(
            f"calibration corpus {corpus.name!r} overlaps with {len(overlaps)} evaluation items: {shown}{more}."
            " Calibrate on another text, or on text without these documents"
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[offset:] for offset in range(length)), strict=False)


def _index_items(items: Mapping[str, Sequence[str]], n: int) -> _Index:
    """Hashes only, not words: that halves the memory, and a false hit has a chance of 1e-7 on a million words."""
    index: _Index = defaultdict(lambda: defaultdict(list))
    for task, texts in items.items():
        for item, text in enumerate(texts):
            words = _words(text)
            length = min(n, len(words))
            if length >= min(n, _SHORTEST_ITEM_WORDS):
                for run in _runs(words, length):
                    index[length][hash(run)].append((task, item))
    return index
