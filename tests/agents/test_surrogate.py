"""Bayesian optimisation finds what few evaluations can't, and fills the gaps between them with predictions."""

import itertools

import numpy as np
import pytest

from agents.driver import run_search
from agents.surrogate import SurrogateAgent
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.scenario import scenario_grid
from rap_env.policies import OrderPolicy
from tests.agents.cases import (
    EachCosts,
    Neighbours,
    decided,
    interacting,
    make_task,
    mean_score,
    names_of,
    optimum,
)
from tests.conftest import TOY_WINDOWS


@pytest.fixture(scope="module")
def tall_llm():
    return build_tiny_llm(n_layers=12)


@pytest.fixture(autouse=True)
def few_predictions(monkeypatch):
    monkeypatch.setattr("agents.surrogate._PREDICTED", 16)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_few_evaluations_find_what_a_wrong_order_hides(tiny_llm, in_flight):
    task = make_task(tiny_llm, 48)
    result = run_search(SurrogateAgent(), task, in_flight)
    best = np.mean([optimum(tiny_llm.shape, scenario) for scenario in task.scenarios])
    start = mean_score(OrderPolicy(tiny_llm.shape, names_of(tiny_llm)), task.scenarios)
    assert start < 0.9 * best and mean_score(result.policy, task.scenarios) > 0.98 * best
    assert result.evaluations == result.tokens == 48
    assert result.details["predictor_errors"][-1] < 0.02


@pytest.mark.slow
def test_scenarios_between_those_of_the_search_get_predicted_masks(tall_llm, monkeypatch):
    held_out = scenario_grid(tall_llm.shape, [(1, 128), (16, 2048)], [0.85, 0.75])
    reached: dict[int, list[float]] = {0: [], 48: []}
    for n_predicted, seed in itertools.product(reached, range(2)):
        monkeypatch.setattr("agents.surrogate._PREDICTED", n_predicted)
        task = make_task(tall_llm, 60, EachCosts(), workloads=[(1, 128), (16, 2048)], ratios=[0.6], seed=seed)
        result = run_search(SurrogateAgent(), task)
        reached[n_predicted].append(mean_score(result.policy, held_out, EachCosts.rule))
        assert result.evaluations == 60, "predicted masks cost no evaluation"
        assert n_predicted or set(decided(result.policy, task.scenarios)) <= task.archive.keys()
    assert not set(decided(result.policy, held_out)) <= task.archive.keys()
    assert np.mean(reached[48]) > np.mean(reached[0]) + 0.01


def test_it_learns_from_what_the_ranking_measured_elsewhere(tall_llm):
    generator, errors = np.random.default_rng(0), []
    scenarios = {"workloads": [(1, 128), (16, 2048)], "ratios": [0.8, 0.6]}
    measured = [PruningMask.from_bits(tall_llm.shape, generator.random(24) < 0.7) for _ in range(100)]
    order = OrderPolicy(tall_llm.shape, names_of(tall_llm))
    measured += decided(order, make_task(tall_llm, **scenarios).scenarios)
    for known in ({}, {mask: 5.0 - 2.0 * interacting(mask.keep) for mask in measured}):
        task = make_task(tall_llm, 30, Neighbours(), known=known, **scenarios)
        errors.append(run_search(SurrogateAgent(), task).details["predictor_errors"][0])
        assert not task.archive.keys() & known.keys() - set(measured[100:]), "they are hints, no scores"
    assert errors[1] < 0.7 * errors[0]


def test_scores_that_the_ranking_measured_are_not_asked_for_again(tiny_llm):
    asked = []

    class Recording(SurrogateAgent):
        def propose(self):
            cases = super().propose()
            asked.extend(case.mask for case in cases)
            return cases

    ranking = greedy_sequential_importance(tiny_llm, TOY_WINDOWS, exact=True)
    evaluator = PerplexityEvaluator(TOY_WINDOWS, "search")
    task = make_task(tiny_llm, ranking.tokens + 40 * TOY_WINDOWS.numel(), evaluator, order=None, exact=True)
    result = run_search(Recording(), task)
    assert result.evaluations == 40 and ranking.known.keys() <= task.archive.keys()
    assert len(asked) > 16 and not ranking.known.keys() & set(asked)
