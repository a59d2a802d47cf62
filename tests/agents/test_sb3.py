"""Stable-Baselines3 agents learn where the optimum is known, within a token budget, and repeat themselves exactly."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from agents.base import Task
from agents.driver import evaluated_masks, run_search
from agents.sb3 import Sb3Agent
from agents.training_problem import TrainingProblem
from agents.vec_env import TrainingVecEnv
from rap_env.envs.vector import PruningVectorEnv, SequentialPruningVectorEnv
from rap_env.errors import SearchExhausted, UnknownName
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.policies import OneStepPolicy, OrderPolicy, Policy, RandomPolicy, SequentialPolicy
from tests.conftest import TOY_WINDOWS, CountingEvaluator

CONF = Path(__file__).parents[2] / "conf"
ALGORITHMS = ("ppo", "a2c", "dqn", "maskable_ppo")
BLIND = {
    "ppo_without_budget": ["memory_budget", "footprint"],
    "ppo_without_ranking": ["gsi_ranking"],
    "ppo_without_bytes": ["component_bytes"],
}
KINDS = {"ppo": OneStepPolicy, "a2c": OneStepPolicy, "dqn": SequentialPolicy, "maskable_ppo": SequentialPolicy}
SEQUENTIAL = "rap/SequentialPruning-v0"


def config_of(name: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=[f"agent={name}"]).agent)


def build(name: str, **changes) -> Sb3Agent:
    return instantiate(config_of(name) | changes)


class Contrary(CountingEvaluator):
    """The ranking on the calibration windows is as wrong as can be: what it drops first is worth most.

    The component at place i of the order costs (8 - i) / 36 of the score.
    """

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        self._costs = {name: (8 - place) / 36 for place, name in enumerate(order)}

    identity = {"evaluator": "contrary"}

    def score(self, mask: PruningMask) -> float:
        return 1.0 - sum(self._costs[component.name] for component in mask.dropped)

    def evaluation_of(self, mask: PruningMask) -> Evaluation:
        score = self.score(mask)
        return Evaluation(score, {"toy": {"acc": score, "smooth_acc": score, "items": 1}}, tokens=1, seconds=0.0)


@pytest.fixture(scope="module")
def ranking(tiny_llm):
    return greedy_sequential_importance(tiny_llm, TOY_WINDOWS)


@pytest.fixture
def make_task(ranking, toy_task):
    """Makes a task whose token budget pays for the ranking and so many masks."""

    def make(masks: int, **options) -> Task:
        return toy_task(ranking.tokens + masks, Contrary(ranking.order), **options)

    return make


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


def mean_score(policy: Policy, evaluator: Contrary, grid: list[Scenario]) -> float:
    return float(np.mean([evaluator.score(policy.decide(s.workload, s.budget_bytes)) for s in grid]))


def optimum(shape, evaluator: Contrary, scenario: Scenario) -> float:
    """The best score of all 256 masks that fit."""
    masks = (PruningMask.from_bits(shape, bits) for bits in itertools.product((0, 1), repeat=8))
    fits = (m for m in masks if footprint(shape, m, scenario.workload).peak_bytes <= scenario.budget_bytes)
    return max(map(evaluator.score, fits))


def equal_weights(left: Policy, right: Policy) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learning_finds_what_a_wrong_importance_order_hides(name, make_task, tiny_llm, grid):
    task = make_task(256)
    learned = mean_score(run_search(build(name, total_steps=6000), task).policy, task.problem.evaluator, grid)
    evaluator, shape = task.problem.evaluator, tiny_llm.shape
    best = np.mean([optimum(shape, evaluator, scenario) for scenario in grid])
    chance = np.mean([mean_score(RandomPolicy(shape, seed), evaluator, grid) for seed in range(20)])
    greedy = mean_score(OrderPolicy(shape, task.ranking.order), evaluator, grid)
    assert greedy < chance < 0.9 * best
    assert learned > chance + 0.05 and learned > greedy + 0.1
    assert 0.93 * best < learned <= best + 1e-9


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_goes_on_when_the_token_budget_is_used_up(name, make_task, grid):
    logged, progress = [], []
    task = make_task(20, log=lambda *line: logged.append(line), progress=lambda *done: progress.append(done))
    result = run_search(build(name, total_steps=1500, warm_start=False), task)
    assert task.problem.budget.left == 0 and result.tokens == task.problem.budget.limit
    assert result.evaluations == task.problem.evaluator.calls == len(evaluated_masks(task)) == 20
    assert result.details["steps"] >= 1500 and progress[-1] == (1500, 1500)
    assert {total for _done, total in progress} == {task.problem.budget.limit, 1500}, "tokens while they are spent"
    assert result.details["evaluated_steps"] >= 10 and result.details["approximated_steps"] > 20
    assert task.archive and set(task.archive) <= set(task.problem.meter.known)
    assert type(result.policy) is KINDS[name]
    for scenario in grid:
        mask = result.policy.decide(scenario.workload, scenario.budget_bytes)
        assert footprint(task.problem.shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes
    steps, metrics = zip(*logged, strict=True)
    assert list(steps) == sorted(steps) and steps[-1] <= result.details["steps"]
    curve, gains = result.details["learning_curve"], [each["gain_over_greedy"] for each in metrics]
    assert 1 < len(curve) <= 100 and curve[-1][0] == steps[-1]
    assert min(gains) <= min(gain for _step, gain in curve) <= max(gain for _step, gain in curve) <= max(gains)
    assert metrics[0]["evaluated"] > metrics[-1]["evaluated"]
    assert all(m["tokens"] <= task.problem.budget.limit for m in metrics)


class Killed(BaseException):
    """Not an `Exception`, as a kill can't be caught by accident."""


