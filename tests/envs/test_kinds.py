"""Workloads of kinds of text in `rap/Width-v0`: observed, rewarded by their kind, and told to policies."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from agents.base import Task
from agents.driver import run_search
from agents.fastforward import FastForward
from agents.relabelling import RelabellingBuffer
from rap_env.envs.pruning import PruningEnv
from rap_env.envs.width import WidthEnv
from rap_env.errors import InvalidConfig, UnknownName
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.mixture import KindsEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.memory.projection import Projection
from rap_env.memory.scenario import ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.policies import WidthPolicy, load_policy, save_policy
from rap_env.policies.width import WidthNetwork
from rap_env.problem import PruningProblem
from tests.conftest import TOY_WINDOWS

KINDS = ("code", "prose")
SAMPLER = ScenarioSampler((1, 4), (64, 256), (0.6, 0.95), kinds=KINDS)


@pytest.fixture
def problem(tiny_llm) -> PruningProblem:
    texts = {"code": TOY_WINDOWS, "prose": torch.flip(TOY_WINDOWS, (0, 1))}
    evaluator = KindsEvaluator({kind: PerplexityEvaluator(windows, kind) for kind, windows in texts.items()})
    return PruningProblem(tiny_llm, evaluator, reward_weights={"accuracy": 1.0})


def test_the_kind_is_observed_and_rewarded(problem):
    env = WidthEnv(problem=problem, sampler=SAMPLER)
    check_env(env, skip_render_check=True)
    action, seen = np.linspace(-1.0, 1.0, 8, dtype=np.float32), set()
    for seed in range(8):
        observation, info = env.reset(seed=seed)
        kind = info["scenario"].workload.kind
        assert observation["kind"].tolist() == [float(kind == each) for each in KINDS]
        *_, reward, _terminated, _truncated, info = env.step(action)
        assert reward == problem.meter.known[info["mask"]].of(kind).score
        seen.add(kind)
    assert seen == set(KINDS)


def test_who_does_not_observe_the_kind_has_no_workloads_of_kinds(problem):
    with pytest.raises(InvalidConfig, match="which rap/Width-v0 alone observes"):
        PruningEnv(problem=problem, sampler=SAMPLER)


def test_a_policy_is_told_the_kind_and_one_that_is_blind_to_it_decides_the_same(tiny_llm, tmp_path):
    shape, projection = tiny_llm.shape, Projection("nested", 1e-12, "affine")
    torch.manual_seed(0)
    knowing = WidthPolicy(shape, WidthNetwork(len(shape.components.sites), kinds=KINDS), projection)
    blind = WidthPolicy(shape, WidthNetwork(len(shape.components.sites), kinds=KINDS, blind_to=["kind"]), projection)
    for policy, actions in ((knowing, 3), (blind, 1)):
        policy = load_policy(save_policy(policy, tmp_path))
        found = {tuple(policy.action(Workload(2, 100, kind=kind), 10**6)) for kind in (*KINDS, "")}
        assert len(found) == actions, "of no kind is like an even mixture, which is neither"
    with pytest.raises(UnknownName, match="kind of text 'poems'; did you mean prose"):
        knowing.action(Workload(2, 100, kind="poems"), 10**6)


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_learners_end_as_policies_that_know_kinds(problem, algorithm):
    task = Task(problem.with_budget(TokenBudget(40 * problem.meter.tokens_each)), TOY_WINDOWS, SAMPLER, [], seed=0)
    agent = FastForward(algorithm, total_episodes=30, network={"layers": [8]})
    policy = run_search(agent, task).policy
    assert policy.parameters()["network"]["kinds"] == list(KINDS)
    found = {tuple(policy.action(Workload(2, 100, kind=kind), 10**6)) for kind in KINDS}
    assert len(found) == 2


def test_a_relabelled_example_is_of_the_kind_that_was_measured(problem):
    env = WidthEnv(problem=problem, sampler=SAMPLER, projection="nested", p_min=1e-12, reading="affine")
    own = {"shape": problem.shape, "sampler": SAMPLER, "copies": 8, "seed": 0}
    buffer = RelabellingBuffer(200, env.observation_space, env.action_space, "cpu", n_envs=1, **own)
    for episode in range(6):
        first = buffer.pos
        seen, _info = env.reset(seed=episode)
        action = env.action_space.sample()
        end, reward, *_flags, _info = env.step(action)
        batch = {name: entry[None] for name, entry in seen.items()}
        buffer.add(batch, batch, action[None], np.array([reward]), np.ones(1), [{"terminal_observation": end}])
        kinds = buffer.observations["kind"][first : buffer.pos, 0]
        assert (kinds == seen["kind"]).all() and len(kinds) >= 1
    assert buffer.pos > 6, "some were relabelled"
