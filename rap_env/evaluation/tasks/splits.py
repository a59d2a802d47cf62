"""What the subjects share: the item, the division of facts into two halves, and the form lm-eval reads."""

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from datasets import Dataset

HALVES = ("search", "report")

Row = TypeVar("Row")


@dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        question: The context that each choice continues after a space.
        choices: The continuations; all have as many tokens as one another.
        gold: Index of the right choice.
        facts: The words that the item asks about; no other half asks about them.
    """

    question: str
    choices: tuple[str, ...]
    gold: int
    facts: tuple[str, ...]


def make_item(question: str, answer: str, distractors: Sequence[str], facts: Iterable[str], position: int) -> Item:
    """Places the answer among the distractors; counting `position` up over a task spreads the gold answers evenly."""
    choices = list(distractors)
    gold = position % (len(choices) + 1)
    choices.insert(gold, answer)
    return Item(question, tuple(choices), gold, tuple(facts))


def take_half(rows: Sequence[Row], half: str, seed: str) -> list[Row]:
    """Deals the rows in pairs of neighbours, one to each half.

    The tables are written from common to rare, so neighbours are about equally hard and so are the halves.

    Args:
        rows: Facts in the table's order; an odd last one goes to either half.
        half: "search" or "report".
        seed: Names the deal; each table has its own.

    Raises:
        ValueError: There is no such half.
    """
    wanted = HALVES.index(half)
    rng = random.Random(seed)
    taken = []
    for start in range(0, len(rows), 2):
        pair = list(rows[start : start + 2])
        flip = rng.randrange(2)
        if (wanted ^ flip) < len(pair):
            taken.append(pair[wanted ^ flip])
    return taken


def as_task(generate: Callable[[str], list[Item]]) -> Callable[..., dict[str, Dataset]]:
    """Turns a generator of items into what a task YAML's `custom_dataset` calls with `dataset_kwargs`."""

    @functools.wraps(generate)
    def load(half: str, **_metadata) -> dict[str, Dataset]:  # lm-eval also passes the YAML's metadata
        return {"validation": Dataset.from_list([asdict(item) for item in generate(half)])}

    return load
