"""Mixed-integer programming, as an agent: what each component costs on its own, and the best sum for every budget."""

import time

from agents.base import SearchResult, Task
from rap_env.importance.single_drops import single_drop_increases
from rap_env.policies import MilpPolicy


class MilpAgent:
    """Measures the dense model's loss increase without each component; the policy solves when it is asked (Puzzle)."""

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        problem = task.problem
        increases, tokens = single_drop_increases(problem.llm, task.windows, problem.store)
        policy = MilpPolicy(problem.shape, increases)
        return SearchResult(policy, 0, time.perf_counter() - started, calibration_tokens=tokens)
