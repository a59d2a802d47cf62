"""Rules that choose levels for `rap/Serving-v0` without learning, and the play of one episode."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rap_env.envs.serving import ServingEnv


class ServingPolicy(Protocol):
    """Whatever chooses levels, a rule or a network."""

    def begin(self, env: ServingEnv) -> None:
        """Forgets the episode before; the environment has just been reset."""

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        """The level until the next decision; rules look at `env.simulation`, networks at the observation."""


@dataclass(frozen=True)
class Played:
    """What came of an episode.

    Attributes:
        reward: Sum of the rewards.
        terms: Sum of each of their terms.
        counts: What happened.
        levels: What was chosen at each decision.
    """

    reward: float
    terms: Mapping[str, float]
    counts: Mapping[str, float]
    levels: tuple[int, ...]


def play(env: ServingEnv, policy: ServingPolicy, options: Mapping[str, Any]) -> Played:
    """Plays an episode, named as `ServingEnv.reset` takes it."""
    observation, info = env.reset(options=dict(options))
    policy.begin(env)
    total, terms, levels = 0.0, dict.fromkeys(info["reward_terms"], 0.0), []
    truncated = False
    while not truncated:
        levels.append(policy.choose(env, observation))
        observation, reward, _, truncated, info = env.step(levels[-1])
        total += reward
        for name, value in info["reward_terms"].items():
            terms[name] += value
    return Played(total, terms, info["counts"], tuple(levels))


class Static:
    """One level, come what may; the environment takes smaller ones where it does not fit.

    Args:
        level: Which.
    """

    def __init__(self, level: int) -> None:
        self._level = level

    def begin(self, env: ServingEnv) -> None:
        """Nothing to forget."""

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        return self._level


class GreedyByTable:
    """The largest level that holds what is in flight and all that waits, now."""

    def begin(self, env: ServingEnv) -> None:
        """Nothing to forget."""

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        level = env.simulation.largest_fitting(env.simulation.wanted_tokens, env.simulation.budget_bytes)
        return len(env.table.levels) - 1 if level is None else level


@dataclass(frozen=True)
class Thresholds:
    """Of `Hysteresis`.

    Attributes:
        slack: Share of the budget that a level leaves free where it is newly chosen.
        window_seconds: A larger level has to have fitted all this time, and so long after the last switch.
        crowd: Requests in the queue from which on the level becomes smaller, one level each window.
        largest: The largest level that is ever chosen.
    """

    slack: float
    window_seconds: float
    crowd: int
    largest: int


class Hysteresis:
    """Shrinks at once where not all requests fit, and grows when there has been room for some time.

    Without slack, window, crowd and limit it is `GreedyByTable`.

    Args:
        thresholds: When.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._budgets: deque[tuple[float, int]] = deque()

    def begin(self, env: ServingEnv) -> None:
        self._budgets = deque()

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        one, own, smallest = env.simulation, self.thresholds, len(env.table.levels) - 1
        self._budgets.append((one.now, one.budget_bytes))
        while self._budgets[0][0] < one.now - own.window_seconds:
            self._budgets.popleft()
        tokens = one.wanted_tokens

        def largest(n_bytes: float) -> int:
            level = one.largest_fitting(tokens, n_bytes)
            return smallest if level is None else max(level, own.largest)

        if largest(one.budget_bytes) > one.level:
            return largest(one.budget_bytes * (1.0 - own.slack))
        rested = one.now - one.switched_seconds >= own.window_seconds
        if rested and len(one.waiting) >= own.crowd:
            return min(one.level + 1, smallest)
        steady = largest(min(n_bytes for _seconds, n_bytes in self._budgets) * (1.0 - own.slack))
        if one.level < own.largest or (rested and steady < one.level and len(one.waiting) < own.crowd):
            return steady
        return one.level


def tuned_hysteresis(
    env: ServingEnv,
    seeds: Sequence[int],
    n_first: int = 20,
    n_kept: int = 12,
    progress: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> Hysteresis:
    """The best thresholds of a grid: all are played on the first episodes, and the best of them on all.

    Args:
        env: What is played.
        seeds: Of the episodes.
        n_first: How many episodes all are played on.
        n_kept: How many thresholds are played on all episodes.
        progress: Is told how many episodes of how many were played.
    """
    levels = range(max(1, len(env.table.levels) // 2))
    grid = [
        Thresholds(*one)
        for one in itertools.product((0.0, 0.05, 0.15), (0.0, 0.5, 2.0, 5.0), (1, 2, 4, 8, 1000), levels)
    ]
    kept_count = min(n_kept, len(grid))
    done, all_of_them = itertools.count(1), len(grid) * len(seeds[:n_first]) + kept_count * len(seeds)

    def mean_reward(thresholds: Thresholds, episodes: Iterable[int]) -> float:
        rewards = []
        for seed in episodes:
            rewards.append(play(env, Hysteresis(thresholds), {"episode_seed": seed}).reward)
            progress(next(done), all_of_them)
        return float(np.mean(rewards))

    first = {one: mean_reward(one, seeds[:n_first]) for one in grid}
    best = sorted(grid, key=first.__getitem__, reverse=True)[:kept_count]
    means = {one: mean_reward(one, seeds) for one in best}
    return Hysteresis(max(best, key=means.__getitem__))


def rivals(env: ServingEnv, hysteresis: Hysteresis) -> dict[str, ServingPolicy]:
    """All rules by name."""
    names = [level.name for level in env.table.levels]
    return {
        **{f"static {name}": Static(level) for level, name in enumerate(names)},
        "greedy by table": GreedyByTable(),
        "tuned hysteresis": hysteresis,
    }
