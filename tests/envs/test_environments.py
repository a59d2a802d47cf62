"""Every registered environment is a well-behaved Gymnasium environment, and does what its docstring says."""

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
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from numpy.testing import assert_equal
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import rap_env.envs.base
from rap_env.envs.base import MaskEnv
from rap_env.envs.defaults import Defaults
from rap_env.errors import InfeasibleBudget, InvalidMask, InvalidWorkload, UnknownName
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import CALIBRATION
from rap_env.importance.source import ImportanceSource
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem

IDS = sorted(name for name in gymnasium.registry if name.startswith("rap/"))
HEADINGS = (
    "Description, Action Space, Observation Space, Rewards, Starting State, Episode End, Information, Arguments,"
    " Version History"
)
WORK = Workload(2, 512)
WEIGHTS = {"accuracy": 1.0, "overshoot": -2.0}


@pytest.fixture
def make(tiny_llm, toy_problem, toy_importance, toy_sampler):
    """Makes an environment on the toy parts; each call gets a problem of its own."""

    def make_env(name: str, **arguments) -> gymnasium.Env:
        parts = {
            "problem": PruningProblem(tiny_llm, type(toy_problem.evaluator)(), reward_weights=WEIGHTS),
            "importance": toy_importance,
            "sampler": toy_sampler,
        }
        return gymnasium.make(name, **parts | arguments)

    return make_env


@pytest.fixture
def scenario(tiny_llm) -> Scenario:
    return Scenario.from_ratio(tiny_llm.shape, WORK, 0.75)


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


def test_there_are_two_environments():
    assert IDS == ["rap/Pruning-v0", "rap/SequentialPruning-v0"]


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
    env = make(name, problem=toy_problem, importance=toy_importance)
    wrapped = gymnasium.wrappers.TimeLimit(gymnasium.wrappers.FlattenObservation(env), 100)
    vector = gymnasium.make_vec(name, num_envs=2, problem=toy_problem, importance=toy_importance)
    for spec in (env.spec, env.unwrapped.spec, wrapped.spec, copy.deepcopy(env.spec), vector.spec):
        assert spec.kwargs["problem"] is toy_problem and spec.kwargs["importance"] is toy_importance
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
    assert seen["memory_budget"] == pytest.approx([0.75], abs=1e-5)
    assert seen["batch_size"] == pytest.approx([0.1])  # log2(2) / log2(1024)
    assert seen["sequence_length"] == pytest.approx([9 / 13])  # log2(512) / log2(8192)
    assert seen["gsi_ranking"] == pytest.approx(np.arange(8) / 7)  # the toy order is the components' own
    assert seen["footprint"] == [1.0] and seen["kept"].all()
    # float32: attention 3072 weights and 2 * 16 KV channels * 1024 tokens, MLP 6144 weights, 16736 weights stay
    attention, mlp = 4 * (3072 + 2 * 16 * 1024), 4 * 6144
    dense = 4 * 16736 + 4 * (attention + mlp)
    assert seen["component_bytes"] == pytest.approx([attention / dense, mlp / dense] * 4)
    assert env.reset()[1]["scenario"] != scenario


@pytest.mark.parametrize("name", IDS)
def test_bad_arguments_are_refused_before_any_work(make, name, toy_problem):
    with pytest.raises(UnknownName, match="gsi mode 'curent'; did you mean current"):
        make(name, gsi="curent", problem=toy_problem)
    with pytest.raises(UnknownName, match="render mode 'human'; known: ansi, rgb_array"):
        MaskEnv(problem=toy_problem, render_mode="human")
    with pytest.raises(InfeasibleBudget, match="no pruning mask fits"):
        make(name, sampler=ScenarioSampler(budget_ratio=(0.01, 0.9)), problem=toy_problem)
    with pytest.raises(InvalidWorkload, match="context"):
        make(name, sampler=ScenarioSampler(prompt_tokens=(128, 100_000)), problem=toy_problem)
    with pytest.raises(InfeasibleBudget, match="still needs"):
        make(name, problem=toy_problem).reset(options={"scenario": Scenario(WORK, 1000)})
    assert toy_problem.evaluator.calls == 0


@pytest.mark.parametrize("name", IDS)
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
    monkeypatch.setattr(rap_env.envs.base, "embedded_defaults", lambda: Defaults(toy_problem, toy_importance))
    env = gymnasium.make(name)
    env.reset(seed=0)
    assert env.unwrapped.problem is toy_problem and env.unwrapped.importance is toy_importance


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


@pytest.fixture
def sequential(make, scenario):
    """Makes a sequential environment that is reset to the scenario."""

    def start(**arguments) -> gymnasium.Env:
        env = make("rap/SequentialPruning-v0", **arguments).unwrapped
        env.reset(seed=0, options={"scenario": scenario})
        return env

    return start


