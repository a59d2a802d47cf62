"""Learning from predictions: the predictor knows what it was told, the policy follows it, both find the optimum."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from agents.base import Task
from agents.policy_gradient import PolicyGradient
from agents.random_search import RandomSearchAgent
from agents.surrogate import SurrogateAgent
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.predictor import ScorePredictor
from rap_env.importance.source import ImportanceSource
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.agents.test_agents import LastIsLeast, mean_score, optimum, score_of
from tests.conftest import TOY_WINDOWS, CountingEvaluator


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


@pytest.fixture
def wrong_task(tiny_llm, toy_sampler, grid, tmp_path) -> Task:
    """Its order drops the most important component first."""
    importance = ImportanceSource([component.name for component in tiny_llm.shape.components])
    return Task(PruningProblem(tiny_llm, LastIsLeast()), importance, toy_sampler, grid, TOY_WINDOWS, 0, tmp_path)


@pytest.fixture(scope="module")
def all_masks(tiny_llm) -> list[PruningMask]:
    return [PruningMask.from_bits(tiny_llm.shape, bits) for bits in itertools.product((0, 1), repeat=8)]


def interacting(mask: PruningMask) -> float:
    """Components cost what they cost alone, and more where their neighbour is gone too."""
    dropped = [not bit for bit in mask.keep]
    pairs = sum(first and second for first, second in itertools.pairwise(dropped))
    return score_of(mask.keep) - 0.1 * pairs


def test_a_quarter_of_all_masks_predicts_the_others(all_masks):
    chosen = np.random.default_rng(0).permutation(len(all_masks))[:64]
    judged = {all_masks[index]: interacting(all_masks[index]) for index in chosen}
    others = [mask for mask in all_masks if mask not in judged]
    truth = np.array([interacting(mask) for mask in others])
    predictor = ScorePredictor(judged)
    errors = np.abs(predictor.predict(others) - truth)
    assert errors.mean() < 0.15 * np.abs(truth - truth.mean()).mean()
    assert predictor.predict(list(judged)) == pytest.approx(list(judged.values()), abs=0.02)
    assert 0.3 < predictor.leave_one_out_error / np.abs(np.log1p(errors)).mean() < 3
    again = ScorePredictor(judged, settled=predictor)
    assert again.predict(others) == pytest.approx(predictor.predict(others), abs=1e-6)


def test_improvement_is_expected_of_what_is_thought_better_or_not_known(all_masks):
    judged = {mask: interacting(mask) for mask in all_masks[::9]}
    predictor = ScorePredictor(judged)
    gains = np.array([predictor.expected_improvement(all_masks, score) for score in (-0.2, 0.2, 0.6)])
    assert gains.min() >= 0.0 and np.all(np.diff(gains, axis=0) <= 1e-9)
    least = predictor.expected_improvement(all_masks, -20.0)  # everything betters it: only the means count
    assert np.argsort(least)[-5:].tolist() == np.argsort(predictor.predict(all_masks))[-5:].tolist()
    best = max(judged, key=judged.get)
    others = [mask for mask in all_masks if mask not in judged]
    known, *unknown = predictor.expected_improvement([best, *others], judged[best])
    assert known < max(unknown)


def test_cautious_predictions_are_below_the_plain_ones_most_where_least_is_known(all_masks):
    judged = {mask: interacting(mask) for mask in all_masks[::9]}
    predictor = ScorePredictor(judged)
    cost = {name: np.log1p(1.0 - getattr(predictor, name)(all_masks)) for name in ("cautious", "predict")}
    caution = dict(zip(all_masks, cost["cautious"] - cost["predict"], strict=True))
    assert min(caution.values()) > 0.0
    assert max(caution[mask] for mask in judged) < 0.2 * np.mean([caution[mask] for mask in all_masks])


def test_losses_of_a_ranking_help_where_they_say_something(all_masks):
    judged = {mask: interacting(mask) for mask in all_masks[::9]}
    others = [mask for mask in all_masks if mask not in judged]
    truth = np.array([interacting(mask) for mask in others])

    def error(losses) -> float:
        return float(np.abs(ScorePredictor(judged, losses=losses).predict(others) - truth).mean())

    measured = {mask: 5.0 - 2.0 * interacting(mask) for mask in all_masks[::2]}
    alone = error(None)
    assert error(measured) < 0.7 * alone
    noise = np.random.default_rng(0).normal(0.0, 0.02, len(measured))
    assert error({mask: loss + off for (mask, loss), off in zip(measured.items(), noise, strict=True)}) < alone
    useless = [{mask: -loss for mask, loss in measured.items()}, {mask: 1.0 for mask in measured}]
    useless.append({mask: measured[mask] for mask in [mask for mask in measured if mask in judged][:2]})
    assert [error(losses) for losses in useless] == [alone] * 3


def test_leaving_one_out_is_what_fitting_without_it_says(all_masks):
    judged = {mask: interacting(mask) for mask in all_masks[::9]}
    predictor = ScorePredictor(judged)
    best, errors = max(judged.values()), []
    for mask, score in judged.items():
        rest = {other: value for other, value in judged.items() if other != mask}
        if max(rest.values()) == best:  # the process is fitted to what lies below the best
            predicted = ScorePredictor(rest, settled=predictor).predict([mask])[0]
            errors.append(abs(np.log1p(best - predicted) - np.log1p(best - score)))
    assert predictor.leave_one_out_error == pytest.approx(np.mean(errors), rel=0.25)


def test_one_mask_is_not_enough_to_predict_from(all_masks):
    with pytest.raises(ValueError, match="at least two judged masks; got 1"):
        ScorePredictor({all_masks[0]: 1.0})


def test_the_policy_learns_to_propose_what_is_rewarded(tiny_llm):
    shape = tiny_llm.shape
    order = [component.name for component in shape.components]  # the wrong way round
    scenario = Scenario.from_ratio(shape, Workload(1, 128), 0.6)
    policy = PolicyGradient(shape, order, width=16, seed=0)

    def reward(masks) -> np.ndarray:
        return np.array([score_of(mask.keep) for mask in masks])

    start = policy.propose(scenario, 1)[0]
    rewards = [policy.step([scenario] * 4, reward) for _ in range(120)]
    learned = policy.propose(scenario, 1)[0]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.1
    assert score_of(learned.keep) > score_of(start.keep) + 0.1
    assert score_of(learned.keep) > 0.95 * optimum(shape, scenario)
    for mask in policy.propose(scenario, 8):
        assert footprint(shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes


@pytest.mark.parametrize("policy_steps", [0, 10])
def test_few_judged_masks_find_what_a_wrong_order_hides(wrong_task, grid, policy_steps):
    problem = PruningProblem(wrong_task.problem.llm, LastIsLeast(), budget=EvaluationBudget(48))
    result = SurrogateAgent(policy_steps=policy_steps, width=16).search(replace(wrong_task, problem=problem))
    best = np.mean([optimum(problem.shape, scenario) for scenario in grid])
    assert mean_score(result.policy, grid) > 0.98 * best
    assert result.evaluations == problem.budget.spent == 48
    assert result.details["predictor_errors"][-1] < 0.02


def test_it_beats_random_search_in_a_large_space(wrong_task):
    llm = build_tiny_llm("llama", n_layers=12)
    grid = scenario_grid(llm.shape, [(1, 128), (16, 2048)], [0.8, 0.6])
    importance = ImportanceSource([component.name for component in llm.shape.components])
    reached = []
    for agent in (SurrogateAgent(policy_steps=5, width=16), RandomSearchAgent()):
        problem = PruningProblem(llm, Neighbours(), budget=EvaluationBudget(80))
        policy = agent.search(replace(wrong_task, problem=problem, importance=importance, grid=grid)).policy
        masks = [policy.decide(scenario.workload, scenario.budget_bytes) for scenario in grid]
        reached.append(np.mean([interacting(mask) for mask in masks]))
    assert reached[0] > reached[1] + 0.2


def test_scenarios_between_the_told_ones_get_predicted_masks(wrong_task, monkeypatch):
    llm = build_tiny_llm("llama", n_layers=12)
    told, unseen = (scenario_grid(llm.shape, [(1, 128), (16, 2048)], ratios) for ratios in ([0.6], [0.85, 0.75]))
    importance = ImportanceSource([component.name for component in llm.shape.components])
    reached = []
    for n_predicted in (0, 64):
        monkeypatch.setattr("agents.surrogate._PREDICTED", n_predicted)
        problem = PruningProblem(llm, EachCosts(), budget=EvaluationBudget(60))
        result = SurrogateAgent().search(replace(wrong_task, problem=problem, importance=importance, grid=told))
        masks = [result.policy.decide(scenario.workload, scenario.budget_bytes) for scenario in unseen]
        reached.append(np.mean([EachCosts().judge(mask).score for mask in masks]))
        assert result.evaluations == problem.budget.spent == 60, "predicted masks cost no evaluation"
    assert not {mask.digest for mask in masks} <= problem.budget.asked
    assert reached[1] > reached[0]


class EachCosts(CountingEvaluator):
    """Every component costs something, in no order that anybody was told, and neighbours more together."""

    identity = {"evaluator": "each costs"}

    def judge(self, mask) -> Evaluation:
        costs = np.random.default_rng(0).uniform(0.02, 0.2, len(mask.keep))
        dropped = ~np.array(mask.keep, dtype=bool)
        score = 1.0 - costs[dropped].sum() - 0.05 * (dropped[1:] & dropped[:-1]).sum()
        return Evaluation(float(score), {"toy": {"acc": float(score), "items": 1}}, tokens=1, seconds=0.0)


def test_it_learns_from_what_the_ranking_measured(wrong_task):
    llm = build_tiny_llm("llama", n_layers=12)
    grid = scenario_grid(llm.shape, [(1, 128), (16, 2048)], [0.8, 0.6])
    order = [component.name for component in llm.shape.components]
    generator = np.random.default_rng(0)
    measured = [PruningMask.from_bits(llm.shape, generator.random(24) < 0.7) for _ in range(100)]
    measured += [OrderPolicy(llm.shape, order).decide(case.workload, case.budget_bytes) for case in grid]
    errors = []
    for known in ({}, {mask: 5.0 - 2.0 * interacting(mask) for mask in measured}):
        problem = PruningProblem(llm, Neighbours(), budget=EvaluationBudget(30))
        importance = ImportanceSource(order, known=known)
        result = SurrogateAgent(policy_steps=0).search(
            replace(wrong_task, problem=problem, importance=importance, grid=grid)
        )
        errors.append(result.details["predictor_errors"][0])
    assert errors[1] < 0.7 * errors[0]


class Neighbours(LastIsLeast):
    """Judges by a rule in which neighbours count."""

    identity = {"evaluator": "neighbours"}

    def judge(self, mask):
        evaluation = super().judge(mask)
        return replace(evaluation, score=interacting(mask), tasks={"toy": {"acc": interacting(mask), "items": 1}})
