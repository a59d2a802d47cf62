"""Grammar: which verb agrees with a noun that another noun stands beside, and which reflexive refers to a subject."""

from rap_env.evaluation.tasks.splits import Item, as_task, make_item, take_half


def words(text: str) -> list[str]:
    """The words of a list that is written as text."""
    return text.split()


THINGS = words("""
    key table door window bridge river carpet box picture wall road village garden room house tree song film island
    book painting rock tower city apple basket machine factory lamp desk bottle shop clock street wagon mountain
    cloud plate coat chair engine truck mine hill barn report novel museum ticket camera button pencil kettle bucket
    bell candle curtain jacket tunnel statue farm medal poster valley lake ribbon helicopter fence mirror pillow
    blanket computer cup map cake flag
""")
PEOPLE = words("""
    student farmer soldier child hunter lawyer singer customer visitor neighbor officer manager worker patient nurse
    captain dancer writer painter driver engineer prisoner tourist reporter
""")
PRESENT_AND_PAST = (("is", "are"), ("was", "were"), ("has", "have"))  # singular, plural
# With one of the things between the subject and its verb, or one of the people.
THING_TEMPLATES = ("The {head} near the {other}", "The {head} behind the {other}", "The {head} beside the {other}")
PERSON_TEMPLATES = ("The {head} that the {other} liked", "The {head} seen by the {other}")

MEN = words("""
    king boy father uncle husband prince son brother man grandfather nephew steward monk gentleman hero duke lord
    widower groom wizard emperor policeman salesman cowboy Mark David John Robert Peter Thomas James Michael Richard
    George Daniel Henry William Edward Charles Philip Martin Andrew
""")
WOMEN = words("""
    queen girl mother aunt wife princess daughter sister woman grandmother niece stewardess nun lady heroine duchess
    goddess widow bride witch empress policewoman actress housewife Susan Mary Emily Linda Jessica Sarah Anna Laura
    Helen Alice Julia Emma Karen Margaret Elizabeth Rachel Barbara Nancy
""")
TRANSITIVE_VERBS = words("""
    admired blamed saw praised trusted defended introduced taught asked convinced helped found washed dressed
    enjoyed promised hid described
""")
REFLEXIVES = ("himself", "herself", "themselves")

_IRREGULAR_PLURALS = {"child": "children", "wife": "wives", "housewife": "housewives", "hero": "heroes"}


def plural(noun: str) -> str:
    """Plural of one of this module's nouns."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith("man"):
        return noun.removesuffix("man") + "men"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


@as_task
def agreement(half: str) -> list[Item]:
    """Subjects of either number, each before a noun of the other number: "The keys near the door", is or are."""
    things, people = (take_half(nouns, half, "agreement") for nouns in (THINGS, PEOPLE))
    items = []
    for index, head in enumerate([*things, *people]):
        if index % 2:
            templates, others = PERSON_TEMPLATES, people
        else:
            templates, others = THING_TEMPLATES, things
        other = others[(index + 1) % len(others)]
        is_plural = index // 2 % 2 == 1  # over eight items: each pairing of kind, number and gold position once
        singular_verb, plural_verb = PRESENT_AND_PAST[index % len(PRESENT_AND_PAST)]
        answer, distractor = (plural_verb, singular_verb) if is_plural else (singular_verb, plural_verb)
        nouns = {"head": plural(head), "other": other} if is_plural else {"head": head, "other": plural(other)}
        question = templates[index // 8 % len(templates)].format(**nouns)
        items.append(make_item(question, answer, [distractor], (head, other), index // 4))
    return items


@as_task
def reflexives(half: str) -> list[Item]:
    """Subjects of known gender and number before a verb: "The queen praised" himself, herself or themselves."""
    men, women, verbs = (take_half(words, half, "reflexives") for words in (MEN, WOMEN, TRANSITIVE_VERBS))
    items = []
    for man, woman in zip(men, women, strict=True):
        for person, singular in ((man, "himself"), (woman, "herself")):
            position = len(items)
            answer, subject = singular, person
            if not person.istitle():
                # Names have no plural here: two nouns in three take it, for the three answers to be about as frequent.
                is_plural = position % 3 != 0
                answer = "themselves" if is_plural else singular
                subject = f"The {plural(person) if is_plural else person}"
            question = f"{subject} {verbs[position % len(verbs)]}"
            distractors = [other for other in REFLEXIVES if other != answer]
            items.append(make_item(question, answer, distractors, (person,), position // 3))
    return items
