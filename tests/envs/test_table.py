"""Environments on a table need no model, remember nothing, and answer at once."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rap_env.envs.table import TableProblem
from rap_env.errors import UnknownName
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.table import load_tables
from rap_env.memory.scenario import ScenarioSampler
from rap_env.problem import PruningProblem
from tests.envs.passes import LIMIT, passes

NAMES = ("rap/Width-v0", "rap/Pruning-v0", "rap/SequentialPruning-v0")


@pytest.mark.parametrize("name", NAMES)
def test_environments_run_on_the_table_that_ships(name):
    env = gymnasium.make(name, evaluation="table")
    env.reset(seed=0)
    stop = env.action_space.n - 1 if name == NAMES[2] else env.action_space.sample()
    _observation, reward, terminated, _truncated, info = env.step(stop)
    assert terminated and np.isfinite(reward)
    assert list(info["tasks"]) == ["table of wikitext2_valid.txt"]
    assert not env.unwrapped.problem.meter.known
    check_env(env.unwrapped, skip_render_check=True)  # text has no smooth accuracy, and a NaN is never equal to itself


def test_an_unknown_evaluation_is_refused():
    with pytest.raises(UnknownName, match="evaluation"):
        gymnasium.make("rap/Width-v0", evaluation="tables")


def test_outcomes_and_rewards_are_those_of_a_problem_with_a_budget():
    model, generator = load_tables(), np.random.default_rng(0)
    for weights in ({"accuracy": 1.0, "overshoot": -5.0}, {"perplexity_ratio": 1.0}):
        problem = TableProblem(model, weights)
        counted = problem.with_budget(TokenBudget(1_000_000))
        assert type(counted) is PruningProblem
        env = gymnasium.make("rap/Width-v0", problem=problem)
        for seed in range(5):
            _observation, info = env.reset(seed=seed)
            *_, info = env.step(generator.uniform(-1, 1, 60))
            scenario = info["scenario"]
            outcome = counted.evaluate(info["mask"], scenario.workload, scenario.budget_bytes)
            assert outcome == info["outcome"] and counted.reward(outcome) == problem.reward(info["outcome"])
            assert outcome.dense_score == info["outcome"].dense_score
    assert counted.budget.spent == 6 * 1024  # five masks and the dense one


def test_steps_are_fast():
    env = gymnasium.make("rap/Width-v0", evaluation="table", sampler=ScenarioSampler())
    env.reset(seed=0)
    actions = itertools.cycle(np.random.default_rng(0).uniform(-1, 1, (300, 60)).astype(np.float32))
    assert passes(env.reset) < LIMIT
    assert passes(lambda: env.step(next(actions)), before=env.reset) < LIMIT
