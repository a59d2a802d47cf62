"""Greedy sequential importance without learning, as an agent: RAP's order, walked until the model fits."""

from agents.base import SearchResult, Task
from rap_env.policies import OrderPolicy


class GreedyGsiAgent:
    """Follows the static importance order; needs no evaluation beyond the ranking's own trials."""

    def search(self, task: Task) -> SearchResult:
        return SearchResult(OrderPolicy(task.problem.shape, task.importance.static), evaluations=0, seconds=0.0)
