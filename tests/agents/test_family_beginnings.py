"""A search that begins as a learned policy: its slopes are what sites cost, and it goes on from the policy's masks."""

import numpy as np
import pytest

from agents.driver import evaluated_masks, run_search
from agents.family_answers import ClimbedTable
from agents.family_beginnings import LearnedSlopes, curves_along
from agents.family_surrogate import FamilySurrogateAgent
from agents.model_gradient import ModelGradientAgent
from rap_env.errors import SearchExhausted
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.memory.scenario import scenario_grid
from tests.agents.cases import decided, fits
from tests.agents.test_family_surrogate import BETWEEN, grouped  # noqa: F401 - a fixture
from tests.agents.test_model_gradient import EACH, task_of, written

STEPS = 8


def searching(steps: int = STEPS) -> FamilySurrogateAgent:
    learner = ModelGradientAgent(batch=4, learning_rate=0.1, steps=steps)
    return FamilySurrogateAgent(LearnedSlopes(learner), answer=ClimbedTable(12))


def test_slopes_at_many_widths_add_up_to_what_sites_cost():
    generator, n_parts, weights = np.random.default_rng(0), np.array([3, 24]), np.array([0.3, 2.0])
    widths = generator.uniform(0, n_parts, (400, 2))
    slopes = -2.0 * weights * (1.0 - widths / n_parts) / n_parts  # of weights * (dropped part)^2
    for curve, parts, weight in zip(curves_along(widths, slopes, n_parts), n_parts, weights, strict=True):
        assert curve == pytest.approx(weight * (1.0 - np.arange(parts + 1) / parts) ** 2, abs=0.06 * weight)
        assert curve[-1] == 0.0


def test_beyond_the_widths_that_were_visited_the_nearest_slope_counts():
    ((*_between, last), steep) = curves_along(np.array([[2.0, 1.0]]), np.array([[-0.5, -3.0]]), [4, 2])
    assert last == 0.0 and steep == [6.0, 3.0, 0.0]


def test_the_search_goes_on_from_the_policy_and_ends_with_better_masks(grouped):  # noqa: F811
    grid, losses = scenario_grid(grouped.shape, *BETWEEN), []
    for agent in (ModelGradientAgent(batch=4, learning_rate=0.1, steps=STEPS), searching()):
        task = task_of(grouped, STEPS * EACH + 80 * written(grouped).numel())
        result = run_search(agent, task)
        masks = decided(result.policy, grid)
        assert all(fits(mask, grouped.shape, each) for mask, each in zip(masks, grid, strict=True))
        evaluated = PerplexityEvaluator(written(grouped), "text").evaluate_many(grouped, list(dict.fromkeys(masks)))
        of_masks = {mask: -evaluation.score for mask, evaluation in evaluated}
        losses.append(np.mean([of_masks[mask] for mask in masks]))
    assert losses[1] < losses[0] - 0.1, losses
    assert len(result.details["losses"]) == STEPS
    assert [entry.owner for entry in task.problem.budget.history].count("width gradients") == STEPS
    assert result.evaluations == len(evaluated_masks(task)) == 80


@pytest.mark.parametrize(("n_tokens", "expected"), [(STEPS * EACH, "more were asked for"), (EACH - 1, "a step of the")])
def test_a_budget_that_does_not_pay_for_what_it_begins_with_is_refused(grouped, n_tokens, expected):  # noqa: F811
    with pytest.raises(SearchExhausted, match=expected):
        run_search(searching(), task_of(grouped, n_tokens))