def killer(step: int, steps: int):
    """Kills at a step of the training; what was reported before are the ranking's tokens."""

    def kill(done: int, total: int) -> None:
        if total == steps and done >= step:
            raise Killed

    return kill


@pytest.mark.parametrize("name", ALGORITHMS)
def test_killed_training_that_is_run_again_ends_with_the_same_weights_and_measures_nothing_twice(
    name, make_task, tmp_path
):
    steps = 1600
    whole = run_search(build(name, total_steps=steps), make_task(40))
    with ResultStore(tmp_path / "results.db") as store:
        killed = make_task(40, store=store, progress=killer(400, steps))
        with pytest.raises(Killed):
            run_search(build(name, total_steps=steps), killed)
        assert killed.problem.evaluator.calls > 0
    with ResultStore(tmp_path / "results.db") as store:
        again = make_task(40, store=store)
        replayed = run_search(build(name, total_steps=steps), again)
    assert equal_weights(replayed.policy, whole.policy)
    assert replayed.evaluations == whole.evaluations and replayed.tokens == whole.tokens
    assert replayed.details == whole.details
    assert killed.problem.evaluator.calls + again.problem.evaluator.calls == whole.evaluations
    assert again.calibration.fresh_evaluations == 0, "nor is the ranking"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_seed_decides_everything_and_global_random_streams_are_left_alone(name, make_task):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = run_search(build(name, total_steps=256), make_task(300, seed=5))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    random.random(), np.random.rand(), torch.rand(3)  # whatever happened before in the process
    twin = run_search(build(name, total_steps=256), make_task(300, seed=5))
    other = run_search(build(name, total_steps=256), make_task(300, seed=6))
    assert equal_weights(first.policy, twin.policy)
    assert not equal_weights(first.policy, other.policy)


def test_a_budget_that_pays_for_the_ranking_alone_is_refused(make_task, ranking):
    with pytest.raises(SearchExhausted, match=f"{ranking.tokens:,} tokens are spent; none is left to evaluate a mask"):
        run_search(build("ppo", total_steps=64), make_task(0))


