"""Random search, as an agent: random masks that fit, judged, and the best of them remembered."""

import time

import numpy as np

from agents.base import SearchResult, Task
from agents.judging import Case, Judging
from rap_env.mask import PruningMask
from rap_env.policies import ArchivePolicy
from rap_env.policies.walk import fit_to_budget


class RandomSearchAgent:
    """Drops components in random orders; every round judges one mask for each scenario of the grid.

    So the scenarios share the evaluations evenly, and the archive serves each the best mask that was found for any of
    them. Budgets that nothing fits are served by a random order too: the search knows nothing of importance.

    Args:
        evaluations: Distinct masks to judge at most; see `Judging`.
    """

    def __init__(self, evaluations: int | None = None) -> None:
        self._evaluations = evaluations

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        shape, generator = task.problem.shape, np.random.default_rng(task.seed)
        names = [component.name for component in shape.components]
        dense = PruningMask.all_kept(shape)

        def random_order() -> list[str]:
            return [names[position] for position in generator.permutation(len(names))]

        def propose() -> list[Case]:
            return [(fit_to_budget(dense, shape, random_order(), s.workload, s.budget_bytes), s) for s in task.grid]

        judging, last_order = Judging(task, self._evaluations), random_order()
        judging.judge_until_used_up(propose)
        policy = ArchivePolicy(shape, judging.rewards.items(), last_order)
        return SearchResult(policy, judging.spent, time.perf_counter() - started)
