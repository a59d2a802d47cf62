"""One-shot importance, as an agent: components ordered once, by what the dense model loses without each."""

import time

from agents.base import SearchResult, Task
from rap_env.importance.single_drops import single_drop_increases
from rap_env.policies import OrderPolicy


class OneShotAgent:
    """GSI's first round and no other: what re-measuring on the shrunk model gains shows in the difference."""

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        problem = task.problem
        increases, tokens = single_drop_increases(problem.llm, task.windows, problem.store)
        policy = OrderPolicy(problem.shape, sorted(increases, key=increases.__getitem__))
        details = {"increases": increases}
        return SearchResult(policy, 0, time.perf_counter() - started, details, calibration_tokens=tokens)
