"""Every agent in conf/agent keeps the one contract, and those that learn do so where the optimum is known."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from agents.base import SearchResult, Task
from agents.sb3 import Sb3Agent
from rap_env.errors import UnknownName
from rap_env.evaluation.evaluator import Evaluation
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.policies import OrderPolicy, Policy, RandomPolicy, load_policy, save_policy
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.conftest import TOY_WINDOWS, CountingEvaluator

CONF = Path(__file__).parents[2] / "conf"
AGENTS = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
LIMIT = 40
STEPWISE = [("dqn", "rap/SequentialPruning-v0"), ("maskable_ppo", "rap/SequentialPruning-v0")]


def build_agent(name: str, **changes):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"agent={name}"]).agent
    for key, value in changes.items():
        if key in config:
            config[key] = value
    return instantiate(config)


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


@pytest.fixture
def search(
    tiny_llm, toy_problem, toy_importance, toy_sampler, grid, tmp_path
) -> Callable[..., tuple[SearchResult, Task]]:
    """Searches with the agent of a YAML, on a problem of its own."""
    numbers = itertools.count()

    def run(name: str, seed: int = 0, total_steps: int = 64) -> tuple[SearchResult, Task]:
        problem = PruningProblem(tiny_llm, type(toy_problem.evaluator)(), budget=EvaluationBudget(LIMIT))
        task = Task(
            problem, toy_importance, toy_sampler, grid, TOY_WINDOWS, seed, tmp_path / f"training{next(numbers)}"
        )
        return build_agent(name, total_steps=total_steps, generations=5).search(task), task

    return run


def masks(policy: Policy, grid: list[Scenario]) -> list[PruningMask]:
    return [policy.decide(scenario.workload, scenario.budget_bytes) for scenario in grid]


def weights_equal(left: Policy, right: Policy) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", AGENTS)
def test_search_ends_as_a_feasible_policy_that_its_seed_decides(name, search, grid, tmp_path, monkeypatch):
    monkeypatch.setattr("agents.imitation._STEPS", 40, raising=False)  # for speed
    (result, task), (twin, _), (other, _) = (search(name, seed) for seed in (0, 0, 1))
    assert result.evaluations == task.problem.budget.spent == len(task.problem.budget.asked) <= LIMIT
    assert task.problem.evaluator.calls == task.problem.fresh_evaluations == result.evaluations
    assert not task.problem.llm.mask.dropped, "the model is dense again"
    decided = masks(result.policy, grid)
    for mask, scenario in zip(decided, grid, strict=True):
        fits = footprint(task.problem.shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes
        assert fits or name == "dense"
    read = load_policy(save_policy(result.policy, tmp_path / "policy"))
    assert type(read) is type(result.policy)
    assert masks(read, grid) == decided == masks(twin.policy, grid)
    assert weights_equal(read, result.policy) and weights_equal(twin.policy, result.policy)
    assert read.parameters() == result.policy.parameters() == twin.policy.parameters()
    assert not result.policy.tensors() or not weights_equal(other.policy, result.policy)


@pytest.mark.parametrize(
    ("algorithm", "environment"),
    [("ppo", "rap/Pruning-v0"), ("a2c", "rap/Pruning-v0"), *STEPWISE],
)
def test_training_stops_when_the_evaluations_are_used_up(algorithm, environment, wrong_task, grid):
    problem = PruningProblem(wrong_task.problem.llm, LastIsLeast(), budget=EvaluationBudget(9))
    result = Sb3Agent(algorithm, environment, 5000, warm_start=False, network={"width": 8}).search(
        replace(wrong_task, problem=problem)
    )
    assert problem.budget.exhausted and result.evaluations == problem.fresh_evaluations == 9
    assert result.details["steps"] < 2000
    assert len(masks(result.policy, grid)) == len(grid)


def test_unknown_algorithms_and_environments_are_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="algorithm 'pppo'; did you mean ppo"):
        Sb3Agent("pppo", "rap/Pruning-v0", 1)
    with pytest.raises(UnknownName, match="environment 'rap/Pruning-v9'; did you mean rap/Pruning-v0"):
        Sb3Agent("ppo", "rap/Pruning-v9", 1)
    with pytest.raises(ValueError, match="dqn acts one component at a time: use environment=rap/SequentialPruning-v0"):
        Sb3Agent("dqn", "rap/Pruning-v0", 1)


# From here on: learning where the optimum is known. Component i of 8 costs (8 - i) / 36 of the score, so the best order
# drops the last component first. The importance order that agents are given drops the first one first.


class LastIsLeast(CountingEvaluator):
    """Judges by a rule that contradicts the components' own order."""

    identity = {"evaluator": "last is least"}

    def judge(self, mask) -> Evaluation:
        score = score_of(mask.keep)
        return Evaluation(score, {"toy": {"acc": score, "smooth_acc": score, "items": 1}}, tokens=1, seconds=0.0)


