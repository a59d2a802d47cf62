"""An evaluated mask is an example for other contexts: there its own fractions are an action that ends as this mask."""

import numpy as np
import pytest

from agents.driver import run_search
from agents.fastforward import FastForward
from agents.relabelling import RelabellingBuffer
from rap_env.envs.width import WidthEnv
from rap_env.errors import InvalidConfig
from rap_env.mask import PruningMask
from rap_env.memory.projection import Projection
from rap_env.memory.scenario import ScenarioSampler
from rap_env.observation import observe_widths
from tests.agents.cases import build_agent, make_task
from tests.agents.test_family_surrogate import Rivals, grouped  # noqa: F401 - a fixture


@pytest.mark.parametrize("kind", ["exact", "nested"])
def test_every_added_example_is_what_the_environment_would_have_answered(grouped, kind, monkeypatch):  # noqa: F811
    task, projection = make_task(grouped, 10**6, Rivals()), Projection(kind, 1e-12, "affine")
    sampler, contexts = ScenarioSampler((1, 16), (128, 2048), (0.4, 0.95)), []

    def observe(shape, scenario, mask, kinds):
        contexts.append(scenario)
        return observe_widths(shape, scenario, mask, kinds)

    monkeypatch.setattr("agents.relabelling.observe_widths", observe)
    env = WidthEnv(problem=task.problem, sampler=sampler, projection=kind, p_min=1e-12, reading="affine")
    own = {"shape": grouped.shape, "sampler": sampler, "copies": 6, "seed": 0}
    buffer = RelabellingBuffer(400, env.observation_space, env.action_space, "cpu", n_envs=1, **own)
    lived, rewards = [], {}
    for episode in range(20):
        seen, _info = env.reset(seed=episode)
        action = env.action_space.sample()
        end, reward, *_flags, info = env.step(action)
        rewards[info["mask"]] = reward
        lived.append(buffer.pos)
        batch = {name: entry[None] for name, entry in seen.items()}
        arguments = batch, batch, action[None], np.array([reward]), np.ones(1), [{"terminal_observation": end}]
        buffer.add(*arguments)
    added = [place for place in range(buffer.pos) if place not in lived]
    assert len(added) == len(contexts) > 2 * len(lived), "most masks are examples for several contexts"
    for place, context in zip(added, contexts, strict=True):
        mask = projection.mask(grouped.shape, buffer.actions[place, 0], context.workload, context.budget_bytes)
        assert buffer.rewards[place, 0] == pytest.approx(rewards[mask])
        seen = observe_widths(grouped.shape, context, PruningMask.all_kept(grouped.shape))
        assert all(np.array_equal(buffer.observations[name][place, 0], entry) for name, entry in seen.items())


def test_sac_learns_from_relabelled_examples_within_its_tokens(grouped):  # noqa: F811
    agent = build_agent("sac", **{"hyperparameters.learning_starts": 15, "hyperparameters.gradient_steps": 2})
    task = make_task(grouped, 60, Rivals())
    result = run_search(agent, task)
    assert result.evaluations == 60 and result.details["exhausted"]


def test_who_keeps_no_examples_has_none_to_relabel():
    with pytest.raises(InvalidConfig, match="expected sac or td3 with"):
        FastForward("ppo", relabelled=2, projection={"reading": "affine"})
    with pytest.raises(InvalidConfig, match="got sac with"):
        FastForward("sac", relabelled=2)
