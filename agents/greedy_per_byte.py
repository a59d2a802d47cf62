"""Greedy by loss for each byte that is freed, as an agent: an order for every workload of the grid."""

import time

from agents.base import SearchResult, Task
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.policies import NearestOrderPolicy


class GreedyPerByteAgent:
    """Greedy sequential importance with the workload's bytes in the price, once for each workload on the grid.

    Bytes depend on a workload through its total tokens alone, so workloads of equal totals share one order; trials that
    an earlier order made are read from the store. Workloads beside the grid get the nearest order.

    Args:
        removals: Rounds for each workload; None removes everything. See `greedy_sequential_importance`.
        exact: Whether every round tries every kept component; otherwise the lazy rule.
    """

    def __init__(self, removals: int | None = None, exact: bool = False) -> None:
        self._removals, self._exact = removals, exact

    def search(self, task: Task) -> SearchResult:
        """Ranks for every workload.

        Raises:
            ValueError: The grid is empty, so that there is no workload to rank for.
        """
        started = time.perf_counter()
        workloads = {scenario.workload.total_tokens: scenario.workload for scenario in task.grid}
        rankings = {}
        for tokens, workload in workloads.items():
            done = len(rankings)
            rankings[tokens] = greedy_sequential_importance(
                task.problem.llm,
                task.windows,
                self._removals,
                self._exact,
                task.problem.store,
                lambda rounds, total, done=done: task.progress(done * total + rounds, len(workloads) * total),
                workload,
            )
        policy = NearestOrderPolicy(task.problem.shape, {tokens: ranking.order for tokens, ranking in rankings.items()})
        tokens = sum(ranking.tokens for ranking in rankings.values())
        details = {"losses": {str(total): list(ranking.losses) for total, ranking in rankings.items()}}
        return SearchResult(policy, 0, time.perf_counter() - started, details, calibration_tokens=tokens)
