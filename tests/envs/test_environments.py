"""Every environment that chooses masks is a well-behaved Gymnasium environment, and does what its docstring says."""

import copy
import inspect
import os
import re
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from numpy.testing import assert_equal
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import rap_env.envs.defaults
from rap_env.envs.base import MaskEnv
from rap_env.envs.defaults import Defaults
from rap_env.errors import InfeasibleBudget, InvalidMask, InvalidWorkload, UnknownName
from rap_env.importance.source import ImportanceSource
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.problem import PruningProblem
from tests.envs.conftest import WORK

SERVING, SELECTION = "rap/Serving-v0", "rap/Selection-v0"  # run without a model, and have tests of their own
IDS = sorted(name for name in gymnasium.registry if name.startswith("rap/") and name not in (SERVING, SELECTION))
RANKED = [name for name in IDS if name != "rap/Width-v0"]
HEADINGS = (
    "Description, Action Space, Observation Space, Rewards, Starting State, Episode End, Information, Arguments,"
    " Version History"
)


def first_column(docstring: str, heading: str) -> list[str]:
    """Names in the table below a heading of a docstring."""
    section = docstring.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def arguments_of(cls: type) -> list[str]:
    """Names of the constructor's arguments, through the `**arguments` of subclasses."""
    names: list[str] = []
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names += [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
    raise AssertionError(f"{cls} never names its arguments")


def test_there_are_three_environments_beside_those_without_a_model():
    assert {SERVING, SELECTION} <= set(gymnasium.registry)
    assert IDS == ["rap/Pruning-v0", "rap/SequentialPruning-v0", "rap/Width-v0"]


@pytest.mark.parametrize("name", IDS)
def test_both_libraries_checkers_find_nothing_to_complain_about(make, name):
    check_env(make(name).unwrapped)
    check_env_for_sb3(make(name, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("name", IDS)
def test_twins_with_one_seed_live_the_same_life(make, name):
    twins = make(name), make(name)
    actions = twins[0].action_space
    actions.seed(5)
    starts = [twin.reset(seed=3) for twin in twins]
    assert_equal(*starts)
    for _ in range(100):
        action = actions.sample()
        left, right = (twin.step(action) for twin in twins)
        assert_equal(left, right)
        assert twins[0].observation_space.contains(left[0])
        assert isinstance(left[1], float) and np.isfinite(left[1])
        if left[2] or left[3]:
            left, right = (twin.reset() for twin in twins)
            assert_equal(left, right)


@pytest.mark.parametrize("name", IDS)
def test_a_step_without_a_running_episode_is_refused(make, name):
    env = make(name)
    action = env.action_space.sample() * 0
    for refuses in (env, env.unwrapped):  # Gymnasium's wrapper and the environment itself
        with pytest.raises(ResetNeeded, match=r"reset"):
            refuses.step(action)
    env.reset(seed=0)
    while True:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    calls = env.unwrapped.problem.evaluator.calls
    for refuses in (env, env.unwrapped):
        with pytest.raises(ResetNeeded, match="there is no running episode: call reset before the next step"):
            refuses.step(action)
    assert env.unwrapped.problem.evaluator.calls == calls
    env.reset()
    env.step(action)


@pytest.mark.parametrize("name", IDS)
def test_specs_hold_the_live_parts_themselves(make, name, toy_problem, toy_importance):
    live = {"problem": toy_problem} | ({"importance": toy_importance} if name in RANKED else {})
    env = make(name, **live)
    wrapped = gymnasium.wrappers.TimeLimit(gymnasium.wrappers.FlattenObservation(env), 100)
    vector = gymnasium.make_vec(name, num_envs=2, **live)
    for spec in (env.spec, env.unwrapped.spec, wrapped.spec, copy.deepcopy(env.spec), vector.spec):
        assert all(spec.kwargs[argument] is part for argument, part in live.items())
    assert gymnasium.make(env.spec).unwrapped.problem is toy_problem
    started = time.perf_counter()
    for _ in range(100):
        _ = wrapped.spec
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("name", IDS)
def test_other_seeds_draw_other_scenarios(make, name):
    env = make(name)
    drawn = [env.reset(seed=seed)[1]["scenario"] for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("name", IDS)
def test_docstring_is_a_manual_in_nine_headings(make, name):
    env = make(name).unwrapped
    docstring = inspect.getdoc(type(env))
    assert ", ".join(re.findall(r"^## (.+)$", docstring, re.MULTILINE)) == HEADINGS
    assert sorted(first_column(docstring, "Observation Space")) == sorted(env.observation_space.spaces)
    assert sorted(first_column(docstring, "Arguments")) == sorted(arguments_of(type(env)))
    for key in re.findall(r"`(\w+)`", docstring.split("## Information")[1].split("## ")[0]):
        assert key in env.reset(seed=0)[1] or key in ("tasks", "reward_terms", "seconds", "outcome")


@pytest.mark.parametrize("name", IDS)
def test_given_scenario_is_played_and_the_next_one_is_drawn(make, name, scenario):
    env = make(name)
    seen, info = env.reset(seed=0, options={"scenario": scenario})
    assert info["scenario"] == scenario
    assert info["overshoot_bytes"] == info["footprint"]["peak_bytes"] - scenario.budget_bytes > 0
    assert not info["mask"].dropped and "outcome" not in info
    assert seen["footprint"] == [1.0]
    assert seen["memory_budget"] == pytest.approx([0.75], abs=1e-5)
    assert seen["batch_size"] == pytest.approx([0.1])  # log2(2) / log2(1024)
    assert seen["sequence_length"] == pytest.approx([9 / 13])  # log2(512) / log2(8192)
    if name in RANKED:
        assert seen["gsi_ranking"] == pytest.approx(np.arange(8) / 7)  # the toy order is the components' own
        assert seen["kept"].all()
    else:
        assert seen["widths"].all() and seen["site_parts"].all()
    # float32: attention 3072 weights and 2 * 16 KV channels * 1024 tokens, MLP 6144 weights, 16736 weights stay
    attention, mlp = 4 * (3072 + 2 * 16 * 1024), 4 * 6144
    dense = 4 * 16736 + 4 * (attention + mlp)
    assert seen["component_bytes" if name in RANKED else "site_bytes"] == pytest.approx(
        [attention / dense, mlp / dense] * 4
    )
    assert env.reset()[1]["scenario"] != scenario


@pytest.mark.parametrize("name", IDS)
def test_bad_arguments_are_refused_before_any_work(make, name, toy_problem):
    argument, says = ("gsi", "gsi mode") if name in RANKED else ("reading", "reading of actions")
    with pytest.raises(UnknownName, match=f"{says} 'curent'; "):
        make(name, problem=toy_problem, **{argument: "curent"})
    with pytest.raises(UnknownName, match="render mode 'human'; known: ansi, rgb_array"):
        MaskEnv(problem=toy_problem, render_mode="human")
    with pytest.raises(InfeasibleBudget, match="no pruning mask fits"):
        make(name, sampler=ScenarioSampler(budget_ratio=(0.01, 0.9)), problem=toy_problem)
    with pytest.raises(InvalidWorkload, match="context"):
        make(name, sampler=ScenarioSampler(prompt_tokens=(128, 100_000)), problem=toy_problem)
    with pytest.raises(InfeasibleBudget, match="still needs"):
        make(name, problem=toy_problem).reset(options={"scenario": Scenario(WORK, 1000)})
    assert toy_problem.evaluator.calls == 0


@pytest.mark.parametrize("name", RANKED)
def test_current_ranking_needs_a_meter(make, name, toy_importance):
    env = make(name, gsi="current", importance=ImportanceSource(toy_importance.static))
    with pytest.raises(ValueError, match="give the ImportanceSource a Meter"):
        env.reset(seed=0)


@pytest.mark.parametrize("name", IDS)
def test_text_and_pixels_are_rendered_before_and_after_an_episode(make, name, scenario):
    for mode, kind in (("ansi", str), ("rgb_array", np.ndarray)):
        env = make(name, render_mode=mode).unwrapped
        assert env.render() is None, "there is nothing to see before the first reset"
        env.reset(options={"scenario": scenario})
        assert isinstance(env.render(), kind)
        env.step(env.action_space.sample() * 0)
        assert isinstance(env.render(), kind)
    assert make(name).unwrapped.render() is None


@pytest.mark.parametrize("name", IDS)
def test_nothing_given_means_the_embedded_parts(monkeypatch, name, toy_problem, toy_importance):
    monkeypatch.setattr(rap_env.envs.defaults, "embedded_defaults", lambda: Defaults(toy_problem, toy_importance))
    monkeypatch.setattr(rap_env.envs.defaults, "embedded_problem", lambda: toy_problem)
    env = gymnasium.make(name)
    env.reset(seed=0)
    assert env.unwrapped.problem is toy_problem
    assert name not in RANKED or env.unwrapped.importance is toy_importance


def test_one_step_pays_weights_times_terms(make, scenario):
    env = make("rap/Pruning-v0")
    env.reset(options={"scenario": scenario})
    _, reward, terminated, truncated, info = env.step(np.array([1, 0, 1, 1, 1, 1, 0, 1]))
    assert [component.name for component in info["mask"].dropped] == ["layer0.mlp", "layer3.attention"]
    peak = dense_bytes(env.unwrapped.shape, WORK) - 4 * (6144 + 3072 + 2 * 16 * 1024)
    assert info["footprint"]["peak_bytes"] == peak
    overshoot = max(0.0, peak / scenario.budget_bytes - 1)
    accuracy = 1 - (2 + 7) / 36  # positions 1 and 6 of 8, as the toy evaluator counts
    assert reward == pytest.approx(accuracy - 2 * overshoot)
    assert info["reward_terms"]["accuracy"] == pytest.approx(accuracy)
    assert info["tasks"]["toy"]["acc"] == pytest.approx(accuracy)
    assert terminated and not truncated
    info["tasks"]["toy"].clear()
    assert info["outcome"].evaluation.tasks["toy"], "what callers do to an info does not reach the stored result"


def test_one_step_refuses_an_action_that_is_no_mask(make):
    env = make("rap/Pruning-v0").unwrapped
    env.reset(seed=0)
    for action in (np.ones(7), np.full(8, 2)):
        with pytest.raises(InvalidMask, match="keep-bits"):
            env.step(action)


@pytest.mark.slow
@pytest.mark.llm
def test_the_default_environment_is_made_and_stepped_with_nothing_given(embedded_folder, tmp_path):
    """In a process and a cache folder of its own; the ranking of 60 components is measured here."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / embedded_folder.name).symlink_to(embedded_folder)
    code = """
import gymnasium, rap_env
env = gymnasium.make("rap/Pruning-v0")
observation, info = env.reset(seed=0)
assert env.action_space.n == 60 and env.observation_space.contains(observation)
assert sorted(observation["gsi_ranking"]) != list(observation["gsi_ranking"]), "an order that was measured"
dense = [1] * 60
_, reward, terminated, _, info = env.step(__import__("numpy").array(dense))
outcome = info["outcome"]
assert terminated and list(info["tasks"]) and not outcome.from_store
assert 0.3 < outcome.score <= 1.0, outcome.score
assert reward == outcome.score - 5 * info["reward_terms"]["overshoot"]
print("stepped")
"""
    environment = os.environ | {"RAP_CACHE": str(tmp_path), "OMP_WAIT_POLICY": "passive"}  # beside busy cores
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "stepped\n", done.stderr
    assert (tmp_path / "results.db").is_file()


def test_a_width_action_is_projected_onto_the_budget(make, scenario):
    env = make("rap/Width-v0").unwrapped
    env.reset(options={"scenario": scenario})
    observation, reward, terminated, truncated, info = env.step(np.array([1, 1, 1, 1, -1, -1, 0, 0], np.float32))
    assert terminated and not truncated and info["overshoot_bytes"] == 0
    assert info["mask"] == env.projection.mask(env.shape, [1] * 6 + [0] * 2, WORK, scenario.budget_bytes)
    assert_equal(observation["widths"], np.array(info["mask"].keep))
    assert reward == info["reward_terms"]["accuracy"]
    assert observation["footprint"] == pytest.approx(info["footprint"]["peak_bytes"] / dense_bytes(env.shape, WORK))


def test_a_width_action_without_a_number_for_each_site_is_refused(make):
    env = make("rap/Width-v0").unwrapped
    env.reset(seed=0)
    for action in (np.ones(7), np.full(8, np.nan)):
        with pytest.raises(InvalidMask, match="expected 8 finite numbers, one for each site; got"):
            env.step(action)


def test_the_perplexity_ratio_is_relative_to_the_dense_model(make, toy_problem, scenario):
    problem = PruningProblem(toy_problem.llm, toy_problem.evaluator, reward_weights={"perplexity_ratio": 2.0})
    env = make("rap/Width-v0", problem=problem)
    env.reset(options={"scenario": scenario})
    _, reward, _, _, info = env.step(np.ones(8, np.float32))
    score = info["reward_terms"]["accuracy"]
    assert reward == pytest.approx(2 * np.exp(score - 1.0)) and score < 1.0, "the dense toy scores 1"
    assert info["reward_terms"]["perplexity_ratio"] == pytest.approx(reward / 2)
    assert problem.evaluator.calls == problem.budget.spent == 2
