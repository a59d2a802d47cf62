"""What a search over a family begins with: what each site costs at every width, and where climbs start."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from agents.base import Task
from agents.model_gradient import ModelGradientAgent
from rap_env.errors import SearchExhausted
from rap_env.importance.site_curves import component_costs, measure_site_curves
from rap_env.mask import PruningMask
from rap_env.policies import Policy

_NARROWEST = 0.5  # parts: how far from a part slopes are averaged at least, where a site has few
_PART_OF_SITE = 1 / 8  # how far they are averaged in others


class Known(NamedTuple):
    """What a search knows when it begins.

    Attributes:
        curves: For each site what it costs at a width of 0, 1 ... all parts, by what the score falls.
        costs: The same of each component, when it goes after those behind it, by name.
        rewards: Of all masks that were evaluated, the dense one among them.
        walks: Policies that tell of masks which are worth a look for any context.
        details: What a record should keep.
    """

    curves: Sequence[Sequence[float]]
    costs: Mapping[str, float]
    rewards: Mapping[PruningMask, float]
    walks: Sequence[Policy]
    details: dict[str, Any]


class Beginning(Protocol):
    """What comes before a search's own questions."""

    def known(self, task: Task) -> Known:
        """Evaluates whatever it takes, within the token budget.

        Raises:
            SearchExhausted: The budget does not cover it.
        """


class MeasuredCurves:
    """Each site alone is measured at a few widths, with all others whole.

    Args:
        levels: Widths of a site, at most; fewer where `budget_part` does not pay for them.
        budget_part: Of the token budget, what they may take.
    """

    def __init__(self, levels: int = 2, budget_part: float = 0.5) -> None:
        self._levels, self._budget_part = levels, budget_part

    def known(self, task: Task) -> Known:
        curves = measure_site_curves(task.problem.meter, self._levels, self._budget_part)
        rewards = _rewards(task, curves.known)
        return Known(curves.increases, curves.costs, rewards, (), {"levels": curves.levels})


class LearnedSlopes:
    """A policy is trained by the model's own gradient, and its slopes say what each part of a site costs.

    A slope tells what the loss changes by with one part more, where the policy stands. Integrated over the widths that
    it went through, with all sites narrow together, they are what each site adds. The policy itself tells of masks.

    Args:
        learner: It takes a few steps, fewer than the token budget pays for.
    """

    def __init__(self, learner: ModelGradientAgent) -> None:
        self._learner = learner

    def known(self, task: Task) -> Known:
        problem, learner = task.problem, self._learner
        learner.begin(task)
        learner.learn()
        if not learner.measured:
            raise SearchExhausted(f"{problem.budget.left:,} tokens are left, which do not pay for a step of the policy")
        dense = PruningMask.all_kept(problem.shape)
        problem.meter.evaluate([dense])
        widths, slopes = (np.concatenate(found) for found in zip(*learner.measured, strict=True))
        curves = curves_along(widths, slopes, dense.widths)
        costs = component_costs(problem.shape.components, curves)
        return Known(curves, costs, _rewards(task, [dense]), (learner.policy(),), {"losses": learner.details["losses"]})


def curves_along(widths: np.ndarray, slopes: np.ndarray, n_parts: Sequence[int]) -> list[list[float]]:
    """What each site costs at a width of 0, 1 ... all parts, from slopes at widths that all sites had together.

    What a part costs is the mean of the slopes around its middle, by a normal window; beyond the widths that were
    visited it is that of the nearest.

    Args:
        widths: Fractional widths of sites [N, S].
        slopes: What the loss changes by with one part more of each site [N, S].
        n_parts: Of each site [S].
    """
    curves = []
    for own, of_site, parts in zip(widths.T, slopes.T, n_parts, strict=True):
        away = (own[:, None] - np.arange(parts) - 0.5) / max(_NARROWEST, _PART_OF_SITE * parts)  # [N, P]
        closeness = -np.square(away) / 2.0
        weights = np.exp(closeness - closeness.max(axis=0))
        costs = -(weights * of_site[:, None]).sum(axis=0) / weights.sum(axis=0)
        curves.append([*np.cumsum(costs[::-1])[::-1].tolist(), 0.0])
    return curves


def _rewards(task: Task, masks: Iterable[PruningMask]) -> dict[PruningMask, float]:
    known = task.problem.meter.known
    return {mask: task.problem.reward_within_budget(known[mask]) for mask in masks}
