"""Refuses calibration text that holds pieces of the evaluation items.

The rule is that of GPT-3 (arXiv 2005.14165, appendix C), which lm-eval's decontamination follows: text and item clash
if they share 13 consecutive words, ignoring case, spacing and punctuation. GPT-3 lets the number of words sink to 8
for short items, because fewer collide by chance; so an item of 8 to 12 words clashes if all its words stand in the
text in a row, and an item of fewer words is not checked but counted.

Scripts without spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer, Yi, Javanese and the like) are read
character by character, and two characters count as a word: most words of Chinese and Japanese have two. Tibetan marks
its syllables, and each counts as a word. So 26 characters in a row clash; the names
of institutions, which any text may hold, have fewer. Marks and invisible characters are left out, and compatible forms
are equal (NFKD): accents composed or not, full-width letters, Thai with zero-width spaces or without.

Punctuation separates words, so that WikiText's `mid @-@ 1990s` and `it 's` equal `mid-1990s` and `it's`. WikiText's
`<unk>` becomes the word `unk`, which hides an overlap unless 13 words in a row are free of it.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rap_env.calibration.corpus import Corpus
from rap_env.errors import ContaminationFound

_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_SPACELESS += "\u1950-\u19df\u1a00-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"  # Dai, Buginese, Balinese, Javanese
_SPACELESS += "\u3005-\u3007\u3041-\u31ff\u3400-\u9fff\ua000-\ua4cf"  # Chinese, Japanese, Yi
_SPACELESS += "\U00017000-\U00018dff\U0001aff0-\U0001b2ff\U00020000-\U0003ffff"  # Tangut, more kana, rare Chinese
_UNIT = re.compile(rf"(?=\w)[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_CHARACTER = re.compile(f"[{_SPACELESS}]")
_LEFT_OUT = ("Mn", "Mc", "Me", "Cf")  # Unicode's categories of marks and of invisible characters
_WORD, _HALF_WORD = 2, 1  # what a unit is worth
_SHORTEST_ITEM_WORDS = 8
_SHOWN_OVERLAPS = 3

# worth of a run -> hash of its units -> (task, item) pairs in which they stand
_Index = dict[int, dict[int, list[tuple[str, int]]]]


@dataclass(frozen=True)
class Overlap:
    """The first words in a row that a document shares with an evaluation item.

    Attributes:
        document: Index of the calibration document.
        word: Index of the first shared word (in scripts without spaces: character) among the document's.
        task: Name of the task.
        item: Index of the item among the task's texts.
        words: The shared words or characters, normalised.
    """

    document: int
    word: int
    task: str
    item: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        shared = " ".join(self.words)
        return f"document {self.document} at word {self.word} and {self.task} item {self.item}: '{shared}'"


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
        units = _units(document)
        totals = _totals(units)
        first: dict[tuple[str, int], Overlap] = {}
        for worth, owners in index.items():
            for start, shared in enumerate(_runs(units, totals, worth)):
                for owner in owners.get(hash(shared), ()):
                    first.setdefault(owner, Overlap(number, start, *owner, shared))
        overlaps += sorted(first.values(), key=lambda overlap: (overlap.word, overlap.task, overlap.item))
    return overlaps


def count_unchecked(items: Mapping[str, Sequence[str]]) -> int:
    """How many items are too short to be found in a text: fewer than 8 words, or 16 characters without spaces."""
    worths = [int(_totals(_units(text))[-1]) for texts in items.values() for text in texts]
    return sum(worth < _WORD * _SHORTEST_ITEM_WORDS for worth in worths)


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


def normalised(text: str) -> str:
    """A text as all ways to write it have in common: compatible forms, case, invisible characters and spacing."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(one for one in folded if unicodedata.category(one) != "Cf").split())


def _units(text: str) -> list[str]:
    """A text's words, and its characters where the script has no spaces between words."""
    if text.isascii():
        return _UNIT.findall(text.casefold())
    folded = unicodedata.normalize("NFKD", text).casefold()  # in this order: compatible forms may be without a case
    return _UNIT.findall("".join(one for one in folded if unicodedata.category(one) not in _LEFT_OUT))


def _totals(units: Sequence[str]) -> np.ndarray:
    """What the units in front of each place are worth, [len(units) + 1]."""
    return np.cumsum([0, *(_HALF_WORD if _CHARACTER.match(unit) else _WORD for unit in units)])


def _runs(units: Sequence[str], totals: np.ndarray, worth: int) -> Iterator[tuple[str, ...]]:
    """From each unit on, the shortest run that is worth so much, as long as there is one."""
    ends = np.searchsorted(totals, totals[:-1] + worth)
    yield from (tuple(units[start:end]) for start, end in enumerate(ends.tolist()) if end <= len(units))


def _index_items(items: Mapping[str, Sequence[str]], n: int) -> _Index:
    """Hashes only, not words: that halves the memory, and a false hit has a chance of 1e-7 on a million words."""
    index: _Index = defaultdict(lambda: defaultdict(list))
    for task, texts in items.items():
        for item, text in enumerate(texts):
            units = _units(text)
            totals = _totals(units)
            worth = min(_WORD * n, int(totals[-1]))
            if worth >= _WORD * min(n, _SHORTEST_ITEM_WORDS):
                for run in _runs(units, totals, worth):
                    index[worth][hash(run)].append((task, item))
    return index
