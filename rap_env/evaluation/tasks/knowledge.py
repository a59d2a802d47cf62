"""Knowledge: the fact tables asked about in a short sentence, with answers of other facts as distractors."""

import random
from collections.abc import Callable, Sequence

from rap_env.evaluation.tasks import facts
from rap_env.evaluation.tasks.splits import Item, as_task, make_item, take_half

DISTRACTORS = 3


def _ask(
    rows: Sequence[tuple[str, str]], template: str, closeness: Callable[[str, str], int] | None = None
) -> list[Item]:
    """Makes an item of each row.

    Args:
        rows: Key and answer of each fact; the other answers are the distractors.
        template: The question, with `{key}`, or `{a_key}` for the key after its article.
        closeness: How much a distractor resembles the answer to a key; the closest are taken. None draws them.
    """
    rng = random.Random(template)
    items = []
    for position, (key, answer) in enumerate(rows):
        others = sorted({other for _, other in rows} - {answer})
        rng.shuffle(others)
        if closeness is not None:
            others.sort(key=lambda other: -closeness(key, other))
        article = "an" if key[0] in "aeiou" else "a"
        question = template.format(key=key, a_key=f"{article} {key}")
        question = question[0].upper() + question[1:]
        items.append(make_item(question, answer, others[:DISTRACTORS], (key,), position))
    return items


@as_task
def capitals(half: str) -> list[Item]:
    """Capitals of countries and states, and the other way round."""
    to_capital = take_half(facts.SHORT_CAPITALS, half, "short capitals")
    to_country = take_half(facts.LONG_CAPITALS, half, "long capitals")
    from_capital = [(capital, country) for country, capital in to_capital]
    return [
        *_ask(to_capital, "The capital of {key} is"),
        *_ask([*from_capital, *to_country], "{key} is the capital of"),
    ]


@as_task
def elements(half: str) -> list[Item]:
    """Chemical symbols, among symbols that start like the element's name where there are any."""

    def same_initial(name: str, symbol: str) -> int:
        return name[0].upper() == symbol[0]

    rows = take_half(facts.ELEMENT_SYMBOLS, half, "elements")
    templates = ("The chemical symbol for {key} is", "Element: {key}. Symbol:")
    return [item for template in templates for item in _ask(rows, template, same_initial)]


@as_task
def opposites(half: str) -> list[Item]:
    """Words of opposite meaning."""
    return _ask(take_half(facts.OPPOSITES, half, "opposites"), "The opposite of {key} is")


@as_task
def properties(half: str) -> list[Item]:
    """Everyday things: what they are for, of, on, in, what color and what kind."""
    questions = (
        (facts.USES, "You can use {a_key} to"),
        (facts.WORKPLACES, "{a_key} usually works in a"),
        (facts.WORN_ON, "You wear {a_key} on your"),
        (facts.PARTS, "{a_key} is part of a"),
        (facts.COLORS, "The usual color of {key} is"),
        (facts.KINDS, "{a_key} is a kind of"),
    )
    return [item for rows, template in questions for item in _ask(take_half(rows, half, template), template)]
