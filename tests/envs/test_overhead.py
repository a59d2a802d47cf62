"""What an environment costs when evaluating is free: a few passes of the small network that learns from it, or less."""

import gymnasium
import numpy as np
import pytest

from rap_env.importance.source import ImportanceSource
from rap_env.llm.loading import build_tiny_llm
from rap_env.problem import PruningProblem
from tests.envs.passes import LIMIT, passes

N_LAYERS = 30  # 60 components, as SmolLM2-135M has
N_ENVS = 16


@pytest.fixture
def parts(toy_problem):
    llm = build_tiny_llm(n_layers=N_LAYERS)
    names = [component.name for component in llm.shape.components]
    return {"problem": PruningProblem(llm, type(toy_problem.evaluator)()), "importance": ImportanceSource(names)}


def test_one_step_environment_answers_at_once_when_the_mask_is_known(parts):
    env = gymnasium.make("rap/Pruning-v0", **parts)
    env.reset(seed=0)
    action = np.arange(2 * N_LAYERS) % 2
    env.step(action)
    assert passes(env.reset) < LIMIT
    assert passes(lambda: env.step(action), before=env.reset) < LIMIT
    assert env.unwrapped.problem.evaluator.calls == 1


def test_sequential_environment_answers_at_once(parts):
    env = gymnasium.make("rap/SequentialPruning-v0", **parts)
    env.reset(seed=0)
    stop = 2 * N_LAYERS
    assert passes(env.reset) < LIMIT
    assert passes(lambda: env.step(5), before=env.reset) < LIMIT
    assert passes(lambda: env.step(stop), before=env.reset) < LIMIT
    assert passes(env.get_wrapper_attr("action_masks")) < LIMIT


@pytest.mark.parametrize("name", ["rap/Pruning-v0", "rap/SequentialPruning-v0"])
def test_vector_environment_costs_no_more_for_each_of_its_environments(parts, name):
    envs = gymnasium.make_vec(name, num_envs=N_ENVS, **parts)
    envs.reset(seed=0)
    actions = np.ones((N_ENVS, 2 * N_LAYERS), dtype=np.int8) if "Seq" not in name else np.full(N_ENVS, 2 * N_LAYERS)
    envs.step(actions)
    assert passes(envs.reset) / N_ENVS < LIMIT
    assert passes(lambda: envs.step(actions)) / N_ENVS < LIMIT  # with its autoresets
