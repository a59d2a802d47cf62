"""The surrogate over a family: its moves fit, it finds better masks than its start, and answers by a table."""

from dataclasses import replace

import numpy as np
import pytest

from agents.driver import evaluated_masks, run_search
from agents.family_answers import ClimbedTable
from agents.family_surrogate import FamilySurrogateAgent
from agents.width_moves import WidthMoves
from agents.widths import SingleSiteGreedyAgent
from rap_env.llm import parts
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.policies import ArchivePolicy
from tests.agents.cases import LastIsLeast, decided, fits, make_task, mean_score
from tests.conftest import CountingEvaluator

SMALL = {"answer": ClimbedTable(12)}
BETWEEN = ([(2, 300), (12, 1500)], [0.85, 0.75, 0.65])  # contexts that no task knows


class Rivals(CountingEvaluator):
    """Parts cost the more the fewer are left, and neighbouring narrow sites cost more together."""

    identity = {"evaluator": "rivals"}

    @staticmethod
    def rule(widths, n_parts) -> float:
        gone = 1.0 - np.array(widths) / np.array(n_parts)
        weights = np.random.default_rng(1).uniform(0.05, 0.4, len(gone))
        return float(1.0 - weights @ gone**2 - 0.5 * (gone[1:] * gone[:-1]).sum())

    def evaluation_of(self, mask: PruningMask):
        score = self.rule(mask.widths, PruningMask.all_kept(_Shaped(mask)).widths)
        return super().evaluation_of(mask).__class__(score, {}, 1, 0.0)


class _Shaped:
    def __init__(self, mask: PruningMask) -> None:
        self.components = mask.components


@pytest.fixture
def grouped(monkeypatch) -> SwitchableLLM:
    """A model of 6 layers with 2 parts in each attention and 4 in each MLP."""
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 16)
    tiny = build_tiny_llm(n_layers=6)
    return SwitchableLLM(tiny.model, tiny.tokenizer, tiny.name, "group")


def score(policy, scenarios) -> float:
    masks = decided(policy, scenarios)
    return float(np.mean([Rivals.rule(mask.widths, PruningMask.all_kept(policy.shape).widths) for mask in masks]))


def test_moves_fit_and_leave_no_room_for_another_part(grouped):
    shape, generator = grouped.shape, np.random.default_rng(0)
    for scenario in scenario_grid(shape, *BETWEEN):
        moves = WidthMoves(shape, scenario)
        start = moves.fitted(np.array([PruningMask.all_kept(shape).widths]), generator)
        for widths, slack in zip(near := moves.neighbours(start[0], 20, generator), moves.slack(near), strict=True):
            mask = PruningMask.from_widths(shape, widths)
            assert slack == scenario.budget_bytes - footprint(shape, mask, scenario.workload).peak_bytes >= 0
            wider = [widths + one for one in np.eye(len(widths), dtype=int) if (widths + one <= moves.n_parts).all()]
            assert (moves.slack(np.array(wider)) < 0).all()
        assert len({tuple(widths) for widths in near}) > 5


def test_it_beats_the_greedy_walk_along_its_own_curves_on_budgets_that_it_was_never_asked_for(grouped):
    held_out = scenario_grid(grouped.shape, [(2, 300)], [0.85, 0.8, 0.75, 0.7])
    family = ScenarioSampler((2, 2), (300, 300), (0.65, 0.9))
    agents = (FamilySurrogateAgent(answer=ClimbedTable(24)), SingleSiteGreedyAgent(4, "search"))
    tasks = [replace(make_task(grouped, 90, Rivals()), sampler=family) for _agent in agents]
    surrogate, greedy = (
        score(run_search(agent, task).policy, held_out) for agent, task in zip(agents, tasks, strict=True)
    )
    assert surrogate > greedy + 0.01


def test_masks_are_proposed_once_and_fit_their_contexts_with_batches_in_flight(grouped):
    task = make_task(grouped, 80, Rivals())
    result = run_search(FamilySurrogateAgent(**SMALL), task, in_flight=3)
    masks = [mask for mask, _tokens in evaluated_masks(task)]
    assert len(masks) == len(set(masks)) == result.evaluations == 80
    grid = scenario_grid(grouped.shape, *BETWEEN)
    assert all(fits(mask, grouped.shape, each) for mask, each in zip(decided(result.policy, grid), grid, strict=True))


def test_a_larger_budget_repeats_the_evaluations_of_a_smaller_one(grouped):
    short, long = (make_task(grouped, limit, Rivals()) for limit in (80, 110))
    for task in (short, long):
        run_search(FamilySurrogateAgent(**SMALL), task)
    assert evaluated_masks(long)[:80] == evaluated_masks(short)


@pytest.mark.parametrize("limit", [13, 14, 24, 25])
def test_a_budget_that_pays_for_little_more_than_curves_ends_as_a_policy_too(limit, grouped):
    task = make_task(grouped, limit, Rivals())
    result = run_search(FamilySurrogateAgent(**SMALL), task)
    assert 13 <= result.evaluations <= limit
    grid = scenario_grid(grouped.shape, *BETWEEN)
    assert all(fits(mask, grouped.shape, each) for mask, each in zip(decided(result.policy, grid), grid, strict=True))


def test_a_search_ends_when_a_model_has_no_new_masks(tiny_llm):
    task = make_task(tiny_llm, evaluator=LastIsLeast())
    result = run_search(FamilySurrogateAgent(**SMALL), task)
    assert 50 < result.evaluations <= 256
    assert mean_score(result.policy, task.scenarios) > 0.5


def test_an_archive_that_fills_uses_what_is_left_and_goes_on_below_its_smallest_mask(grouped):
    shape = grouped.shape
    dense = PruningMask.all_kept(shape)
    order = [component.name for component in reversed(shape.components)]
    small = PruningMask.from_widths(shape, [1, 2] * 6)
    plain, filling = (ArchivePolicy(shape, [(small, 1.0)], order, fill) for fill in (False, True))
    (roomy, tight) = scenario_grid(shape, [(2, 300)], [0.9, 0.45])
    assert plain.decide(roomy.workload, roomy.budget_bytes) == small
    filled = filling.decide(roomy.workload, roomy.budget_bytes)
    assert set(small.kept) < set(filled.kept) < set(dense.kept) and fits(filled, shape, roomy)
    assert not fits(small, shape, tight)
    below = filling.decide(tight.workload, tight.budget_bytes)
    assert fits(below, shape, tight) and below != plain.decide(tight.workload, tight.budget_bytes)