def score_of(keep: tuple) -> float:
    return 1.0 - sum(8 - position for position, bit in enumerate(keep) if not bit) / 36


def optimum(shape, scenario: Scenario) -> float:
    """The best score of all 256 masks that fit."""
    candidates = (PruningMask.from_bits(shape, bits) for bits in itertools.product((0, 1), repeat=8))
    return max(
        score_of(mask.keep)
        for mask in candidates
        if footprint(shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes
    )


def mean_score(policy: Policy, grid: list[Scenario]) -> float:
    return float(np.mean([score_of(mask.keep) for mask in masks(policy, grid)]))


@pytest.fixture
def wrong_task(tiny_llm, toy_sampler, tmp_path) -> Task:
    names = [component.name for component in tiny_llm.shape.components]
    problem = PruningProblem(tiny_llm, LastIsLeast())
    return Task(problem, ImportanceSource(names), toy_sampler, [], TOY_WINDOWS, 0, tmp_path / "training")


@pytest.mark.parametrize(
    ("algorithm", "environment", "steps", "hyperparameters"),
    [
        ("ppo", "rap/Pruning-v0", 3072, {"n_steps": 128, "batch_size": 128, "n_epochs": 4}),
        ("maskable_ppo", "rap/SequentialPruning-v0", 2048, {"n_steps": 256, "batch_size": 128, "n_epochs": 4}),
    ],
)
def test_learning_finds_what_a_wrong_importance_order_hides(
    algorithm, environment, steps, hyperparameters, wrong_task, tiny_llm, grid, tmp_path
):
    hyperparameters |= {"learning_rate": 3e-3, "gamma": 1.0}

    def train(total_steps: int) -> float:
        agent = Sb3Agent(algorithm, environment, total_steps, False, None, hyperparameters)
        task = replace(wrong_task, folder=tmp_path / str(total_steps))
        return mean_score(agent.search(task).policy, grid)

    best = np.mean([optimum(tiny_llm.shape, scenario) for scenario in grid])
    chance = np.mean([mean_score(RandomPolicy(tiny_llm.shape, seed), grid) for seed in range(20)])
    start, learned = train(0), train(steps)
    assert learned > start + 0.1
    assert learned > chance + 0.05
    assert chance < 0.9 * best and 0.95 * best < learned <= best


def test_random_masks_stay_below_the_optimum(tiny_llm, grid):
    best = [optimum(tiny_llm.shape, scenario) for scenario in grid]
    for seed in range(5):
        scores = [score_of(mask.keep) for mask in masks(RandomPolicy(tiny_llm.shape, seed), grid)]
        assert all(score <= limit for score, limit in zip(scores, best, strict=True))
        assert np.mean(scores) < np.mean(best) - 0.05


def test_true_order_is_optimal_where_all_components_free_the_same_bytes(tiny_llm):
    shape = tiny_llm.shape
    # an attention frees 4 * 3072 + 128 bytes a token, an MLP 4 * 6144: equal at 96 tokens
    grid = scenario_grid(shape, [(1, 96), (3, 32)], [0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    policy = OrderPolicy(shape, [component.name for component in reversed(shape.components)])
    for mask, scenario in zip(masks(policy, grid), grid, strict=True):
        assert score_of(mask.keep) == pytest.approx(optimum(shape, scenario))


def test_true_order_is_never_better_than_the_optimum_and_close_to_it(tiny_llm, grid):
    policy = OrderPolicy(tiny_llm.shape, [component.name for component in reversed(tiny_llm.shape.components)])
    for mask, scenario in zip(masks(policy, grid), grid, strict=True):
        best = optimum(tiny_llm.shape, scenario)
        assert best - 6 / 36 <= score_of(mask.keep) <= best + 1e-12