def test_warm_start_begins_at_the_greedy_order(make_task, grid):
    def share_of_greedy(warm_start: bool) -> float:
        task = make_task(1000)
        policy = run_search(build("maskable_ppo", total_steps=0, warm_start=warm_start), task).policy
        greedy = OrderPolicy(task.problem.shape, task.ranking.order)
        cases = [(s.workload, s.budget_bytes) for s in grid]
        return float(np.mean([np.equal(policy.decide(*case).keep, greedy.decide(*case).keep) for case in cases]))

    assert share_of_greedy(True) > 0.9 > share_of_greedy(False)


def test_unknown_algorithms_and_environments_are_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="algorithm 'pppo'; did you mean ppo"):
        Sb3Agent("pppo", "rap/Pruning-v0", 1)
    with pytest.raises(UnknownName, match="environment 'rap/Pruning-v9'; did you mean rap/Pruning-v0"):
        Sb3Agent("ppo", "rap/Pruning-v9", 1)
    with pytest.raises(ValueError, match="dqn acts one component at a time: use environment=rap/SequentialPruning-v0"):
        Sb3Agent("dqn", "rap/Pruning-v0", 1)
    with pytest.raises(ValueError, match="dqn learns rewards, and imitation gives it preferences"):
        Sb3Agent("dqn", SEQUENTIAL, 1, warm_start=True)


@pytest.mark.parametrize("name", BLIND)
def test_ablations_differ_from_ppo_in_what_the_network_sees(name, make_task):
    config, ppo = config_of(name), config_of("ppo")
    assert config["network"]["blind_to"] == BLIND[name]
    assert config | {"network": None} == ppo | {"network": None}
    policy = run_search(build(name, total_steps=64), make_task(300)).policy
    assert policy.parameters()["blind_to"] == BLIND[name]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_given_twenty_thousand_steps(name):
    assert config_of(name)["total_steps"] == 20_000


@pytest.mark.parametrize("environment", [PruningVectorEnv, SequentialPruningVectorEnv])
def test_training_environment_translates_what_the_vector_environment_says(environment, make_task):
    def make() -> PruningVectorEnv:
        task = make_task(300)
        problem = TrainingProblem(task, project=environment is PruningVectorEnv)
        return environment(3, problem=problem, importance=task.importance, sampler=task.sampler)

    ours, theirs = make(), TrainingVecEnv(make())
    seeds = theirs.seed(7)
    assert len(set(seeds)) == 3 and not set(seeds) & set(theirs.seed(8))
    theirs.seed(7)
    for expected, got in zip(ours.reset(seed=seeds)[0].values(), theirs.reset().values(), strict=True):
        assert np.array_equal(expected, got)
    ours.action_space.seed(0)
    ends = 0
    for _ in range(40):
        actions = ours.action_space.sample()
        observations, rewards, terminated, truncated, infos = ours.step(actions)
        got, got_rewards, dones, got_infos = theirs.step(actions)
        assert all(np.array_equal(observations[name], got[name]) for name in observations)
        assert got_rewards == pytest.approx(rewards) and got_rewards.dtype == np.float32
        assert np.array_equal(dones, terminated | truncated)
        for index in range(3):
            assert got_infos[index]["TimeLimit.truncated"] == truncated[index]
            assert ("outcome" in got_infos[index]) == ("terminal_observation" in got_infos[index]) == dones[index]
            if dones[index]:
                last = infos["final_obs"][index]
                assert np.array_equal(got_infos[index]["terminal_observation"]["kept"], last["kept"])
        ends += dones.sum()
    assert ends > 3
    if environment is SequentialPruningVectorEnv:
        assert np.array_equal(np.stack(theirs.env_method("action_masks")), ours.action_masks())


def test_a_cut_episode_is_told_from_one_that_ended(make_task):
    task = make_task(300)
    problem = TrainingProblem(task, project=False)
    envs = TrainingVecEnv(SequentialPruningVectorEnv(2, problem=problem, importance=task.importance))
    envs.reset()
    for _ in range(15):
        assert not envs.step(np.array([0, 0]))[2].any()
    _, _, dones, infos = envs.step(np.array([0, 8]))  # the 16th step: the first is cut, the second stops
    assert dones.all() and [info["TimeLimit.truncated"] for info in infos] == [True, False]
