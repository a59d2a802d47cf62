"""Cases that are evaluated together get the outcomes that they would get one after the other, and cost no more."""

import itertools

import pytest
import torch

from rap_env.errors import InfeasibleBudget, InvalidMask, InvalidWorkload, SearchExhausted
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint, smallest_bytes
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem
from tests.conftest import CountingEvaluator

WORK = Workload(4, 512)
PLENTY_BYTES = 10**9


class BackwardEvaluator(CountingEvaluator):
    """Evaluates from the last mask to the first; `asked` holds the masks of each call, in the problem's order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[PruningMask]] = []

    def evaluate_many(self, llm, masks, near=None):
        self.asked.append(list(masks))
        return super().evaluate_many(llm, masks[::-1], near)


class FailingThirdEvaluator(CountingEvaluator):
    """Fails at the third mask that it is to evaluate."""

    def evaluation_of(self, mask) -> Evaluation:
        if self.calls == 3:
            raise ZeroDivisionError("in the middle of several evaluations")
        return super().evaluation_of(mask)


@pytest.fixture
def problem(tiny_llm) -> PruningProblem:
    return PruningProblem(tiny_llm, BackwardEvaluator())


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    """One mask without component i for each i of 8; its score is 1 - (i + 1) / 36."""
    dense = PruningMask.all_kept(tiny_llm.shape)
    return [dense.drop(component) for component in dense.components]


@pytest.fixture
def store(tmp_path) -> ResultStore:
    with ResultStore(tmp_path / "results.db") as opened:
        yield opened


def plain_cases(masks) -> list:
    return [(mask, WORK, PLENTY_BYTES) for mask in masks]


def test_outcomes_come_in_the_order_of_the_cases(problem, masks):
    outcomes = problem.evaluate_many(plain_cases([masks[i] for i in (5, 0, 7, 2)]))
    assert [outcome.score for outcome in outcomes] == pytest.approx([1 - n / 36 for n in (6, 1, 8, 3)])
    assert not any(outcome.from_store for outcome in outcomes)
    assert problem.evaluator.calls == problem.meter.fresh_evaluations == problem.budget.spent == 4


def test_each_case_has_its_own_workload_and_budget(problem, masks):
    workloads = [Workload(1, 64), Workload(8, 1024), Workload(2, 100, 28)]
    budgets = [PLENTY_BYTES, smallest_bytes(problem.shape, workloads[1]), 400_000]
    cases = list(zip([masks[3], masks[3], masks[6]], workloads, budgets, strict=True))
    outcomes = problem.evaluate_many(cases)
    assert [outcome.footprint for outcome in outcomes] == [footprint(problem.shape, m, w) for m, w, _ in cases]
    assert [outcome.budget_bytes for outcome in outcomes] == budgets
    assert [outcome.fits for outcome in outcomes][:2] == [True, False]
    assert outcomes[0].evaluation == outcomes[1].evaluation


def test_duplicates_in_one_call_are_measured_once(problem, masks):
    repeated = [masks[1], masks[4], masks[1], masks[1], masks[4]]
    outcomes = problem.evaluate_many(plain_cases(repeated))
    assert [outcome.score for outcome in outcomes] == pytest.approx([1 - n / 36 for n in (2, 5, 2, 2, 5)])
    assert problem.evaluator.asked == [[masks[1], masks[4]]]
    assert problem.meter.fresh_evaluations == problem.budget.spent == 2
    assert not any(outcome.from_store for outcome in outcomes), "none was known before the call"


def test_what_is_stored_or_known_is_not_measured_again(tiny_llm, masks, store):
    PruningProblem(tiny_llm, CountingEvaluator(), store).evaluate_many(plain_cases(masks[:2]))
    problem = PruningProblem(tiny_llm, BackwardEvaluator(), store)
    problem.evaluate(masks[2], WORK, PLENTY_BYTES)
    outcomes = problem.evaluate_many(plain_cases(masks[:5]))
    assert problem.evaluator.asked == [[masks[2]], masks[3:5]], "the rest is evaluated in one call"
    assert [outcome.from_store for outcome in outcomes] == [True, True, True, False, False]
    assert [outcome.score for outcome in outcomes] == pytest.approx([1 - n / 36 for n in (1, 2, 3, 4, 5)])
    assert len(store) == problem.budget.spent == 5
    assert problem.evaluate_many(plain_cases(masks[:5])) == outcomes
    assert len(problem.evaluator.asked) == 2, "nothing was left to ask"


def test_no_cases_have_no_outcomes(problem):
    assert problem.evaluate_many([]) == []
    assert problem.evaluator.asked == [] and problem.budget.spent == 0


def test_budget_that_does_not_cover_all_cases_evaluates_and_counts_none(tiny_llm, masks, store):
    problem = PruningProblem(tiny_llm, CountingEvaluator(), store, budget=TokenBudget(4))
    problem.evaluate_many(plain_cases(masks[:2]))
    with pytest.raises(SearchExhausted, match="2 of 4 tokens are spent; 3 more were asked for"):
        problem.evaluate_many(plain_cases(masks[:5]))
    assert problem.evaluator.calls == problem.budget.spent == len(store) == 2
    problem.evaluate_many(plain_cases(masks[:4] * 2))  # two known ones, two new ones, all of them twice
    assert problem.budget.left == 0 and problem.evaluator.calls == 4


@pytest.mark.parametrize(
    ("error", "spoil"),
    [
        (InfeasibleBudget, lambda mask, shape: (mask, WORK, smallest_bytes(shape, WORK) - 1)),
        (InvalidWorkload, lambda mask, shape: (mask, Workload(1, 8192, 1), PLENTY_BYTES)),
        (InvalidMask, lambda mask, shape: (PruningMask.all_kept(build_tiny_llm(n_layers=3).shape), WORK, PLENTY_BYTES)),
    ],
)
@pytest.mark.parametrize("position", [0, 2])
def test_one_bad_case_refuses_the_call_before_anything_is_evaluated(problem, masks, error, spoil, position):
    cases = plain_cases(masks[:3])
    cases[position] = spoil(masks[position], problem.shape)
    with pytest.raises(error):
        problem.evaluate_many(cases)
    assert problem.evaluator.asked == [] and problem.budget.spent == problem.meter.fresh_evaluations == 0


def test_each_finished_evaluation_is_stored_before_the_next_is_evaluated(tiny_llm, masks, store):
    class Watching(CountingEvaluator):
        def evaluation_of(self, mask) -> Evaluation:
            stored.append(len(store))
            return super().evaluation_of(mask)

    stored = []
    PruningProblem(tiny_llm, Watching(), store).evaluate_many(plain_cases(masks[:4]))
    assert stored == [0, 1, 2, 3]


def test_what_was_finished_before_a_failure_is_kept(tiny_llm, masks, store):
    failing = PruningProblem(tiny_llm, FailingThirdEvaluator(), store)
    with pytest.raises(ZeroDivisionError):
        failing.evaluate_many(plain_cases(masks[:5]))
    assert failing.meter.fresh_evaluations == len(store) == 2
    healthy = PruningProblem(tiny_llm, BackwardEvaluator(), store)
    outcomes = healthy.evaluate_many(plain_cases(masks[:5]))
    assert healthy.evaluator.asked == [masks[2:5]]
    assert [outcome.from_store for outcome in outcomes] == [True, True, False, False, False]


def test_outcomes_are_exactly_those_of_one_after_the_other(tiny_llm):
    windows = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(0))
    bits = itertools.islice(itertools.product((1, 0), repeat=8), 0, 256, 23)
    masks = [PruningMask.from_bits(tiny_llm.shape, keep) for keep in bits]
    cases = [(mask, Workload(index, 100), 10**6) for index, mask in enumerate(masks, 1)]
    together = PruningProblem(tiny_llm, PerplexityEvaluator(windows, "toy")).evaluate_many(cases)
    alone = PruningProblem(tiny_llm, PerplexityEvaluator(windows, "toy"))
    assert together == [alone.evaluate(*case) for case in cases]
    assert len({outcome.score for outcome in together}) == len(cases) == 12
