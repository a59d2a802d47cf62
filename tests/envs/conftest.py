"""Environments on the toy parts, and one scenario for them."""

import gymnasium
import pytest

from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem

WORK = Workload(2, 512)
WEIGHTS = {"accuracy": 1.0, "overshoot": -2.0}


@pytest.fixture
def make(tiny_llm, toy_problem, toy_importance, toy_sampler):
    """Makes an environment on the toy parts; each call gets a problem of its own."""

    def make_env(name: str, **arguments) -> gymnasium.Env:
        parts = {
            "problem": PruningProblem(tiny_llm, type(toy_problem.evaluator)(), reward_weights=WEIGHTS),
            "sampler": toy_sampler,
        }
        if name != "rap/Width-v0":  # it observes no ranking
            parts["importance"] = toy_importance
        return gymnasium.make(name, **parts | arguments)

    return make_env


@pytest.fixture
def scenario(tiny_llm) -> Scenario:
    return Scenario.from_ratio(tiny_llm.shape, WORK, 0.75)
