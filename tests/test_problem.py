"""The problem evaluates each mask once, for all workloads and budgets, and leaves no trace in the model."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from rap_env.errors import (
    EvaluationFailed,
    InfeasibleBudget,
    InvalidMask,
    InvalidReward,
    InvalidWorkload,
    SearchExhausted,
)
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.store import ResultStore
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, smallest_bytes
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem
from rap_env.rng import global_states
from tests.conftest import CountingEvaluator

WORK = Workload(4, 512)
PLENTY_BYTES = 10**9


class RaisingEvaluator(CountingEvaluator):
    """Fails while it evaluates."""

    def evaluation_of(self, mask) -> Evaluation:
        raise ZeroDivisionError("in the middle of an evaluation")


class ReseedingEvaluator(CountingEvaluator):
    """Does what lm-eval does on every call, and worse."""

    def evaluation_of(self, mask) -> Evaluation:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        torch.rand(3)
        return super().evaluation_of(mask)


class NanEvaluator(CountingEvaluator):
    def evaluation_of(self, mask) -> Evaluation:
        return Evaluation(float("nan"), {"toy": {"smooth_acc": 0.5, "items": 1}}, tokens=1, seconds=0.0)


@pytest.fixture
def mask(tiny_llm) -> PruningMask:
    return PruningMask.all_kept(tiny_llm.shape).drop("layer1.attention", "layer3.mlp")


@pytest.fixture
def store(tmp_path) -> ResultStore:
    with ResultStore(tmp_path / "results.db") as opened:
        yield opened


def plain(states: dict) -> list:
    """Global random states as values that compare with `==`."""
    name, keys, *numbers = states["numpy"]
    return [states["python"], name, keys.tolist(), numbers, states["torch"].tolist()]


def test_outcome_holds_score_footprint_and_fit(toy_problem, mask):
    outcome = toy_problem.evaluate(mask, WORK, PLENTY_BYTES)
    # components 2 (layer 1's attention) and 7 (layer 3's MLP) of 8 are dropped: 3 + 8 of 36
    assert outcome.score == pytest.approx(1 - 11 / 36)
    assert outcome.fits
    assert outcome.reward_terms == {
        "accuracy": outcome.score,
        "smooth_accuracy": outcome.score,
        "overshoot": 0.0,
        "violation": 0.0,
    }
    assert toy_problem.reward(outcome) == outcome.score


def test_outcome_above_the_budget_pays_for_the_overshoot(tiny_llm):
    problem = PruningProblem(tiny_llm, CountingEvaluator(), reward_weights={"accuracy": 1.0, "overshoot": -2.0})
    dense = PruningMask.all_kept(tiny_llm.shape)
    budget_bytes = dense_bytes(tiny_llm.shape, WORK) * 4 // 5
    outcome = problem.evaluate(dense, WORK, budget_bytes)
    assert not outcome.fits
    assert outcome.reward_terms["violation"] == 1.0
    assert outcome.reward_terms["overshoot"] == pytest.approx(0.25, rel=1e-4)
    assert problem.reward(outcome) == pytest.approx(1.0 - 2.0 * 0.25, rel=1e-4)


def test_a_mask_is_evaluated_once_for_all_workloads_and_budgets(toy_problem, mask):
    first = toy_problem.evaluate(mask, WORK, PLENTY_BYTES)
    second = toy_problem.evaluate(mask, Workload(1, 128), PLENTY_BYTES // 2)
    assert toy_problem.evaluator.calls == toy_problem.meter.fresh_evaluations == 1
    assert second.evaluation == first.evaluation
    assert second.footprint.kv_cache_bytes < first.footprint.kv_cache_bytes
    assert (first.from_store, second.from_store) == (False, True)


def test_second_problem_reads_what_the_first_one_stored(tiny_llm, mask, store):
    first = PruningProblem(tiny_llm, CountingEvaluator(), store).evaluate(mask, WORK, PLENTY_BYTES)
    problem = PruningProblem(tiny_llm, CountingEvaluator(), store)
    second = problem.evaluate(mask, WORK, PLENTY_BYTES)
    assert problem.evaluator.calls == problem.meter.fresh_evaluations == 0
    assert second == first and second.from_store


def test_other_model_is_not_served_from_the_store(mask, tiny_llm, store):
    PruningProblem(tiny_llm, CountingEvaluator(), store).evaluate(mask, WORK, PLENTY_BYTES)
    other = PruningProblem(build_tiny_llm(seed=1), CountingEvaluator(), store)
    assert not other.evaluate(mask, WORK, PLENTY_BYTES).from_store
    assert other.evaluator.calls == 1


def test_budget_that_no_mask_meets_is_refused_before_anything_is_evaluated(toy_problem, mask):
    smallest = smallest_bytes(toy_problem.shape, WORK)
    with pytest.raises(InfeasibleBudget, match=f"still needs {smallest:,} bytes") as caught:
        toy_problem.evaluate(mask, WORK, smallest - 1)
    assert caught.value.smallest_bytes == smallest
    assert caught.value.budget_bytes == smallest - 1
    assert toy_problem.evaluator.calls == toy_problem.budget.spent == 0


def test_smallest_budget_is_met_by_dropping_everything(toy_problem):
    nothing = PruningMask(toy_problem.shape.components, (False,) * 8)
    assert toy_problem.evaluate(nothing, WORK, smallest_bytes(toy_problem.shape, WORK)).fits


def test_workload_beyond_the_context_is_refused_before_anything_is_evaluated(toy_problem, mask):
    with pytest.raises(InvalidWorkload, match="context is 8,192"):
        toy_problem.evaluate(mask, Workload(1, 8192, 1), PLENTY_BYTES)
    assert toy_problem.evaluator.calls == toy_problem.budget.spent == 0


def test_mask_of_another_model_is_refused_and_costs_nothing(toy_problem):
    other = PruningMask.all_kept(build_tiny_llm(n_layers=3).shape)
    with pytest.raises(InvalidMask, match="this model's 8 components; got 6"):
        toy_problem.evaluate(other, WORK, PLENTY_BYTES)
    assert toy_problem.evaluator.calls == toy_problem.budget.spent == 0


def test_budget_counts_distinct_masks_whether_stored_or_not(tiny_llm, mask, store):
    masks = [mask, mask.drop("layer0.mlp"), mask, mask.drop("layer2.mlp")]
    spent = []
    for _ in range(2):  # the second time everything is stored
        problem = PruningProblem(tiny_llm, CountingEvaluator(), store, budget=TokenBudget(10))
        for asked in masks:
            problem.evaluate(asked, WORK, PLENTY_BYTES)
        spent.append(problem.budget.spent)
    assert spent == [3, 3]
    assert problem.meter.fresh_evaluations == 0


def test_exhausted_budget_refuses_new_masks_and_answers_known_ones(tiny_llm, mask):
    problem = PruningProblem(tiny_llm, CountingEvaluator(), budget=TokenBudget(1))
    problem.evaluate(mask, WORK, PLENTY_BYTES)
    assert problem.budget.left == 0
    with pytest.raises(SearchExhausted, match="1 of 1 tokens are spent; 1 more were asked for"):
        problem.evaluate(mask.drop("layer0.mlp"), WORK, PLENTY_BYTES)
    assert problem.evaluator.calls == problem.budget.spent == 1
    assert problem.evaluate(mask, Workload(1, 64), PLENTY_BYTES).score == pytest.approx(1 - 11 / 36)


def test_applied_mask_changes_no_outcome_and_stays(toy_problem, tiny_llm, mask):
    applied = PruningMask.all_kept(tiny_llm.shape).drop("layer0.attention")
    with tiny_llm.pruned(applied):
        assert toy_problem.evaluate(mask, WORK, PLENTY_BYTES).score == pytest.approx(1 - 11 / 36)
        assert tiny_llm.mask == applied
    assert not tiny_llm.mask.dropped


def test_evaluator_that_is_asked_itself_evaluates_the_applied_mask(tiny_llm, mask):
    with tiny_llm.pruned(mask):
        assert CountingEvaluator().evaluate(tiny_llm).score == pytest.approx(1 - 11 / 36)
    assert CountingEvaluator().evaluate(tiny_llm).score == 1


def test_failed_evaluation_leaves_model_and_store_as_they_were(tiny_llm, mask, store):
    problem = PruningProblem(tiny_llm, RaisingEvaluator(), store)
    tokens = torch.arange(16)[None]
    before = tiny_llm.model(tokens).logits
    with pytest.raises(ZeroDivisionError):
        problem.evaluate(mask, WORK, PLENTY_BYTES)
    assert torch.equal(tiny_llm.model(tokens).logits, before)
    assert len(store) == problem.meter.fresh_evaluations == 0
    healthy = PruningProblem(tiny_llm, CountingEvaluator(), store)
    assert not healthy.evaluate(mask, WORK, PLENTY_BYTES).from_store


def test_random_streams_go_on_as_if_nothing_had_been_evaluated(tiny_llm, mask):
    problem = PruningProblem(tiny_llm, ReseedingEvaluator())
    before = plain(global_states())
    problem.evaluate(mask, WORK, PLENTY_BYTES)
    assert problem.evaluator.calls == 1
    assert plain(global_states()) == before


def test_random_streams_are_restored_when_the_evaluator_raises(tiny_llm, mask):
    class Worst(RaisingEvaluator):
        def evaluation_of(self, mask):
            torch.manual_seed(0)
            random.seed(0)
            return super().evaluation_of(mask)

    before = plain(global_states())
    with pytest.raises(ZeroDivisionError):
        PruningProblem(tiny_llm, Worst()).evaluate(mask, WORK, PLENTY_BYTES)
    assert plain(global_states()) == before


def test_score_that_is_not_finite_is_refused_with_and_without_a_store(tiny_llm, mask, store):
    for kept_in in (None, store):
        with pytest.raises(EvaluationFailed, match=r"score on toy is nan in torch\.float32, not a finite number"):
            PruningProblem(tiny_llm, NanEvaluator(), kept_in).evaluate(mask, WORK, PLENTY_BYTES)
    assert len(store) == 0


def test_copies_of_a_problem_are_the_problem_itself(toy_problem):
    assert copy.deepcopy({"problem": toy_problem})["problem"] is toy_problem


def test_reward_weight_without_a_term_is_refused_before_anything_is_evaluated(tiny_llm):
    with pytest.raises(InvalidReward, match="no reward term 'acuracy'; known terms: accuracy, smooth_accuracy"):
        PruningProblem(tiny_llm, CountingEvaluator(), reward_weights={"acuracy": 1.0})


def test_equality_of_outcomes_ignores_time_and_origin(toy_problem, mask):
    outcome = toy_problem.evaluate(mask, WORK, PLENTY_BYTES)
    assert replace(outcome, from_store=True, seconds=9.0) == outcome
    assert replace(outcome, budget_bytes=1) != outcome


def test_a_relative_reward_pays_for_the_dense_model_once_and_other_rewards_never(tiny_llm, toy_problem):
    dense, work = PruningMask.all_kept(tiny_llm.shape), Workload(1, 128)
    for weights, calls in (({"accuracy": 1.0}, 2), ({"perplexity_ratio": 1.0}, 3)):
        problem = PruningProblem(tiny_llm, type(toy_problem.evaluator)(), reward_weights=weights)
        outcomes = problem.evaluate_many([(dense.drop(c), work, 10**9) for c in dense.components[:2]])
        assert problem.evaluator.calls == problem.budget.spent == calls
        assert ("perplexity_ratio" in outcomes[0].reward_terms) == (calls == 3)
        assert problem.dense_score == (1.0 if calls == 3 else None)
