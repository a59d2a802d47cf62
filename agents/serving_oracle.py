"""A search that knows a whole episode beforehand: what could have been reached, as far as its beam sees."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agents.serving_rivals import ServingPolicy, play
from rap_env.envs.serving import ServingEnv
from rap_env.reward import weighted_reward
from rap_env.serving.jobs import Counts, reward_terms
from rap_env.serving.simulated import Simulation

_Plan = tuple["_Plan", int] | None  # levels from the last one to the first


@dataclass(frozen=True)
class _Branch:
    simulation: Simulation
    plan: _Plan


class Clairvoyant:
    """Beam search over levels with the whole episode known, on a coarser grid of time than decisions.

    It is no upper bound: a better sequence of levels may have left the beam, or change within a part of the grid. It is
    the best that was found, and never worse than the policies that it is given, whose own plays are candidates too.

    Args:
        beam: Branches that are kept after each part.
        part_seconds: How long a level holds.
        others: Policies whose plays are candidates.
    """

    def __init__(self, beam: int = 8, part_seconds: float = 3.0, others: Sequence[ServingPolicy] = ()) -> None:
        self._beam, self._part_seconds, self._others = beam, part_seconds, tuple(others)
        self._levels: Iterator[int] = iter(())

    def begin(self, env: ServingEnv) -> None:
        """Searches; the environment stays as it is."""
        plans = [self._searched(env)]
        other_env = copy.copy(env)
        plans += [play(other_env, other, {"episode": env.simulation.episode}).levels for other in self._others]
        rewards = [_reward(env, _replayed(env, plan)) for plan in plans]
        self._levels = iter(plans[int(np.argmax(rewards))])

    def choose(self, env: ServingEnv, observation: np.ndarray) -> int:
        return next(self._levels)

    def _searched(self, env: ServingEnv) -> tuple[int, ...]:
        branches, seconds = [_Branch(env.simulation.clone(), None)], 0.0
        duration = env.simulation.episode.duration_seconds
        while seconds < duration:
            seconds = min(duration, seconds + self._part_seconds)
            grown = (
                _grown(env, branch, level, seconds)
                for branch, level in itertools.product(branches, range(len(env.table.levels)))
            )
            different = {_looks_of(branch): branch for branch in grown}
            ranked = sorted(different.values(), key=lambda branch: _promise(env, branch.simulation), reverse=True)
            branches = ranked[: self._beam]
        return _unrolled(max(branches, key=lambda branch: _reward(env, branch.simulation)).plan)


def _grown(env: ServingEnv, branch: _Branch, level: int, until_seconds: float) -> _Branch:
    """The branch, gone on with a level, decision by decision as the environment does."""
    simulation, plan = branch.simulation.clone(), branch.plan
    while simulation.now < until_seconds:
        simulation.advance(level, simulation.now + env.decide_seconds)
        plan = plan, level
    return _Branch(simulation, plan)


def _looks_of(branch: _Branch) -> tuple:
    """Branches that look the same go on the same, nearly enough."""
    one = branch.simulation
    return one.level, one.now, one.n_running, len(one.waiting), one.counts.quality_tokens, one.counts.forced


def _reward(env: ServingEnv, simulation: Simulation) -> float:
    terms = reward_terms(Counts(), simulation.counts, simulation.episode.offered_tokens, env.n_decisions)
    return weighted_reward(terms, env.reward_weights)


def _promise(env: ServingEnv, simulation: Simulation) -> float:
    """The reward so far, and that of what has been generated of requests in flight."""
    weight = env.reward_weights.get("served", 0.0)
    return _reward(env, simulation) + weight * simulation.pending_quality / max(1, simulation.episode.offered_tokens)


def _replayed(env: ServingEnv, levels: Sequence[int]) -> Simulation:
    simulation = env.simulation.clone()
    for level in levels:
        simulation.advance(level, simulation.now + env.decide_seconds)
    return simulation


def _unrolled(plan: _Plan) -> tuple[int, ...]:
    levels = []
    while plan is not None:
        plan, level = plan
        levels.append(level)
    return tuple(reversed(levels))
