"""`rap/Selection-v0` is a well-behaved Gymnasium environment, does what `replay` does, and is fast."""

import inspect
import re
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from rap_env.envs.selection import SelectionEnv
from rap_env.errors import InvalidConfig, InvalidReward, RankingFailed, UnknownName
from rap_env.rerank.budgets import Budgets
from rap_env.rerank.choosing import Choosing
from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.cuts import CUTS
from rap_env.rerank.features import N_FEATURES, Features
from rap_env.rerank.outcomes import replayed
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.selection import Decision, replay
from rap_env.rerank.synthetic import synthetic_paths
from tests.envs.test_environments import HEADINGS, arguments_of

NAME = "rap/Selection-v0"
PATHS = synthetic_paths(12, n_candidates=14, n_layers=10)


def by_hand() -> ScorePaths:
    """Three layers; after the first, 0 is far above the others, and 3 far below."""
    scores = np.array([[9.0, 2.0, 1.0, -9.0], [9.0, 1.0, 2.0, -9.0], [9.0, 1.0, 2.0, -9.0]])
    return ScorePaths(("q",), (scores,), (np.array([10, 20, 30, 40]),), (np.full(4, np.nan),), {})


def test_both_libraries_checkers_find_nothing_to_complain_about():
    check_env(gymnasium.make(NAME).unwrapped)
    check_env_for_sb3(gymnasium.make(NAME).unwrapped)


def test_docstring_is_a_manual_in_nine_headings():
    docstring = inspect.getdoc(SelectionEnv)
    assert ", ".join(re.findall(r"^## (.+)$", docstring, re.MULTILINE)) == HEADINGS
    arguments = docstring.split("## Arguments")[1]
    assert re.findall(r"^\| `(\w+)` \|", arguments, re.MULTILINE) == arguments_of(SelectionEnv)
    info = SelectionEnv(PATHS).reset(seed=0)[1]
    assert set(re.findall(r"`(\w+)`", docstring.split("## Information")[1].split("## ")[0])) == set(info)
    rows = re.findall(r"^\| `\w+` \| (\d) \|", inspect.getdoc(Features), re.MULTILINE)
    assert sum(map(int, rows)) == N_FEATURES and f"`Discrete({len(CUTS)})`" in docstring
    assert f"A `Box` of {N_FEATURES} numbers" in docstring


def test_twins_with_one_seed_live_the_same_life():
    twins = SelectionEnv(PATHS), SelectionEnv(PATHS)
    np.testing.assert_equal(*(twin.reset(seed=3) for twin in twins))
    for action in np.random.default_rng(0).integers(len(CUTS), size=200):
        left, right = (twin.step(action) for twin in twins)
        np.testing.assert_equal(left, right)
        assert twins[0].observation_space.contains(left[0])
        if left[2]:
            np.testing.assert_equal(*(twin.reset() for twin in twins))


def test_an_episode_by_hand():
    env = SelectionEnv(by_hand(), top_ks=[2], spreads=np.ones(3))
    _, info = env.reset(seed=0)
    nothing = {"agreement": 0.0, "compute": 0.0}
    assert info == {"reward_terms": nothing, "query": "q", "top_k": 2, "layer": 0, "n_live": 4, "ids": ()}
    _, reward, terminated, truncated, info = env.step(CUTS.index(next(c for c in CUTS if c.selects and c.margin == 2)))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"reward_terms": nothing, "query": "q", "top_k": 2, "layer": 1, "n_live": 3, "ids": (0,)}
    seen, reward, terminated, truncated, info = env.step(1)
    compute = (10 + 2 * 90) / 300
    assert info["reward_terms"] == {"agreement": 1.0, "compute": compute} and info["ids"] == (0, 2)
    assert (terminated, truncated) == (True, False) and reward == pytest.approx(1.0 - 0.1 * compute)
    assert info["n_live"] == 0 and not seen.any()
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_budgets_are_observed_and_end_a_request_that_would_go_beyond_them():
    env = SelectionEnv(by_hand(), top_ks=[2], spreads=np.ones(3))
    assert env.reset(options={"query": 0, "top_k": 2})[0][-2:].tolist() == [1.0, 1.0]
    seen, _ = env.reset(options={"compute": 9 / 12, "memory": 1.0})
    assert seen[-2:] == pytest.approx([1 - 4 / 9, 0.0])
    seen, _, ended, _, info = env.decide(Decision(dropped=(3,), deferred=(0, 1, 2)))
    assert not ended and seen[-2:] == pytest.approx([1 - 7 / 9, 0.25])
    _, _, ended, _, info = env.decide(Decision(deferred=(0, 1, 2)))  # 10 of 12 executions
    assert ended and info["ids"] == (0, 2) and info["reward_terms"]["compute"] == (2 * 60 + 40) / 300
    env.reset(options={"memory": 0.5})
    _, _, ended, _, info = env.step(0)  # all four would stay
    assert ended and info["ids"] == (0, 1)
    with pytest.raises(RankingFailed, match=r"budgets above 0; got compute=0\.0"):
        env.reset(options={"compute": 0})


