"""Rows that public data sets do have: odd labels, several right answers, empty contexts, tokens across the join."""

import copy
import math

import numpy as np
import pytest
from tokenizers import models

from rap_env.errors import EvaluationFailed
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.llm.switchable import SwitchableLLM
from tests.evaluation.lm_eval_cases import by_lm_eval, hf, log_likelihoods, write_task

SKY = {"question": "The sky is", "choices": ["blue", "red red"], "gold": 0}
GRASS = {"question": "Grass is", "choices": ["red", "green"], "gold": 1}
SNOW = {"question": "Snow is", "choices": ["white", "black", "blue"], "gold": 0}


def probabilities(logprobs: list[float]) -> list[float]:
    weights = [math.exp(value) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def evaluate(llm, folder) -> dict:
    """Metrics of the task `toy`, once they are seen to be lm-eval's where lm-eval has them."""
    ours = HarnessEvaluator("toy", folder, metric="smooth_acc").evaluate(llm).tasks["toy"]
    theirs = by_lm_eval(hf(llm), ["toy"], folder)[0]["toy"]
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)
    return ours


def responses_of(llm, folder) -> list[float]:
    return log_likelihoods(by_lm_eval(hf(llm), ["toy"], folder)[1]["toy"])


def test_labels_may_be_the_texts_of_choices(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [SKY | {"gold": "blue"}, GRASS | {"gold": "green"}])
    sky, grass = (probabilities(pair) for pair in zip(*[iter(responses_of(tiny_llm, folder))] * 2, strict=True))
    assert evaluate(tiny_llm, folder)["smooth_acc"] == pytest.approx((sky[0] + grass[1]) / 2, rel=1e-4)
    assert HarnessEvaluator("toy", folder).item_texts == {"toy": ["The sky is blue", "Grass is green"]}


@pytest.mark.parametrize("labels", [(0, -1), (0, 2), ("blue", "yellow")], ids=str)
def test_a_label_that_no_choice_has_is_never_right(tiny_llm, tmp_path, labels):
    grass = GRASS | {"choices": ["green and wet", "red"]}  # the last one is likelier by far
    rows = [row | {"gold": label} for row, label in zip((SKY, grass), labels, strict=True)]
    folder = write_task(tmp_path, "toy", rows)
    sky, last = (probabilities(pair) for pair in zip(*[iter(responses_of(tiny_llm, folder))] * 2, strict=True))
    assert last[1] > 0.9
    assert evaluate(tiny_llm, folder)["smooth_acc"] == pytest.approx(sky[0] / 2, rel=1e-4)


def test_an_item_may_have_several_right_choices(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [SNOW | {"gold": [0, 2]}, SKY | {"gold": [1]}])
    found = responses_of(tiny_llm, folder)
    snow, sky = probabilities(found[:3]), probabilities(found[3:])
    assert evaluate(tiny_llm, folder)["smooth_acc"] == pytest.approx((snow[0] + snow[2] + sky[1]) / 2, rel=1e-4)


def test_requests_without_context_count_for_mutual_information_only(tiny_llm, tmp_path):
    rows = [SKY, GRASS, SNOW]
    plain = evaluate(tiny_llm, write_task(tmp_path, "toy", rows, ["acc", "acc_norm"]))
    folder = write_task(tmp_path, "toy", rows, ["acc", "acc_norm", "acc_mutual_info"])
    both = evaluate(tiny_llm, folder)
    assert set(both) - set(plain) == {"acc_mutual_info"}
    assert both["smooth_acc"] == pytest.approx(plain["smooth_acc"], rel=1e-5)
    assert HarnessEvaluator("toy", folder).item_texts["toy"] == ["The sky is blue", "Grass is green", "Snow is white"]


@pytest.mark.parametrize("metrics", [("acc_norm",), ("mcc",), ("f1", "brier_score")], ids=str)
def test_the_right_choice_is_known_also_without_the_metric_acc(tiny_llm, tmp_path, metrics):
    expected = evaluate(tiny_llm, write_task(tmp_path, "toy", [SKY, GRASS]))["smooth_acc"]
    folder = write_task(tmp_path, "toy", [SKY, GRASS], metrics)
    assert evaluate(tiny_llm, folder)["smooth_acc"] == expected


def test_a_task_with_marks_of_its_own_has_no_smooth_accuracy(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [SKY, GRASS], ["first_wins"])
    (folder / "marks.py").write_text("def mark(doc, results):\n    return {'first_wins': results[0] > results[1]}\n")
    with (folder / "toy.yaml").open("a") as yaml:
        yaml.write("process_results: !function marks.mark\n")
    metrics = HarnessEvaluator("toy", folder, metric="first_wins").evaluate(tiny_llm).tasks["toy"]
    found = responses_of(tiny_llm, folder)
    assert metrics == {"first_wins": ((found[0] > found[1]) + (found[2] > found[3])) / 2, "items": 2}
    with pytest.raises(EvaluationFailed, match="task 'toy' has no metric 'smooth_acc'; it has first_wins"):
        HarnessEvaluator("toy", folder, metric="smooth_acc")


def test_an_item_whose_context_has_no_tokens_is_named(tiny_llm, tmp_path):
    write_task(tmp_path, "toy", [SKY, GRASS, SNOW | {"question": " "}, SKY, GRASS | {"question": " "}])
    for half, item in ((None, 2), ("search", 2)):
        with pytest.raises(EvaluationFailed, match=f"task 'toy', item {item}, choice 0: its context has no tokens"):
            HarnessEvaluator("toy", tmp_path, half).tokens(tiny_llm)
    assert HarnessEvaluator("toy", tmp_path, "report").tokens(tiny_llm) > 0


def test_an_item_of_which_a_token_spans_the_join_is_named_before_anything_is_forwarded(tiny_llm, tmp_path):
    tokenizer = copy.deepcopy(tiny_llm.tokenizer)
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {"Ab": vocabulary.pop("Y"), "Abc": vocabulary.pop("Z")}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("A", "b"), ("Ab", "c")])
    llm = SwitchableLLM(tiny_llm.model, tokenizer, "merging")
    rows = [SKY, {"question": "Ab", "choices": [" x", "c"], "gold": 0}]
    folder = write_task(tmp_path, "toy", rows, delimiter="")
    executions = llm.site_executions
    with pytest.raises(EvaluationFailed, match="task 'toy', item 1, choice 1: its continuation has no tokens"):
        HarnessEvaluator("toy", folder).evaluate(llm)
    assert llm.site_executions == executions


def test_a_choice_may_be_empty_where_the_delimiter_has_tokens(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [GRASS, SKY | {"choices": ["", "blue"]}], ["acc"])
    with np.errstate(divide="ignore"):
        assert evaluate(tiny_llm, folder)["items"] == 2


def test_an_item_with_neither_context_nor_continuation_is_named(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [SKY, {"question": "", "choices": ["a", ""], "gold": 0}], ["acc"], "")
    with pytest.raises(EvaluationFailed, match="task 'toy', item 1, choice 1: neither its context nor its contin"):
        HarnessEvaluator("toy", folder).tokens(tiny_llm)


def test_a_task_needs_no_metadata(tiny_llm, tmp_path):
    folder = write_task(tmp_path, "toy", [SKY, GRASS])
    yaml = folder / "toy.yaml"
    yaml.write_text(yaml.read_text().replace("metadata: {version: 1.0}\n", ""))
    assert HarnessEvaluator("toy", folder).identity["tasks"] == {"toy": "None"}