@pytest.mark.parametrize("action", [-1, 9, np.int64(-1), np.int32(9), np.array(-1), 2**70, 1.0, np.float32(2.0), None])
def test_an_action_that_names_nothing_is_refused_and_changes_nothing(sequential, action):
    env = sequential()
    with pytest.raises(InvalidMask, match="expected an action from 0 to 8; got"):
        env.step(action)
    assert not env.step(0)[4]["mask"].keeps("layer0.attention")
    assert env.case[0].keep.count(False) == 1


@pytest.mark.parametrize("action", [3, np.int64(3), np.int32(3), np.uint8(3), np.array(3)])
def test_any_kind_of_integer_is_an_action(sequential, action):
    assert [component.name for component in sequential().step(action)[4]["mask"].dropped] == ["layer1.mlp"]


def test_what_is_kept_may_be_dropped_and_stopping_waits_for_the_budget(sequential):
    env = sequential()
    assert env.action_masks().tolist() == [True] * 8 + [False]
    env.step(3)
    assert env.action_masks().tolist() == [True] * 3 + [False] + [True] * 4 + [False]
    env.step(0)
    _, _, _, _, info = env.step(2)  # two attentions and an MLP free 311,296 of 738,560 bytes, more than a quarter
    assert info["overshoot_bytes"] == 0
    assert env.action_masks().tolist() == [False] * 8 + [True]


def test_stopping_above_the_budget_ends_the_episode_and_pays_for_the_overshoot(sequential):
    _, reward, terminated, truncated, info = sequential().step(8)
    assert terminated and not truncated
    assert reward == pytest.approx(1.0 - 2 * (1 / 0.75 - 1), abs=1e-4)
    assert info["reward_terms"]["violation"] == 1.0


def test_dropping_pays_nothing_until_the_agent_stops(sequential):
    env = sequential()
    assert [env.step(action)[1] for action in (0, 2, 4)] == [0.0] * 3
    assert env.problem.evaluator.calls == 0
    _, reward, terminated, _, info = env.step(8)
    assert terminated and info["overshoot_bytes"] == 0
    assert reward == pytest.approx(1 - (1 + 3 + 5) / 36)


def test_dropping_what_is_dropped_changes_nothing(sequential):
    env = sequential()
    before = env.step(1)
    after = env.step(1)
    assert_equal(after[0], before[0])
    assert after[1:4] == (0.0, False, False)
    assert after[4]["mask"] == before[4]["mask"]


def test_episode_is_cut_and_evaluated_after_twice_as_many_steps_as_components(sequential):
    env = sequential()
    steps = [env.step(0) for _ in range(16)]
    assert [step[2] for step in steps] == [False] * 16
    assert [step[3] for step in steps] == [False] * 15 + [True]
    assert [step[1] for step in steps[:-1]] == [0.0] * 15
    assert steps[-1][1] == pytest.approx(env.problem.reward(steps[-1][4]["outcome"]))


def test_episode_ends_when_nothing_is_left_to_drop(sequential):
    env = sequential()
    steps = [env.step(action) for action in range(8)]
    assert [step[2] for step in steps] == [False] * 7 + [True]
    assert steps[-1][1] == pytest.approx(0.0, abs=1e-9)  # the toy score of nothing


def brute_force_order(llm, mask, windows: torch.Tensor, static: tuple[str, ...]) -> list[str]:
    """Dropped components, then kept ones by the loss of transformers' own forward without them."""
    losses = {}
    for component in mask.kept:
        with llm.pruned(mask.drop(component)), torch.inference_mode():
            losses[component.name] = llm.model(windows, labels=windows).loss.item()
    return [name for name in static if name not in losses] + sorted(losses, key=losses.__getitem__)


def test_current_ranking_is_the_brute_force_one_and_is_stored(sequential, tiny_llm, tmp_path, monkeypatch):
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    names = [component.name for component in tiny_llm.shape.components]
    with ResultStore(tmp_path / "results.db") as store:
        source = ImportanceSource(names, Meter(tiny_llm, PerplexityEvaluator(windows, CALIBRATION), store))
        env = sequential(gsi="current", importance=source)
        rankings = [env.step(action)[0]["gsi_ranking"] for action in (6, 1, 3)]
        mask = env.reset(seed=0)[1]["mask"].drop(names[6])
        for action, ranking in zip((1, 3, None), rankings, strict=True):
            order = brute_force_order(tiny_llm, mask, windows, source.static)
            assert ranking == pytest.approx([order.index(name) / 7 for name in names])
            mask = mask if action is None else mask.drop(names[action])
        assert len(store) > 0
        monkeypatch.setattr(tiny_llm, "run", lambda *_: pytest.fail("the ranking was measured again"))
        again = ImportanceSource(names, Meter(tiny_llm, PerplexityEvaluator(windows, CALIBRATION), store))
        assert again.current(mask) == source.current(mask)


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