@pytest.mark.parametrize("budgets", [Budgets(0.4), Budgets(memory=0.6), Budgets(0.5, 0.8)])
def test_a_policy_in_a_replay_keeps_the_same_budgets(budgets):
    env = SelectionEnv(PATHS)
    for query, k in requests():
        options = {"query": query, "top_k": k, "compute": budgets.compute, "memory": budgets.memory}
        env.reset(options=options)
        ended = False
        while not ended:
            _, _, ended, _, _ = env.step(3)
        ranking = replay(PATHS.scores[query], Choosing(lambda seen: 3, env.spreads, budgets), k)
        assert env.selection.ranking == ranking
        n_candidates = len(ranking.layers)
        assert sum(ranking.layers) <= budgets.compute * n_candidates * PATHS.n_layers + 1e-6
        assert sum(layers > 1 for layers in ranking.layers) <= budgets.memory * n_candidates + 1e-6


def test_going_on_reads_everything_and_agrees_with_the_full_model():
    env = SelectionEnv(PATHS)
    env.reset(seed=1)
    for number in range(PATHS.n_layers - 1):
        _, reward, terminated, _, info = env.step(0)
        assert terminated == (number == PATHS.n_layers - 2)
    assert info["reward_terms"] == {"agreement": 1.0, "compute": 1.0} and reward == pytest.approx(0.9)


def requests() -> list[tuple[int, int]]:
    return [(query, k) for query in range(len(PATHS.queries)) for k in (1, 5, 10)]


@pytest.mark.parametrize("threshold", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("keeps_order", [False, True])
def test_any_decider_comes_to_the_same_in_the_environment_as_in_a_replay(threshold, keeps_order):
    env, rule = SelectionEnv(PATHS), ClusterRule(threshold, keeps_order=keeps_order)
    for query, k in requests():
        env.reset(options={"query": query, "top_k": k})
        ended = False
        while not ended:
            _, reward, ended, _, _ = env.decide(rule.decide(env.layer, env.scores, env.selection.n_open))
        assert env.selection.ranking == replay(PATHS.scores[query], rule, k)
        expected = replayed(PATHS.scores[query], PATHS.tokens[query], rule, k)
        assert reward == expected.agreement - 0.1 * expected.compute


def test_any_policy_comes_to_the_same_as_a_decider_in_a_replay():
    """Chooses by the observation alone, and sees the same observations."""
    env, weights = SelectionEnv(PATHS), np.random.default_rng(0).normal(size=(len(CUTS), N_FEATURES))
    weights[0] += 0.4  # longer episodes

    def choose(observation: np.ndarray) -> int:
        seen.append(observation)
        return int(np.argmax(weights @ observation))

    n_decisions = 0
    for query, k in requests():
        seen: list[np.ndarray] = []
        ranking = replay(PATHS.scores[query], Choosing(choose, env.spreads), k)
        replayed_observations, seen = seen, []
        observation, _ = env.reset(options={"query": query, "top_k": k})
        ended = False
        while not ended:
            observation, _, ended, _, _ = env.step(choose(observation))
        assert env.selection.ranking == ranking
        np.testing.assert_array_equal(seen, replayed_observations)
        n_decisions += len(seen)
    assert n_decisions > 2 * len(requests())


def test_requests_are_drawn_from_all_that_there_are():
    env = SelectionEnv(PATHS.part(PATHS.queries[:2]), top_ks=[1, 5, 14, 99])
    drawn = {(info["query"], info["top_k"]) for info in (env.reset(seed=seed)[1] for seed in range(60))}
    assert drawn == {(query, k) for query in PATHS.queries[:2] for k in (1, 5)}


def test_bad_arguments_options_and_actions_are_refused():
    with pytest.raises(InvalidConfig, match="spreads: expected 10 positive numbers"):
        SelectionEnv(PATHS, spreads=np.ones(9))
    with pytest.raises(InvalidConfig, match="top_ks: expected one from 1 to less than 14 candidates"):
        SelectionEnv(PATHS, top_ks=[0, 14])
    with pytest.raises(InvalidReward, match="'agreemnt' has no term"):
        SelectionEnv(PATHS, reward_weights={"agreemnt": 1.0})
    env = SelectionEnv(PATHS)
    with pytest.raises(ResetNeeded):
        env.step(0)
    with pytest.raises(UnknownName, match="option 'querry'"):
        env.reset(options={"querry": 1})
    with pytest.raises(InvalidConfig, match=r"expected a query from 0 to 11 .* got query=12, top_k=1"):
        env.reset(options={"query": 12, "top_k": 1})
    env.reset(seed=0)
    for action in (-1, len(CUTS), 0.5, None):
        with pytest.raises(InvalidAction, match="expected a number from 0 to 13"):
            env.step(action)
    with pytest.raises(RankingFailed, match="names each of 14 candidates once"):
        env.decide(Decision())


def test_thousands_of_steps_a_second():
    env, actions = SelectionEnv(), np.random.default_rng(0).choice(len(CUTS), size=2000, p=[0.87, *[0.01] * 13])
    rates = []
    for _ in range(3):  # the best, for others may use the machine
        env.reset(seed=0)
        started = time.process_time()
        for action in actions:
            if env.step(action)[2]:
                env.reset()
        rates.append(len(actions) / (time.process_time() - started))
    assert max(rates) > 2_000
