"""`rap/Serving-v0` is a well-behaved Gymnasium environment, does what its docstring says, and is fast."""

import inspect
import re
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from rap_env.envs.serving import TRAINING_SEEDS, ServingEnv
from rap_env.errors import InvalidConfig, InvalidReward, UnknownName
from rap_env.serving.episodes import Setting
from rap_env.serving.jobs import Targets
from tests.envs.test_environments import HEADINGS, arguments_of
from tests.serving.cases import TABLE, episode

NAME = "rap/Serving-v0"


def by_hand(**arguments) -> ServingEnv:
    targets = Targets(first_token_seconds=4.0, token_seconds=50.0, patience_seconds=10.0)
    return ServingEnv(TABLE, Setting(whole_tokens=85), targets, **arguments)  # the whole is 2000 bytes


def test_both_libraries_checkers_find_nothing_to_complain_about():
    check_env(gymnasium.make(NAME).unwrapped)
    check_env_for_sb3(gymnasium.make(NAME, render_mode="ansi").unwrapped)


def test_docstring_is_a_manual_in_nine_headings():
    docstring = inspect.getdoc(ServingEnv)
    assert ", ".join(re.findall(r"^## (.+)$", docstring, re.MULTILINE)) == HEADINGS
    arguments = docstring.split("## Arguments")[1]
    assert re.findall(r"^\| `(\w+)` \|", arguments, re.MULTILINE) == arguments_of(ServingEnv)
    info = ServingEnv().reset(seed=0)[1]
    assert set(re.findall(r"`(\w+)`", docstring.split("## Information")[1].split("## ")[0])) - {"Counts"} == set(info)
    rows = re.findall(r"^\| `(\w+)` \| (1|n) \|", docstring, re.MULTILINE)
    assert sum(8 if size == "n" else 1 for _name, size in rows) == ServingEnv().observation_space.shape[0]


def test_twins_with_one_seed_live_the_same_life():
    twins = ServingEnv(), ServingEnv()
    actions = np.random.default_rng(0).integers(8, size=300)
    for left, right in zip(*(twin.reset(seed=3) for twin in twins), strict=True):
        np.testing.assert_equal(left, right)
    for action in actions:
        left, right = (twin.step(action) for twin in twins)
        np.testing.assert_equal(left, right)
        assert twins[0].observation_space.contains(left[0])
        if left[3]:
            np.testing.assert_equal(*(twin.reset() for twin in twins))


def test_drawn_episodes_are_never_those_of_whoever_evaluates():
    env = ServingEnv()
    drawn = {env.reset(seed=seed)[1]["episode_seed"] for seed in range(50)}
    assert len(drawn) == 50 and max(drawn) < TRAINING_SEEDS
    assert env.reset(options={"episode_seed": TRAINING_SEEDS})[1]["episode_seed"] == TRAINING_SEEDS


def by_both_levels(n_tokens: int, n_wanted: int) -> list[float]:
    """What both levels need with 1400 bytes: now, and with all that waits."""
    needed = [(n_bytes + 10 * n_tokens) / 2800 for n_bytes in (1150, 650)]
    wanted = [0.5 + 5 * ((n_bytes + 10 * n_wanted) / 1400 - 1) for n_bytes in (1150, 650)]
    return [*needed, *(min(1.0, max(0.0, value)) for value in wanted)]


def test_an_episode_by_hand():
    env = by_hand(decide_seconds=1.0)
    two = episode((0.0, 10, 2), (0.5, 20, 2), shares=((0.0, 0.7),), seconds=5.0)
    seen, info = env.reset(options={"episode": two})
    assert env.whole_bytes == 2000 and env.n_decisions == 5 and info["episode_seed"] is None
    budget, level, waiting = [0.35, 0.35, 0.0], [1.0, 0.0], 1 / np.log2(65)
    unread = np.log2(11) / np.log2(8193)
    expected = [*budget, *by_both_levels(0, 12), *level, 0.0, 0.0, waiting, 0.0, unread, 0.0, 0.0]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    assert 0.0 < seen[5] < 0.1, "with its cache the dense model takes 1270 bytes"
    seen, reward, terminated, truncated, info = env.step(0)  # 10 tokens are read: 1.11 s
    assert (reward, terminated, truncated) == (0.0, False, False) and info["seconds"] == pytest.approx(1.11)
    unread = np.log2(21) / np.log2(8193)
    expected = [*budget, *by_both_levels(12, 12 + 22), *level, 0.111, 1 / 4, waiting, 12 / 170, unread]
    np.testing.assert_allclose(seen, [*expected, 0.61 / 4, (2 / 1.11) / 4], rtol=1e-5)
    _, reward, _, _, info = env.step(1)  # the switch takes 0.75 s, then a step 0.5 + 0.1 + 0.2 + 0.031
    assert info["seconds"] == pytest.approx(1.11 + 0.75 + 0.831) and info["counts"]["served"] == 1
    terms = {"served": (1.0 + 0.5) / 4, "refused": 0.0, "forced": 0.0, "switches": 1 / 5}
    assert info["reward_terms"] == pytest.approx(terms) and reward == pytest.approx(1.5 / 4 - 0.1 / 5)
    _, reward, _, _, info = env.step(1)
    assert reward == pytest.approx(2 * 0.5 / 4) and info["counts"]["in_time"] == 2
    _, reward, terminated, truncated, info = env.step(1)
    assert (reward, terminated, truncated) == (0.0, False, False)
    while not truncated:
        _, reward, terminated, truncated, info = env.step(1)
        assert reward == 0.0 and not terminated
    with pytest.raises(ResetNeeded, match="there is no running episode"):
        env.step(1)


def test_a_level_that_does_not_fit_is_forced_down_and_counted():
    env = by_hand(reward_weights={"forced": -1.0})
    env.reset(options={"episode": episode((0.0, 10, 2), shares=((0.0, 0.5),), seconds=10.0)})
    _, reward, _, _, info = env.step(0)
    assert info["level"] == 1 and info["reward_terms"]["forced"] == 1 / 40 == -reward


@pytest.mark.parametrize("action", [-1, 8, 1.0, "0", np.array([1, 2])])
def test_what_is_no_level_is_refused(action):
    env = ServingEnv()
    env.reset(seed=0)
    with pytest.raises((InvalidAction, ValueError), match=r"expected a level from 0 to 7|can only convert"):
        env.step(action)
    assert env.simulation.now == 0.0


def test_bad_arguments_are_refused():
    with pytest.raises(UnknownName, match="render mode 'human'; known: ansi"):
        ServingEnv(render_mode="human")
    with pytest.raises(InvalidConfig, match="decide_seconds: expected a positive number; got 0"):
        ServingEnv(decide_seconds=0.0)
    with pytest.raises(InvalidReward, match="reward weight 'served_late' has no term"):
        ServingEnv(reward_weights={"served_late": 1.0})


def test_text_is_rendered_after_the_first_reset():
    env = ServingEnv(render_mode="ansi")
    assert env.render() is None
    env.reset(seed=0)
    env.step(3)
    assert "running" in env.render() and ServingEnv().render() is None


def test_more_than_a_thousand_steps_a_second():
    env, rng = ServingEnv(), np.random.default_rng(0)
    env.reset(seed=0)
    actions = rng.integers(8, size=2000).tolist()
    best = 0.0
    for _ in range(3):  # the best, for others may use the machine
        started = time.perf_counter()
        for action in actions:
            if env.step(action)[3]:
                env.reset()
        best = max(best, len(actions) / (time.perf_counter() - started))
    assert best > 1000.0
