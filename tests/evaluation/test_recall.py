"""Recall items: one early sentence tells the answer, the other choices stand in sentences of the same form."""

import re

import pytest
from transformers import AutoTokenizer

from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.tasks.recall import PLACES, recall

LENGTHS = (128, 256, 512, 1024, 2048)


def items_of(half: str, tokens: int) -> list[dict]:
    return list(recall(half, tokens=tokens, version=1.0)["validation"])


def stated(item: dict) -> list[str]:
    """Everything that is kept somewhere, in order: "Anna keeps the camera in the garage"."""
    return re.findall(r"\w+ keeps the \w+ in the \w+(?=\.)", item["question"])


@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_early_sentence_tells_the_answer_and_distractors_are_stated_of_other_things(tokens):
    for item in items_of("search", tokens):
        text, asked = item["question"], item["question"].rpartition(". ")[2]
        answer = item["choices"][item["gold"]]
        assert text.count(f"{asked} {answer}.") == 1 and text.count(asked) == 2
        assert text.index(f"{asked} {answer}.") < len(text) / 3
        assert stated(item)[0] == f"{asked} {answer}", "the others stand behind it"
        assert sorted(sentence.split()[-1] for sentence in stated(item)) == sorted(item["choices"])
        assert all(len(re.findall(rf"\b{choice}\b", text)) == 1 for choice in item["choices"])


def test_items_are_seeded_and_the_halves_have_people_things_and_places_of_their_own():
    search, again, report = items_of("search", 256), items_of("search", 256), items_of("report", 256)
    assert search == again and len({item["question"] for item in search + report}) == 128
    for place in range(3):  # who, what, where
        of_halves = [{item["facts"][place] for item in items} for items in (search, report)]
        assert of_halves[0] & of_halves[1] == set() and min(map(len, of_halves)) > 5
    assert [sum(item["gold"] == position for item in search) for position in range(4)] == [16] * 4


def test_they_are_lm_eval_tasks_with_a_smooth_accuracy(tiny_llm):
    evaluator = HarnessEvaluator("rap_recall_128_search", limit=3, metric="smooth_acc")
    evaluation = evaluator.evaluate(tiny_llm)
    (metrics,) = evaluation.tasks.values()
    assert metrics["items"] == 3 and 0.0 < metrics["smooth_acc"] == evaluation.score < 1.0


@pytest.mark.llm
def test_items_have_about_the_tokens_that_the_name_says_and_choices_one(embedded_folder):
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    assert [ids for ids in tokenizer([f" {place}" for place in PLACES])["input_ids"] if len(ids) != 1] == []
    for tokens in LENGTHS:
        for half in ("search", "report"):
            lengths = [
                len(ids) for ids in tokenizer([item["question"] for item in items_of(half, tokens)])["input_ids"]
            ]
            assert min(lengths) > 0.95 * tokens - 8 and max(lengths) < 1.05 * tokens + 8
