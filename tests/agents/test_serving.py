"""Rules and learners in the simulated service."""

import numpy as np
import pytest

from agents.serving_learners import ALGORITHMS, learn
from agents.serving_oracle import Clairvoyant
from agents.serving_rivals import GreedyByTable, Hysteresis, Static, Thresholds, play, rivals, tuned_hysteresis
from rap_env.envs.serving import ServingEnv
from rap_env.errors import UnknownName
from rap_env.rng import global_states
from rap_env.serving.episodes import Setting
from rap_env.serving.jobs import Targets
from tests.serving.cases import TABLE, episode

SHORT = Setting(duration_seconds=12.0, requests_per_second=(0.5, 2.0))
CALM = Thresholds(slack=0.05, window_seconds=2.0, crowd=4, largest=0)


def test_a_play_adds_up_and_is_the_same_again():
    env = ServingEnv(setting=SHORT)
    first, again = (play(env, GreedyByTable(), {"episode_seed": 4}) for _ in range(2))
    assert first == again
    assert first.reward == pytest.approx(sum(env.reward_weights[name] * first.terms[name] for name in first.terms))
    assert play(env, Static(3), {"episode_seed": 4}).levels[:2] == (3, 3)


def test_greedy_takes_the_largest_level_that_holds_all_requests():
    env = ServingEnv(TABLE, Setting(whole_tokens=85))
    for share, level in ((1.0, 0), (0.675, 0), (0.67, 1), (0.1, 1)):  # 20 tokens: 1350 or 850 of 2000 bytes
        observation, _ = env.reset(options={"episode": episode((0.0, 10, 10), shares=((0.0, share),))})
        assert GreedyByTable().choose(env, observation) == level


def test_hysteresis_shrinks_at_once_and_grows_after_a_window():
    env = ServingEnv(TABLE, Setting(whole_tokens=85), Targets(99.0, 99.0, 99.0), decide_seconds=1.0)
    rule = Hysteresis(CALM)
    memory = ((0.0, 1.0), (3.0, 0.45), (5.0, 1.0))
    observation, _ = env.reset(options={"episode": episode((0.0, 10, 10), shares=memory, seconds=20.0)})
    rule.begin(env)
    chosen = []
    for _ in range(12):
        chosen.append((round(env.simulation.now, 2), rule.choose(env, observation)))
        observation = env.step(chosen[-1][1])[0]
    grown = next(seconds for seconds, level in chosen if seconds > 5.0 and level == 0)
    assert {level for seconds, level in chosen if 3.2 < seconds < grown} == {1}
    assert grown >= 7.0, "the budget was low up to 5 seconds, and the window has two"


def test_hysteresis_without_thresholds_is_greedy():
    env = ServingEnv(setting=SHORT)
    plain = Hysteresis(Thresholds(slack=0.0, window_seconds=0.0, crowd=1000, largest=0))
    for seed in range(3):
        greedy = play(env, GreedyByTable(), {"episode_seed": seed})
        assert play(env, plain, {"episode_seed": seed}) == greedy


def test_hysteresis_becomes_smaller_where_requests_queue():
    env = ServingEnv(TABLE, Setting(whole_tokens=85))
    waiting = [(0.0, 10, 2)] * 4  # the dense model holds all of them
    observation, _ = env.reset(options={"episode": episode(*waiting)})
    rule = Hysteresis(Thresholds(slack=0.0, window_seconds=0.0, crowd=3, largest=0))
    rule.begin(env)
    assert rule.choose(env, observation) == 1


def test_tuning_finds_thresholds_that_are_at_least_as_good_as_any_that_it_plays():
    env, told = ServingEnv(setting=SHORT), []
    tuned = tuned_hysteresis(env, range(4), n_first=2, n_kept=3, progress=lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1] == len(told)
    assert tuned.thresholds == tuned_hysteresis(env, range(4), n_first=2, n_kept=3).thresholds


@pytest.mark.parametrize("seed", range(4))
def test_the_clairvoyant_search_is_never_worse_than_any_rule(seed):
    env = ServingEnv(setting=SHORT)
    rules = rivals(env, Hysteresis(CALM))
    best = max(play(env, rule, {"episode_seed": seed}).reward for rule in rules.values())
    found = play(env, Clairvoyant(beam=3, others=list(rules.values())), {"episode_seed": seed})
    assert found.reward >= best - 1e-12
    alone = play(env, Clairvoyant(beam=3), {"episode_seed": seed})
    assert found.reward >= alone.reward - 1e-12


def test_the_clairvoyant_search_finds_the_best_level_where_it_is_known():
    env = ServingEnv(TABLE, Setting(whole_tokens=85), Targets(99.0, 1.3, 99.0), decide_seconds=1.0)
    alone = episode((0.0, 10, 8), seconds=12.0)  # dense steps take 1.1 s and a little: in time, so nothing beats it
    found = play(env, Clairvoyant(beam=4), {"episode": alone})
    assert found.reward == pytest.approx(1.0) and set(found.levels) == {0}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learners_play_as_they_were_trained_and_leave_global_random_state_alone(algorithm):
    before = repr(global_states()["python"])
    steps = []
    learned = [learn(algorithm, lambda: ServingEnv(setting=SHORT), 64, 1, steps.append) for _ in range(2)]
    assert repr(global_states()["python"]) == before and steps[-1] >= 64
    plays = [play(ServingEnv(setting=SHORT), one, {"episode_seed": 2}) for one in (*learned, learned[0])]
    assert plays[0] == plays[1] == plays[2]


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(UnknownName, match="algorithm 'pqo'"):
        learn("pqo", ServingEnv, 1, 0)


def test_ppo_learns_to_keep_a_level_that_always_fits():
    """One request at a time, all memory and all time: the dense model is best, and switching only costs."""
    setting = Setting(duration_seconds=10.0, requests_per_second=(0.5, 0.5), memory_shares=(1.0, 1.0))

    def make() -> ServingEnv:
        return ServingEnv(setting=setting, targets=Targets(60.0, 60.0, 60.0))

    learned = learn("ppo", make, 16_384, 0)
    rng = np.random.default_rng(0)

    class AtRandom(Static):
        def choose(self, env, observation):
            return int(rng.integers(8))

    env = make()
    mean = {
        name: np.mean([play(env, one, {"episode_seed": seed}).reward for seed in range(10)])
        for name, one in {"learned": learned, "random": AtRandom(0), "dense": Static(0)}.items()
    }
    assert mean["learned"] > mean["random"] + 0.5 * (mean["dense"] - mean["random"])
