"""What the subjects share: the item, the division of facts into two halves, and the form lm-eval reads."""

import functools
import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from datasets import Dataset

from rap_env.errors import UnknownName

HALVES = ("search", "report")
# Of the deals 0 to 4 the one whose halves are closest in mean accuracy for the dense SmolLM2-135M-Instruct; the others
# were 0.03 to 0.07 apart. Only whole deals were compared, never single items.
DEAL = 4

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


def take_half(rows: Sequence[Row], half: str, table: str) -> list[Row]:
    """Deals the rows in pairs of neighbours, one to each half.

    Fact tables are written from common to rare: neighbours are about equally hard, and so are the halves.

    Args:
        rows: Facts in the table's order; an odd last one goes to either half.
        half: "search" or "report".
        table: Names the table, whose deal is its own.

    Raises:
        UnknownName: There is no such half.
    """
    if half not in HALVES:
        raise UnknownName("half", half, HALVES)
    wanted = HALVES.index(half)
    rng = random.Random(f"{DEAL}{table}")
    taken = []
    for start in range(0, len(rows), 2):
        pair = list(rows[start : start + 2])
        flip = rng.randrange(2)
        if (wanted ^ flip) < len(pair):
            taken.append(pair[wanted ^ flip])
    return taken


def as_task(generate: Callable[..., list[Item]]) -> Callable[..., dict[str, Dataset]]:
    """Turns a generator of items into what a task YAML's `custom_dataset` calls with `dataset_kwargs`.

    The items are shuffled, so that the first few of a task, which a limit takes, are a sample of all its questions.
    """

    @functools.wraps(generate)
    def load(half: str, **given) -> dict[str, Dataset]:
        taken = inspect.signature(generate).parameters  # lm-eval also passes the YAML's metadata
        items = generate(half, **{name: value for name, value in given.items() if name in taken})
        random.Random(DEAL).shuffle(items)
        return {"validation": Dataset.from_list([asdict(item) for item in items])}

    return load
