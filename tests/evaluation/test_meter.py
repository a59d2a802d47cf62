"""The meter pays for each mask once, and its key names everything that a result depends on."""

import math
import subprocess
import sys

import pytest
import torch

from rap_env.errors import EvaluationFailed, InvalidMask, SearchExhausted
from rap_env.evaluation import identity
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore, identity_digest
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.conftest import CountingEvaluator

WINDOWS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    dense = PruningMask.all_kept(tiny_llm.shape)
    return [dense, *map(dense.drop, dense.components)]


def test_a_budget_pays_for_each_key_of_each_owner_once_and_all_of_a_call_or_none():
    budget = TokenBudget(10)
    budget.spend("a", ["x", "x"], 3)
    budget.spend("b", ["x"], 2)
    budget.spend("a", ["x"], 3)
    assert budget.spent == 5 and budget.left == 5
    with pytest.raises(SearchExhausted, match="5 of 10 tokens are spent; 6 more were asked for"):
        budget.spend("a", ["y", "x", "z"], 3)
    assert budget.spent == 5 and not budget.has_paid("a", "y")
    budget.spend("a", iter(["y"]), 5)
    assert budget.left == 0
    assert [tuple(entry) for entry in budget.history] == [("a", "x", 3), ("b", "x", 5), ("a", "y", 10)]


def test_a_budget_without_a_limit_pays_for_everything():
    budget = TokenBudget()
    budget.spend("a", range(10), 10**9)
    assert budget.spent == 10**10 and budget.left == math.inf


def test_the_seconds_of_what_was_paid_for_are_those_of_its_measurement_whoever_measured_it(tiny_llm, masks, tmp_path):
    store, evaluator = ResultStore(tmp_path / "results.db"), PerplexityEvaluator(WINDOWS, "text")
    measured = [one.seconds for one in Meter(tiny_llm, evaluator, store).evaluate(masks[:3])]
    budget = TokenBudget()
    first, second = (Meter(tiny_llm, evaluator, store, budget) for _ in range(2))
    first.evaluate(masks[:2])
    assert budget.measured_seconds == pytest.approx(sum(measured[:2])) and measured[0] > 0
    second.evaluate(masks[1:3])
    assert budget.measured_seconds == pytest.approx(sum(measured)), "what was paid for before counts once"
    assert first.fresh_evaluations == second.fresh_evaluations == 0


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="expected a token budget of at least 0; got -1"):
        TokenBudget(-1)


def test_meters_with_one_evaluator_share_what_they_have_paid_for(tiny_llm, masks):
    budget = TokenBudget(1000)
    for evaluator in (PerplexityEvaluator(WINDOWS, "text"), PerplexityEvaluator(WINDOWS.clone(), "text")):
        Meter(tiny_llm, evaluator, budget=budget).evaluate(masks[:3])
        assert budget.spent == 3 * 32
    Meter(tiny_llm, PerplexityEvaluator(WINDOWS[:1], "text"), budget=budget).evaluate(masks[:3])
    assert budget.spent == 3 * 32 + 3 * 16, "other windows are another evaluator"


def test_a_divergence_pays_for_the_dense_models_own_run_first(tiny_llm, masks):
    budget = TokenBudget(100)
    meter = Meter(tiny_llm, DivergenceEvaluator(WINDOWS, "text"), budget=budget)
    assert meter.evaluate([]) == [] and budget.spent == 0
    assert meter.affordable(masks) == masks[:2], "32 for the dense model's run, 32 for each mask"
    meter.evaluate(masks[:2])
    assert budget.spent == 96 and meter.affordable(masks) == masks[:2]


def test_affordable_are_the_first_that_can_be_paid_and_all_that_were(tiny_llm, masks):
    meter = Meter(tiny_llm, CountingEvaluator(), budget=TokenBudget(3))
    meter.evaluate([masks[5]])
    assert meter.affordable([masks[0], masks[0], masks[1], masks[2], masks[5]]) == [masks[0], masks[1], masks[5]]
    assert Meter(tiny_llm, CountingEvaluator()).affordable(masks) == masks


def test_a_mask_of_another_model_is_refused_before_it_is_paid_for(tiny_llm):
    meter = Meter(tiny_llm, CountingEvaluator())
    with pytest.raises(InvalidMask, match="8 components"):
        meter.evaluate([PruningMask.all_kept(build_tiny_llm(n_layers=3).shape)])
    assert meter.budget.spent == meter.evaluator.calls == 0


def test_log_likelihoods_that_overflow_are_refused_although_an_accuracy_of_them_is_finite():
    hot = build_tiny_llm(dtype="float16")
    for name in ("up_proj", "down_proj"):
        getattr(hot.model.model.layers[1].mlp, name).weight.mul_(1e4).clamp_(-6e4, 6e4)
    meter = Meter(hot, HarnessEvaluator(["rap_capitals_search"], limit=4))
    with pytest.raises(EvaluationFailed, match=r"the log-likelihood of a token is nan in torch\.float16"):
        meter.evaluate([PruningMask.all_kept(hot.shape)])
    assert not meter.known


def test_the_key_names_everything_that_a_result_depends_on(tiny_llm, masks, monkeypatch):
    class OtherEvaluator(CountingEvaluator):
        identity = {"evaluator": "counting", "version": 2}

    other_text = SwitchableLLM(tiny_llm.model, build_tiny_llm().tokenizer, "with another tokenizer")
    other_text.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    meter = Meter(tiny_llm, CountingEvaluator())
    keys = [
        meter.identity(masks[1]),
        meter.identity(masks[2]),
        Meter(tiny_llm, OtherEvaluator()).identity(masks[1]),
        Meter(build_tiny_llm(dtype="bfloat16"), CountingEvaluator()).identity(masks[1]),
        Meter(build_tiny_llm(seed=1), CountingEvaluator()).identity(masks[1]),
        Meter(other_text, CountingEvaluator()).identity(masks[1]),
    ]
    monkeypatch.setattr(identity, "ENGINE_VERSION", identity.ENGINE_VERSION + 1)
    keys.append(meter.identity(masks[1]))
    monkeypatch.undo()
    monkeypatch.setattr(identity, "numeric_platform", lambda device: {"machine": "another"})
    keys.append(meter.identity(masks[1]))
    assert len({identity_digest(key) for key in keys}) == len(keys) == 8


def test_the_key_is_the_same_for_the_same_model_in_another_process(tiny_llm, masks):
    script = (
        "from rap_env.evaluation.meter import Meter; from rap_env.evaluation.store import identity_digest\n"
        "from rap_env.llm.loading import build_tiny_llm; from rap_env.mask import PruningMask\n"
        "from tests.conftest import CountingEvaluator; llm = build_tiny_llm()\n"
        "print(identity_digest(Meter(llm, CountingEvaluator()).identity(PruningMask.all_kept(llm.shape))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == identity_digest(Meter(tiny_llm, CountingEvaluator()).identity(masks[0]))
