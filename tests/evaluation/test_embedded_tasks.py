"""The embedded tasks: how many items, how cheap, how balanced, and that the two halves share nothing."""

import re
from collections import Counter

import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from rap_env.errors import UnknownName
from rap_env.evaluation import tasks
from rap_env.evaluation.tasks import facts
from rap_env.evaluation.tasks.grammar import PEOPLE, THINGS, plural
from rap_env.evaluation.tasks.splits import HALVES, make_item, take_half

SIZES = {"agreement": 50, "reflexives": 42, "capitals": 67, "elements": 52, "opposites": 52, "properties": 67}
NAMES = [f"rap_{subject}_{half}" for subject in SIZES for half in HALVES]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(tasks.TASKS_FOLDER), include_defaults=False)


@pytest.fixture(scope="module")
def loaded(manager):
    return manager.load(NAMES)["tasks"]


@pytest.fixture(scope="module")
def items(loaded):
    """Items by task name, as lm-eval sees them: context, choices, gold index, facts."""
    return {
        name: [
            (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc), doc["facts"])
            for doc in task.validation_docs()
        ]
        for name, task in loaded.items()
    }


@pytest.fixture(scope="module")
def halves(items):
    return {half: [item for name in NAMES if name.endswith(half) for item in items[name]] for half in HALVES}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_every_yaml_is_a_task_of_a_known_subject_and_carries_the_tag_of_its_half(manager):
    recall = [f"rap_recall_{tokens}_{half}" for tokens in (128, 256, 512, 1024, 2048) for half in HALVES]
    assert sorted(manager.all_subtasks) == sorted(NAMES + recall)
    tags = {"rap_search": 6, "rap_report": 6, "rap_recall_search": 5, "rap_recall_report": 5}
    assert {tag: len(manager.task_index[tag].tags) for tag in manager.all_tags} == tags


def test_tasks_score_both_accuracies_over_multiple_choice(loaded):
    for task in loaded.values():
        assert task.OUTPUT_TYPE == "multiple_choice"
        assert set(task.aggregation()) == {"acc", "acc_norm"}


@pytest.mark.parametrize("name", NAMES)
def test_each_subject_has_the_size_the_docstring_states(items, name):
    subject = name.split("_")[1]
    assert len(items[name]) == SIZES[subject]
    stated = re.search(rf"\| {subject} \| (\d+) \| (\d) \|", tasks.__doc__)
    assert (int(stated[1]), int(stated[2])) == (SIZES[subject], len(items[name][0][1]))


@pytest.mark.parametrize("subject", SIZES)
def test_the_docstring_shows_an_item_of_each_subject(items, subject):
    example = re.search(rf"\| {subject} \| .* \| (.+) \|", tasks.__doc__)[1]
    shown = {
        f"{context}: {', '.join(choices)}" for half in HALVES for context, choices, *_ in items[f"rap_{subject}_{half}"]
    }
    assert example in shown


@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_are_spread_over_the_positions(items, name):
    choices = len(items[name][0][1])
    golds = Counter(gold for _, _, gold, _ in items[name])
    assert sorted(golds) == list(range(choices))
    assert max(golds.values()) - min(golds.values()) <= 3


@pytest.mark.parametrize("name", NAMES)
def test_choices_of_an_item_differ_and_are_equally_many(items, name):
    assert len({len(choices) for _, choices, _, _ in items[name]}) == 1
    assert all(len(set(choices)) == len(choices) for _, choices, _, _ in items[name])


def test_no_item_comes_twice_in_either_half_or_in_both(halves):
    contexts = [context for half in HALVES for context, *_ in halves[half]]
    assert len(contexts) == 660
    assert len(set(contexts)) == len(contexts)


def test_the_halves_ask_about_different_words(halves):
    asked = {half: {fact.lower() for *_, known in halves[half] for fact in known} for half in HALVES}
    assert asked["search"] & asked["report"] == set()


@pytest.mark.parametrize("subject", ["capitals", "elements", "opposites"])
def test_halves_of_tables_with_an_answer_for_each_fact_share_no_answer_either(items, subject):
    answers = [{choices[gold] for _, choices, gold, _ in items[f"rap_{subject}_{half}"]} for half in HALVES]
    assert answers[0] & answers[1] == set()


def test_the_halves_share_no_13_gram_because_no_item_has_13_words(halves):
    for half in HALVES:
        for context, choices, _, _ in halves[half]:
            assert max(len(words(f"{context} {choice}")) for choice in choices) < 13


def test_a_fact_has_one_answer():
    for name in (name for name in dir(facts) if name.isupper()):
        keys = [key for key, _ in getattr(facts, name)]
        assert len(set(keys)) == len(keys), name


def test_halves_are_dealt_from_pairs_of_neighbours():
    rows = list("abcdefg")
    search, report = (take_half(rows, half, "letters") for half in HALVES)
    assert sorted(search + report) == rows
    assert [{*pair} for pair in zip(search, report, strict=False)] == [{"a", "b"}, {"c", "d"}, {"e", "f"}]


def test_an_unknown_half_is_refused():
    with pytest.raises(UnknownName, match="unknown half 'train'; known: report, search"):
        take_half(["a", "b"], "train", "letters")


def test_the_answer_stands_where_the_position_says():
    item = make_item("Two and two is", "four", ["five", "six"], ["two"], position=5)
    assert (item.choices, item.gold) == (("five", "six", "four"), 2)


def test_nouns_have_their_plurals():
    expected = {"city": "cities", "key": "keys", "box": "boxes", "child": "children", "policewoman": "policewomen"}
    assert {noun: plural(noun) for noun in expected} == expected
    assert len({*THINGS, *PEOPLE}) == len(THINGS) + len(PEOPLE)


@pytest.mark.llm
def test_every_choice_is_one_token_and_a_half_costs_under_2000(embedded_folder, halves):
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    for half in HALVES:
        choices = sorted({f" {choice}" for _, choices, _, _ in halves[half] for choice in choices})
        assert [ids for ids in tokenizer(choices)["input_ids"] if len(ids) != 1] == []
        contexts = tokenizer([context for context, *_ in halves[half]])["input_ids"]
        assert sum(map(len, contexts)) < 2000
        # The boundary survives: a context and its choice encode as the one followed by the other.
        joined = tokenizer([f"{context} {choices[gold]}" for context, choices, gold, _ in halves[half]])["input_ids"]
        assert [len(ids) for ids in joined] == [len(ids) + 1 for ids in contexts]
