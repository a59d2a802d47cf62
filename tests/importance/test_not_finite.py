"""What is not a finite number is one error wherever it is measured, and is never stored."""

import pytest
import torch
from lm_eval.api.instance import Instance

from rap_env.errors import EvaluationFailed
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.lm import RapLM
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.block_influence import block_influence
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.importance.single_drops import single_drop_increases
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation.lm_eval_cases import write_task
from tests.importance.cases import WINDOWS

ROWS = [{"question": "The sky is", "choices": ["blue", "red red"], "gold": 0}] * 2
MARKS = "def mark(doc, results):\n    return {'first_wins': float(results[0][0] >= results[1][0])}\n"
# damage -> number format, a module, and what becomes of its weight
DAMAGES = {
    "overflow in float16": ("float16", "model.layers.1.mlp", None),
    "NaN in float32": ("float32", "model.layers.1.mlp.down_proj", torch.nan),
    "NaN in bfloat16": ("bfloat16", "model.layers.1.mlp.down_proj", torch.nan),
    "infinity in float32": ("float32", "model.layers.1.mlp.down_proj", torch.inf),
    "infinity in float16": ("float16", "model.layers.1.self_attn.o_proj", torch.inf),
    "NaN in the head": ("float32", "lm_head", torch.nan),
    "infinity in the last norm": ("bfloat16", "model.norm", torch.inf),
}


def build_damaged(damage: str):
    dtype, path, value = DAMAGES[damage]
    llm = build_tiny_llm(dtype=dtype)
    module = llm.model.get_submodule(path)
    if value is None:
        for name in ("up_proj", "down_proj"):
            getattr(module, name).weight.mul_(1e4).clamp_(-6e4, 6e4)
    else:
        module.weight.view(-1)[0] = value
    return llm


def dense_of(llm) -> list[PruningMask]:
    return [PruningMask.all_kept(llm.shape)]


def by_text(evaluator):
    return lambda llm, store, _folder: Meter(llm, evaluator(WINDOWS, "text"), store).evaluate(dense_of(llm))


def by_tasks(llm, store, folder):
    Meter(llm, HarnessEvaluator("toy", write_task(folder, "toy", ROWS)), store).evaluate(dense_of(llm))


def by_marks_of_a_task(llm, store, folder):
    write_task(folder, "toy", ROWS, ["first_wins"])
    (folder / "marks.py").write_text(MARKS)
    with (folder / "toy.yaml").open("a") as yaml:
        yaml.write("process_results: !function marks.mark\n")
    Meter(llm, HarnessEvaluator("toy", folder, metric="first_wins"), store).evaluate(dense_of(llm))


def by_influence(llm, store, _folder):
    block_influence(Meter(llm, PerplexityEvaluator(WINDOWS, "text"), store), [[site] for site in llm.shape.sites])


def by_lm_eval(llm, _store, _folder):
    RapLM(llm).loglikelihood([Instance("loglikelihood", {}, ("The sky is", " blue"), 0)])


def by_rolling_lm_eval(llm, _store, _folder):
    RapLM(llm).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("The sky is blue",), 0)])


MEASUREMENTS = {
    "perplexity": by_text(PerplexityEvaluator),
    "divergence": by_text(DivergenceEvaluator),
    "tasks": by_tasks,
    "a task's own marks": by_marks_of_a_task,
    "exact importance": lambda llm, store, _: greedy_sequential_importance(llm, WINDOWS, exact=True, store=store),
    "lazy importance": lambda llm, store, _: greedy_sequential_importance(llm, WINDOWS, store=store),
    "single drops": lambda llm, store, _: single_drop_increases(Meter(llm, PerplexityEvaluator(WINDOWS, "t"), store)),
    "block influence": by_influence,
    "lm-eval": by_lm_eval,
    "rolling lm-eval": by_rolling_lm_eval,
}


@pytest.mark.parametrize(
    ("damage", "measurement"),
    [
        (damage, measurement)
        for damage, (_, path, _) in DAMAGES.items()
        for measurement in MEASUREMENTS
        if measurement != "block influence" or "layers" in path  # it is measured in front of the last norm
    ],
)
def test_what_is_not_finite_is_one_error_and_is_not_stored(store, tmp_path, damage, measurement):
    llm = build_damaged(damage)
    message = rf"\Athe .* is (nan|-?inf) in {llm.dtype}, not a finite number: .*\Z"
    for kept_in in (None, store):
        with pytest.raises(EvaluationFailed, match=message):
            MEASUREMENTS[measurement](llm, kept_in, tmp_path)
    assert len(store) == 0


@pytest.mark.parametrize("evaluator", [PerplexityEvaluator, DivergenceEvaluator])
def test_of_several_masks_those_that_are_finite_may_be_stored(store, evaluator):
    llm = build_damaged("NaN in float32")
    dense = PruningMask.all_kept(llm.shape)
    masks = [dense.drop("layer1.mlp"), dense, dense.drop("layer0.mlp")]
    for _ in range(2):  # nothing is left claimed, so nothing is waited for
        with pytest.raises(EvaluationFailed, match="is nan in"):
            Meter(llm, evaluator(WINDOWS, "text"), store).evaluate(masks)
    meter = Meter(llm, evaluator(WINDOWS, "text"), store)
    assert [store.get(meter.identity(mask)) for mask in masks[1:]] == [None, None]


def test_the_advice_is_about_float16_only_in_float16(tmp_path):
    with pytest.raises(EvaluationFailed, match="activations overflow in float16; load the model with dtype=bfloat16"):
        by_tasks(build_damaged("overflow in float16"), None, tmp_path)
    with pytest.raises(EvaluationFailed, match="a weight is not finite, or too large"):
        by_tasks(build_damaged("NaN in bfloat16"), None, tmp_path)
