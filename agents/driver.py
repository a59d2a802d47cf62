"""The one driver of all searches: it owns the token budget, progress, log and archive, and evaluates what is asked for.

A search that was killed is resumed by running it again: it asks for the same masks, and the store answers.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from agents.base import Agent, Case, Evaluated, Learner, Task
from rap_env.errors import SearchExhausted
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario
from rap_env.policies import Policy

_PATIENCE = 50  # proposals in a row that hold nothing new: a small model runs out of masks


@dataclass(frozen=True)
class SearchResult:
    """What a search ends as.

    Attributes:
        policy: Maps (workload, memory budget) to a mask.
        tokens: Tokens that it spent, rankings included.
        evaluations: Distinct masks that were evaluated on the search half.
        seconds: Time that it took here; the store may have known much of it.
        details: Whatever else the agent tells.
    """

    policy: Policy
    tokens: int
    evaluations: int
    seconds: float = field(compare=False)
    details: dict[str, Any] = field(default_factory=dict, compare=False)


def run_search(agent: Agent, task: Task, in_flight: int = 1) -> SearchResult:
    """Lets an agent search within its task's token budget.

    Args:
        agent: A fresh one.
        task: Its problem's budget has a limit.
        in_flight: Batches that the agent is asked for before it gets the outcomes of the first.

    Raises:
        SearchExhausted: The token budget does not even cover what the search begins with, as a rule its ranking.
        ValueError: The budget has no limit, or no batch may be in flight.
    """
    if task.problem.budget.limit is None or in_flight < 1:
        raise ValueError(f"expected a token budget with a limit and in_flight of at least 1; got {in_flight}")
    started = time.perf_counter()
    task.pay_for_preparation()
    task.problem.prepare()
    agent.begin(task)
    if isinstance(agent, Learner):
        agent.learn()
    else:
        _Driver(agent, task, in_flight).run()
    policy = agent.policy()
    seconds = time.perf_counter() - started
    return SearchResult(policy, task.problem.budget.spent, len(evaluated_masks(task)), seconds, agent.details)


def evaluated_masks(task: Task) -> list[tuple[PruningMask, int]]:
    """Masks that were paid for on the search half, in order, with the tokens that were spent by then."""
    owner = task.problem.meter.owner
    return [
        (entry.key, entry.spent_tokens)
        for entry in task.problem.budget.history
        if entry.owner == owner and isinstance(entry.key, PruningMask)
    ]


class _Driver:
    def __init__(self, agent: Agent, task: Task, in_flight: int) -> None:
        self._agent, self._task, self._in_flight = agent, task, in_flight
        self._waiting: deque[list[Case]] = deque()
        self._without_news = 0
        self._best: dict[Scenario, float] = {}
        self._looked_at: set[PruningMask] = set()

    def run(self) -> None:
        """Asks, evaluates and tells until the search is over or the budget is used up."""
        while True:
            while len(self._waiting) < self._in_flight and (cases := self._ask()):
                self._waiting.append(cases)
            if not self._waiting:
                return
            self._agent.tell(self._evaluate(self._waiting.popleft()))

    def _ask(self) -> list[Case]:
        meter = self._task.problem.meter
        n = int(meter.budget.left // meter.tokens_each) - sum(map(len, self._waiting))
        if n < 1 or self._without_news >= _PATIENCE:
            return []
        try:
            return self._agent.ask(n)
        except SearchExhausted:  # what the agent evaluates by itself before it proposes
            return []

    def _evaluate(self, cases: list[Case]) -> list[Evaluated]:
        task, problem = self._task, self._task.problem
        paid = set(problem.meter.affordable([case.mask for case in cases]))
        cases = [case for case in cases if case.mask in paid]
        news = paid - problem.meter.known.keys()
        self._without_news = 0 if news else self._without_news + 1 if paid else _PATIENCE
        outcomes = problem.evaluate_many([(c.mask, c.scenario.workload, c.scenario.budget_bytes) for c in cases])
        rewards = [problem.reward(outcome) for outcome in outcomes]
        evaluated = [Evaluated(*case, *of_case) for case, *of_case in zip(cases, outcomes, rewards, strict=True)]
        task.remember(one.mask for one in evaluated if one.outcome.fits)
        if rewards:
            spent, metrics = problem.budget.spent, {"reward": sum(rewards) / len(rewards)}
            task.log(spent, metrics | self._best_reward())
            task.progress(spent, problem.budget.limit)
        return evaluated

    def _best_reward(self) -> dict[str, float]:
        """The best reward known for a search scenario, mean over all; nothing while there is one without a mask."""
        shape, archive = self._task.problem.shape, self._task.archive
        for mask in archive.keys() - self._looked_at:
            for scenario in self._task.scenarios:
                if footprint(shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes:
                    self._best[scenario] = max(archive[mask], self._best.get(scenario, -math.inf))
        self._looked_at |= archive.keys()
        complete = self._best and len(self._best) == len(set(self._task.scenarios))
        return {"best_reward": sum(self._best.values()) / len(self._best)} if complete else {}
