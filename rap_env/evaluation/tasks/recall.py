"""Recall: a fact is stated early in a text, asked for at its end, and facts of the same form stand between.

Nothing but the text tells the answer, all choices occur in it equally often, and each is stated of something else: who
answers has to find the one sentence again that names what is asked for.
"""

import random

from rap_env.evaluation.tasks.grammar import MEN, THINGS, WOMEN, words
from rap_env.evaluation.tasks.splits import DEAL, Item, as_task, make_item, take_half

ITEMS = 64
FACTS = 4  # stated in a text; the choices are their places
_EARLY = 8  # the fact that is asked for stands in the first of so many parts of the text
# Of SmolLM2's, as are the names of the tasks: a sentence of the filler, and all that an item has beside it.
_SENTENCE_TOKENS, _OTHER_TOKENS = 8.5, 38

PLACES = words("""
    kitchen garden garage library office bedroom basement attic hall barn tower station school church hotel museum
    factory theater hospital bank
""")
_NAMES = [name for name in (*WOMEN, *MEN) if name.istitle()]
_THINGS = [thing for thing in THINGS if thing not in PLACES]
_ADJECTIVES = words("old small red dark heavy broken clean blue wooden empty long quiet warm cheap new round")
_FILLERS = (
    *("The {adjective} {one} stood near the {other}.", "A {adjective} {one} was behind the {other}."),
    *("They saw the {adjective} {one} and a {other}.", "The {one} was as {adjective} as the {other}."),
    *("We looked at the {one} beside the {other}.", "Later the {adjective} {one} was gone again."),
)


@as_task
def recall(half: str, tokens: int) -> list[Item]:
    """Items of about so many tokens: "Anna keeps the camera in the garage. [...] Anna keeps the camera in the".

    Args:
        half: Both halves have people, things and places of their own.
        tokens: Length of an item in tokens of SmolLM2; from 80.
    """
    rng = random.Random(f"{DEAL}recall {half} {tokens}")
    names, things, places, adjectives = (
        take_half(table, half, f"recall {name}")
        for name, table in (("names", _NAMES), ("things", _THINGS), ("places", PLACES), ("adjectives", _ADJECTIVES))
    )
    n_fillers = max(FACTS, round((tokens - _OTHER_TOKENS) / _SENTENCE_TOKENS))
    items = []
    for position in range(ITEMS):
        sentences = []
        for _sentence in range(n_fillers):
            one, other = rng.sample(things, 2)
            sentences.append(rng.choice(_FILLERS).format(adjective=rng.choice(adjectives), one=one, other=other))
        people, kept, stored = (rng.sample(table, FACTS) for table in (names, things, places))
        facts = [f"{who} keeps the {what} in the" for who, what in zip(people, kept, strict=True)]
        early = 1 + n_fillers // _EARLY
        where = [rng.randrange(early), *(rng.randrange(early, n_fillers + 1) for _fact in facts[1:])]
        # From the end, so that the places in front stay where they are.
        for place, fact, answer in sorted(zip(where, facts, stored, strict=True), reverse=True):
            sentences.insert(place, f"{fact} {answer}.")
        context = " ".join([*sentences, facts[0]])
        items.append(make_item(context, stored[0], stored[1:], (people[0], kept[0], stored[0]), position))
    return items
