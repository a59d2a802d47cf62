"""Cheap-to-dear selection: every stage judges the survivors of the one before, and counts what it judged."""

import pytest

from rap_env.errors import SearchExhausted
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.problem import EvaluationBudget, PruningProblem
from rap_env.staged import Stage, select_in_stages
from tests.conftest import CountingEvaluator

WORK, PLENTY_BYTES = Workload(1, 128), 10**9


class Misled(CountingEvaluator):
    """A cheap judge that takes the mask without component 7 for the best."""

    def judge(self, mask):
        evaluation = super().judge(mask)
        return type(evaluation)(2.0, evaluation.tasks, 1, 0.0) if not mask.keep[7] else evaluation


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    """Eight masks that drop one component each, worst first: component i costs more than component i - 1."""
    dense = PruningMask.all_kept(tiny_llm.shape)
    return [dense.drop(component) for component in reversed(dense.components)]


def problem_of(llm, evaluator=None, limit=None) -> PruningProblem:
    return PruningProblem(llm, evaluator or CountingEvaluator(), budget=EvaluationBudget(limit))


def test_each_stage_judges_the_survivors_of_the_one_before(tiny_llm, masks):
    stages = [Stage(problem_of(tiny_llm), survivors) for survivors in (4, 2, 1)]
    best = select_in_stages(stages, masks, WORK, PLENTY_BYTES)
    assert [mask for mask, _outcome in best] == [masks[-1]]
    assert best[0][1].score == pytest.approx(1 - 1 / 36)
    assert [stage.problem.budget.spent for stage in stages] == [8, 4, 2]


def test_survivors_come_best_first_with_the_last_stages_outcomes(tiny_llm, masks):
    stages = [Stage(problem_of(tiny_llm, Misled()), 3), Stage(problem_of(tiny_llm), 3)]
    best = select_in_stages(stages, masks, WORK, PLENTY_BYTES)
    # The cheap stage brings the worst mask along; the dear one puts it last.
    assert [mask for mask, _outcome in best] == [masks[-1], masks[-2], masks[0]]
    assert best[-1][1].score == pytest.approx(1 - 8 / 36)


def test_equal_candidates_are_judged_once(tiny_llm, masks):
    stage = Stage(problem_of(tiny_llm), 8)
    assert len(select_in_stages([stage], [*masks, *masks], WORK, PLENTY_BYTES)) == 8
    assert stage.problem.budget.spent == 8


def test_an_exhausted_stage_judges_nothing(tiny_llm, masks):
    stage = Stage(problem_of(tiny_llm, limit=7), 1)
    with pytest.raises(SearchExhausted):
        select_in_stages([stage], masks, WORK, PLENTY_BYTES)
    assert stage.problem.budget.spent == 0


def test_no_stage_and_no_survivor_are_refused(tiny_llm, masks):
    with pytest.raises(ValueError, match="at least one stage"):
        select_in_stages([], masks, WORK, PLENTY_BYTES)
    with pytest.raises(ValueError, match="at least 1 survivor; got 0"):
        Stage(problem_of(tiny_llm), 0)
