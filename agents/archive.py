"""A Pareto archive from local search, as an agent: the greedy walk first, then swaps around the best masks known."""

import time
from collections.abc import Sequence

import numpy as np

from agents.base import SearchResult, Task
from agents.judging import Case, Judging
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies import ArchivePolicy, OrderPolicy
from rap_env.policies.walk import fit_to_budget

_WALK_PART = 0.25  # scenarios drawn for the greedy walk, as a part of the evaluations
_BATCH = 16  # neighbours that are judged together, between two looks at the archive


class ArchiveAgent:
    """What remembering alone achieves with the evaluations that a learned agent gets.

    First come the static order's masks for the grid, and for as many drawn scenarios as a quarter of the evaluations.
    Then each round takes scenarios from the sampler and from the grid by turns, swaps a kept component for a dropped
    one in the best judged mask that fits each, and judges these neighbours together.

    Args:
        evaluations: Distinct masks to judge at most; see `Judging`.
    """

    def __init__(self, evaluations: int | None = None) -> None:
        self._evaluations = evaluations

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        shape, generator = task.problem.shape, np.random.default_rng(task.seed)
        judging = Judging(task, self._evaluations)
        drawn = [task.sampler.sample(shape, generator) for _ in range(int(_WALK_PART * judging.allowed))]
        greedy = OrderPolicy(shape, task.importance.static)
        judging.judge([(greedy.decide(s.workload, s.budget_bytes), s) for s in (*task.grid, *drawn)])
        judging.judge_until_used_up(lambda: neighbours(task, judging, generator))
        return SearchResult(archive_of(task, judging), judging.spent, time.perf_counter() - started)


def archive_of(task: Task, judging: Judging) -> ArchivePolicy:
    """The best of what a search has judged, for every budget."""
    return ArchivePolicy(task.problem.shape, judging.rewards.items(), task.importance.static)


def neighbours(task: Task, judging: Judging, generator: np.random.Generator) -> list[Case]:
    """A batch of swaps in the best judged masks, for scenarios from the sampler and from the grid by turns."""
    best, cases = archive_of(task, judging), []
    for turn in range(_BATCH):
        scenario = task.sampler.sample(task.problem.shape, generator)
        if turn % 2 and task.grid:
            scenario = task.grid[generator.integers(len(task.grid))]
        parent = best.decide(scenario.workload, scenario.budget_bytes)
        cases.append((swap_one(parent, scenario, task.problem.shape, task.importance.static, generator), scenario))
    return cases


def swap_one(
    mask: PruningMask, scenario: Scenario, shape, order: Sequence[str], generator: np.random.Generator
) -> PruningMask:
    """A neighbour that fits: a random kept component goes, a random dropped one comes.

    Where their bytes differ, further components go or come along the order; the one that went comes back last.

    Args:
        mask: Fits the scenario. Where it keeps or drops everything there is nothing to swap, and it comes back itself.
        scenario: What the neighbour has to fit.
        shape: The model.
        order: All component names, the first to go first.
        generator: Draws the two.
    """
    if not mask.kept or not mask.dropped:
        return mask
    going, coming = (group[generator.integers(len(group))].name for group in (mask.kept, mask.dropped))
    between = (name for name in order if name not in (going, coming))
    swapped = mask.drop(going).restore(coming)
    return fit_to_budget(swapped, shape, [going, *between, coming], scenario.workload, scenario.budget_bytes)
