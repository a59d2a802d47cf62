"""Accuracies equal lm-eval's own exactly; everything a result depends on is in the identity."""

import copy
import math
import random

import pytest
from lm_eval.tasks import TaskManager
from tokenizers import normalizers

from rap_env.errors import EvaluationFailed, UnknownName
from rap_env.evaluation import task_loading
from rap_env.evaluation.harness import HarnessEvaluator, items_of
from rap_env.evaluation.tasks import TASKS_FOLDER
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import global_states, isolated_rng
from tests.evaluation.lm_eval_cases import by_lm_eval, hf

TASKS = ["toy_short", "toy_long"]
N_ITEMS = 11
NARROW = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 257}
NARROW |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 30}

YAML = """
task: {name}
tag: {tag}
output_type: {output_type}
custom_dataset: !function toy_items.load
dataset_kwargs: {{longest: {longest}}}
validation_split: validation
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
  - {{metric: {other_metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: {version}}}
"""

ITEMS = """
import random
from datasets import Dataset

def load(longest, **_):
    rng = random.Random(longest)
    def word(longest):
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, longest))) + "."
    items = [
        {{
            "question": "" if i == 3 else word(30).strip() + " " * (i == 4),
            "choices": [word(longest) for _ in range(2 + i % 3)],
            "gold": i % 2,
        }}
        for i in range({n_items})
    ]
    return {{"validation": Dataset.from_list(items)}}

def first(dataset):
    return dataset.select([0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two multiple-choice tasks and one that generates, in a folder of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "toy_items.py").write_text(ITEMS.format(n_items=N_ITEMS))

    def write(name, longest, output_type="multiple_choice", metrics=("acc", "acc_norm"), version=1.0):
        text = YAML.format(
            name=name,
            tag="toy_all" if name in TASKS else "toy_rest",
            longest=longest,
            output_type=output_type,
            metric=metrics[0],
            other_metric=metrics[1],
            version=version,
        )
        (folder / f"{name}.yaml").write_text(text)

    write("toy_short", 3)
    write("toy_long", 25, version=2.0)
    write("toy_generated", 3, "generate_until", ("exact_match", "bleu"))
    write("toy_plain", 3, metrics=("acc", "acc"))
    return folder


@pytest.fixture(scope="module")
def evaluator(folder):
    return HarnessEvaluator(TASKS, include_path=folder)


def accuracies(tasks: dict) -> dict[str, dict[str, float]]:
    return {name: {metric: tasks[name][metric] for metric in ("acc", "acc_norm")} for name in tasks}


DROPPED = [(), ("layer0.attention", "layer2.mlp")]


@pytest.mark.parametrize("dropped", DROPPED, ids=["dense", "pruned"])
@pytest.mark.parametrize(("half", "limit"), [(None, None), ("report", 4)])
def test_accuracies_of_toy_tasks_equal_lm_evals(tiny_llm, folder, dropped, half, limit):
    items = items_of(N_ITEMS, half, limit)
    with tiny_llm.pruned(PruningMask.all_kept(tiny_llm.shape).drop(*dropped)):
        ours = HarnessEvaluator(TASKS, folder, half, limit).evaluate(tiny_llm).tasks
        theirs, _ = by_lm_eval(hf(tiny_llm), TASKS, folder, samples={name: items for name in TASKS})
    assert accuracies(ours) == theirs
    assert {metrics["items"] for metrics in ours.values()} == {len(items)}


@pytest.mark.llm
@pytest.mark.parametrize("dropped", [(), ("layer0.attention", "layer12.attention", "layer20.mlp")], ids=len)
def test_accuracies_of_the_embedded_tasks_equal_lm_evals(embedded_llm_float32, dropped):
    llm, tasks = embedded_llm_float32, ["rap_capitals_search", "rap_properties_report"]
    with llm.pruned(PruningMask.all_kept(llm.shape).drop(*dropped)):
        ours = HarnessEvaluator(tasks, limit=12).evaluate(llm).tasks
        theirs, _ = by_lm_eval(hf(llm), tasks, TASKS_FOLDER, limit=12)
    assert accuracies(ours) == theirs


def test_smooth_accuracy_is_the_mean_softmax_probability_of_the_right_choice(tiny_llm, folder):
    responses = iter(by_lm_eval(hf(tiny_llm), ["toy_short"], folder)[1]["toy_short"])
    expected = []
    for item in range(N_ITEMS):
        weights = [math.exp(float(next(responses)[0])) for _choice in range(2 + item % 3)]
        expected.append(weights[item % 2] / sum(weights))
    metrics = HarnessEvaluator("toy_short", folder).evaluate(tiny_llm).tasks["toy_short"]
    assert metrics["smooth_acc"] == pytest.approx(sum(expected) / N_ITEMS, rel=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm", "smooth_acc"])
def test_the_score_is_the_mean_of_the_metric_over_tasks(tiny_llm, folder, metric):
    evaluation = HarnessEvaluator(TASKS, folder, metric=metric).evaluate(tiny_llm)
    short, long = (evaluation.tasks[name][metric] for name in TASKS)
    assert evaluation.score == pytest.approx((short + long) / 2) == evaluation.mean(metric)
    assert math.isnan(evaluation.mean("no_such_metric"))


def test_evaluating_leaves_the_random_streams_alone(tiny_llm, folder):
    with isolated_rng(0):
        before = global_states()
        HarnessEvaluator(TASKS, folder).evaluate(tiny_llm)
        after = global_states()
    assert after["python"] == before["python"]
    assert after["torch"].equal(before["torch"])
    assert (after["numpy"][1] == before["numpy"][1]).all() and after["numpy"][2:] == before["numpy"][2:]


def test_evaluating_twice_gives_equal_results(tiny_llm, evaluator):
    assert evaluator.evaluate(tiny_llm) == evaluator.evaluate(tiny_llm)


def test_many_masks_are_evaluated_as_each_alone_whatever_mask_is_applied(tiny_llm, evaluator):
    n_bits = len(tiny_llm.shape.components)
    codes = [0, 2**n_bits - 1, *random.Random(0).sample(range(1, 2**n_bits - 1), 8)]
    masks = [PruningMask.from_bits(tiny_llm.shape, [code >> bit & 1 for bit in range(n_bits)]) for code in codes]
    with tiny_llm.pruned(masks[3]):
        together = list(evaluator.evaluate_many(tiny_llm, masks))
        assert tiny_llm.mask == masks[3]
    assert sorted(mask.keep for mask, _ in together) == sorted(mask.keep for mask in masks), "each mask once"
    for mask, evaluation in together:
        with tiny_llm.pruned(mask):
            alone = evaluator.evaluate(tiny_llm)
        assert (evaluation, evaluation.tokens) == (alone, alone.tokens)
    assert len({evaluation.mean("smooth_acc") for _, evaluation in together}) == 10  # none could be taken for another


def test_one_evaluator_takes_models_with_other_tokenizers_and_contexts(tiny_llm, folder):
    longer = copy.deepcopy(tiny_llm.tokenizer)
    longer.backend_tokenizer.normalizer = normalizers.Replace("a", "bbb")
    llms = [tiny_llm, SwitchableLLM(tiny_llm.model, longer, "longer")]
    expected = [HarnessEvaluator(TASKS, folder).evaluate(llm) for llm in llms]
    assert expected[0] != expected[1]
    narrow = SwitchableLLM(build_random_llm("llama", NARROW).model, tiny_llm.tokenizer, "narrow")
    evaluator = HarnessEvaluator(TASKS, folder)
    assert [evaluator.evaluate(llm) for llm in (*llms, tiny_llm)] == [*expected, expected[0]]
    assert evaluator.evaluate(narrow).tokens != evaluator.evaluate(tiny_llm).tokens, "contexts are cut"
    assert evaluator.evaluate(narrow) == HarnessEvaluator(TASKS, folder).evaluate(narrow)


def test_halves_share_no_item_and_together_hold_all(folder, evaluator):
    assert items_of(11, "search", None) == [0, 2, 4, 6, 8, 10]
    assert items_of(11, "report", None) == [1, 3, 5, 7, 9]
    assert items_of(11, "search", 2) == [0, 2]
    assert items_of(11, None, 3) == [0, 1, 2]
    assert items_of(2, None, 99) == [0, 1]
    texts = {half: HarnessEvaluator(["toy_long"], folder, half).item_texts["toy_long"] for half in ("search", "report")}
    assert not set(texts["search"]) & set(texts["report"])
    assert sorted(texts["search"] + texts["report"]) == sorted(evaluator.item_texts["toy_long"])


def test_the_identity_changes_with_everything_that_changes_the_result(folder, evaluator):
    variants = [
        HarnessEvaluator(TASKS, folder, limit=5),
        HarnessEvaluator(TASKS, folder, half="search"),
        HarnessEvaluator(TASKS, folder, half="report"),
        HarnessEvaluator(TASKS[:1], folder),
        HarnessEvaluator(TASKS, folder, metric="acc_norm"),
        HarnessEvaluator(TASKS, folder, batch_tokens=64),
        evaluator,
    ]
    identities = [str(variant.identity) for variant in variants]
    assert len(set(identities)) == len(variants)
    assert HarnessEvaluator(TASKS[::-1], folder).identity == evaluator.identity
    assert evaluator.identity["tasks"] == {"toy_short": "1.0", "toy_long": "2.0"}
    assert evaluator.name == evaluator.identity["name"] == "toy_long, toy_short"
    assert variants[2].name == "toy_long, toy_short (report half)"
    assert set(evaluator.identity["versions"]) == {"lm_eval", "torch", "transformers"}


def test_the_tokens_are_known_ahead_of_the_evaluation(tiny_llm, evaluator):
    tokens = evaluator.tokens(tiny_llm)
    assert tokens == evaluator.plan(tiny_llm).tokens == evaluator.evaluate(tiny_llm).tokens > 0


def test_a_tag_stands_for_its_tasks_also_as_a_plain_string(folder):
    assert set(HarnessEvaluator(["toy_all"], folder, limit=1).item_texts) == set(TASKS)
    assert set(HarnessEvaluator("toy_all", folder, limit=1).item_texts) == set(TASKS)


def test_an_unknown_task_lists_close_matches(folder, monkeypatch):
    def manager_of(include_path, include_defaults=True):
        return TaskManager(include_path=include_path, include_defaults=False)  # lm-eval's own tasks take ten seconds

    monkeypatch.setattr(task_loading, "TaskManager", manager_of)
    with pytest.raises(UnknownName, match="unknown task 'toy_shrt'; did you mean toy_short"):
        HarnessEvaluator(["toy_shrt"], folder)


def test_what_cannot_be_evaluated_is_refused(folder, tmp_path):
    with pytest.raises(EvaluationFailed, match="task 'toy_generated' is generate_until; expected multiple_choice"):
        HarnessEvaluator(["toy_generated"], folder)
    with pytest.raises(EvaluationFailed, match="task 'toy_plain' has no metric 'acc_norm'; it has acc, smooth_acc"):
        HarnessEvaluator(["toy_plain"], folder, metric="acc_norm")
    with pytest.raises(EvaluationFailed, match="expected at least one task name; got none"):
        HarnessEvaluator([])
    with pytest.raises(EvaluationFailed, match=f"no such folder: {tmp_path / 'none'}"):
        HarnessEvaluator(TASKS, tmp_path / "none")
    with pytest.raises(UnknownName, match="unknown half 'reprot'; did you mean report"):
        HarnessEvaluator(TASKS, folder, half="reprot")


def test_a_half_without_items_is_refused(folder):
    (folder / "toy_single.yaml").write_text(
        "include: toy_short.yaml\ntask: toy_single\ntag: toy_rest\nprocess_docs: !function toy_items.first\n"
    )
    assert HarnessEvaluator(["toy_single"], folder, half="search").item_texts["toy_single"]
    with pytest.raises(EvaluationFailed, match="task 'toy_single' has no item to evaluate; it has 1 in all"):
        HarnessEvaluator(["toy_single"], folder, half="report")


@pytest.mark.parametrize("limit", [0, -1, 1.5, 2.0])
def test_a_limit_that_is_no_whole_number_or_leaves_no_item_is_refused(folder, limit):
    with pytest.raises(EvaluationFailed, match=f"evaluation.limit must be a whole number, at least 1.*; got {limit}"):
        HarnessEvaluator(TASKS, folder, limit=limit)


def test_items_can_be_left_out_by_their_text(tiny_llm, folder):
    everything = HarnessEvaluator(TASKS, folder)
    searched = HarnessEvaluator(TASKS, folder, half="search").item_texts
    rest = everything.without([text for texts in searched.values() for text in texts])
    report = HarnessEvaluator(TASKS, folder, half="report")
    assert rest.item_texts == report.item_texts
    assert rest.evaluate(tiny_llm) == report.evaluate(tiny_llm)
    assert rest.identity["requests"] == report.identity["requests"] != everything.identity["requests"]
    assert everything.without([]).identity == everything.identity
    assert everything.evaluate(tiny_llm).tasks["toy_long"]["items"] == N_ITEMS, "it keeps its own items"
    with pytest.raises(EvaluationFailed, match="task 'toy_short' has no item to evaluate; it has 11 in all"):
        everything.without(everything.item_texts["toy_short"])


def test_the_first_part_of_an_evaluator_has_the_first_items_of_each_task_and_costs_less(evaluator, tiny_llm):
    part = evaluator.first(0.26)  # rounded up
    for name, texts in evaluator.item_texts.items():
        assert part.item_texts[name] == texts[: -(-26 * len(texts) // 100)]
    assert part.tokens(tiny_llm) < evaluator.tokens(tiny_llm) and part.identity != evaluator.identity
    assert evaluator.first(1.0) is evaluator
