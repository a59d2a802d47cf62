"""What learners train on: relative rewards, and the nearest evaluated mask where the token budget ends."""

import time

import numpy as np
import pytest

from agents.training_problem import TrainingProblem
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy
from tests.conftest import CountingEvaluator

WORK = Workload(1, 96)  # an attention frees 12288 + 96 * 128 bytes and an MLP 24576: the same
SIZE_BYTES, FIXED_BYTES = 24576, 66944


def budget_for(n_kept: int) -> int:
    return FIXED_BYTES + n_kept * SIZE_BYTES


@pytest.fixture
def make(tiny_llm, toy_task):
    """Makes a training problem; the order drops the components in their own order, which `CountingEvaluator` likes."""

    def make_problem(token_budget: int, project: bool = False):
        task = toy_task(token_budget, CountingEvaluator())
        task.__dict__["importance"] = ImportanceSource([component.name for component in tiny_llm.shape.components])
        return TrainingProblem(task, project), task

    return make_problem


@pytest.fixture
def mask(tiny_llm):
    """A mask from its bits, as text."""
    return lambda bits: PruningMask.from_bits(tiny_llm.shape, [int(bit) for bit in bits])


def score(bits: str) -> float:
    return 1 - sum(position + 1 for position, bit in enumerate(bits) if bit == "0") / 36


def test_rewards_are_relative_to_the_greedy_mask_of_the_scenario(make, mask):
    problem, task = make(100)
    (outcome,) = problem.evaluate_many([(mask("11110110"), WORK, budget_for(6))])
    assert outcome.evaluated and outcome.fits
    assert outcome.score == pytest.approx(score("11110110"))
    assert outcome.greedy_reward == pytest.approx(score("00111111"))  # the toy's optimum
    assert problem.reward(outcome) == pytest.approx((1 + 2 - 5 - 8) / 36)
    assert task.archive == {
        mask("11110110"): pytest.approx(score("11110110")),
        mask("00111111"): pytest.approx(score("00111111")),
    }


def test_both_masks_are_evaluated_in_one_call_and_paid_once(make, mask, monkeypatch):
    problem, task = make(100)
    calls = []
    evaluate_many = task.problem.evaluate_many
    monkeypatch.setattr(task.problem, "evaluate_many", lambda cases: calls.append(len(cases)) or evaluate_many(cases))
    cases = [(mask(bits), WORK, budget_for(6)) for bits in ("11110110", "11111100", "00111111")]
    problem.evaluate_many(cases)
    assert calls == [6]
    assert task.problem.evaluator.calls == task.problem.budget.spent == 3


def test_above_the_budget_is_paid_for_as_ever_and_not_archived(make, mask):
    problem, task = make(100)
    (outcome,) = problem.evaluate_many([(mask("11111111"), WORK, budget_for(6))])
    overshoot = 2 * SIZE_BYTES / budget_for(6)
    assert problem.reward(outcome) == pytest.approx(1 - 5 * overshoot - score("00111111"))
    assert list(task.archive) == [mask("00111111")]


def test_a_projected_mask_fits_and_is_the_one_that_is_evaluated(make, mask, tiny_llm):
    problem, _ = make(100, project=True)
    dense, spare = problem.evaluate_many(
        [(mask("11111111"), WORK, budget_for(6)), (mask("0" * 8), WORK, budget_for(3))]
    )
    assert dense.score == pytest.approx(score("00111111"))
    assert spare.score == pytest.approx(score("00000111"))  # what there is room for comes back


def test_the_nearest_evaluated_mask_answers_once_the_budget_is_used_up(make, mask):
    problem, task = make(3)
    first = [(mask(bits), WORK, budget_for(6)) for bits in ("11110110", "11111100")]
    problem.evaluate_many(first)  # with the greedy mask these are all
    assert task.problem.budget.left == 0 and (problem.evaluated_steps, problem.approximated_steps) == (2, 0)
    guess, known = problem.evaluate_many([(mask("01110110"), WORK, budget_for(6)), first[1]])
    assert not guess.evaluated and known.evaluated
    assert guess.score == pytest.approx(score("11110110"))  # one bit away; the others are four and three
    assert guess.footprint == footprint(task.problem.shape, mask("01110110"), WORK)
    assert (problem.evaluated_steps, problem.approximated_steps) == (3, 1)
    assert task.problem.evaluator.calls == task.problem.budget.spent == 3
    assert mask("01110110") not in task.archive


def test_of_equally_near_masks_the_worst_answers(make, mask):
    problem, _ = make(3)
    problem.evaluate_many([(mask(bits), WORK, budget_for(6)) for bits in ("01011111", "10101111")])
    # "10011111" is two bits from both and from the greedy "00111111", whose scores are 32 / 36, 30 / 36 and 33 / 36
    (guess,) = problem.evaluate_many([(mask("10011111"), WORK, budget_for(6))])
    assert guess.score == pytest.approx(30 / 36)


def test_a_mask_that_fits_is_not_answered_by_one_that_does_not(make, mask):
    problem, task = make(2)
    problem.evaluate_many([(mask("11111111"), WORK, budget_for(6))])
    assert list(task.problem.meter.known) == [mask("11111111"), mask("00111111")]
    fits, too_large = problem.evaluate_many(
        [(mask("11111100"), WORK, budget_for(6)), (mask("11111101"), WORK, budget_for(6))]
    )
    assert fits.score == pytest.approx(score("00111111"))  # four bits away; the dense mask is two
    assert too_large.score == pytest.approx(1.0)


def test_where_nothing_that_was_evaluated_fits_the_nearest_answers(make, mask):
    problem, _ = make(1)
    (first,) = problem.evaluate_many([(mask("11111110"), WORK, budget_for(7))])
    guess = problem.evaluate_many([(mask("00000000"), WORK, budget_for(1))])[0]
    assert first.score == guess.score == pytest.approx(score("11111110"))


def test_greedy_masks_wait_for_the_agents_own(make, mask):
    problem, task = make(1)
    problem.evaluate_many([(mask("11110110"), WORK, budget_for(6))])
    assert list(task.problem.meter.known) == [mask("11110110")]


def test_a_guess_takes_less_than_a_millisecond(make, tiny_llm):
    problem, task = make(200)  # 199 of the other masks and the dense one, which the greedy order keeps
    shape, generator = task.problem.shape, np.random.default_rng(0)
    masks = [PruningMask.from_bits(shape, [number >> i & 1 for i in range(8)]) for number in range(255)]
    generator.shuffle(masks)
    problem.evaluate_many([(mask, WORK, budget_for(8)) for mask in masks[:199]])
    cases = [(mask, WORK, budget_for(8)) for mask in masks[-16:]]
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        outcomes = problem.evaluate_many(cases)
        seconds.append((time.perf_counter() - started) / 16)
    assert not any(outcome.evaluated for outcome in outcomes)
    assert min(seconds) < 1e-3


def test_the_greedy_reward_is_that_of_the_order_policy(make, mask, tiny_llm):
    problem, task = make(100)
    work, budget_bytes = Workload(16, 2048), 10_000_000
    (outcome,) = problem.evaluate_many([(mask("0" * 8), work, budget_bytes)])
    greedy = OrderPolicy(tiny_llm.shape, task.importance.static).decide(work, budget_bytes)
    assert outcome.greedy_reward == pytest.approx(score("".join(str(int(bit)) for bit in greedy.keep)))
