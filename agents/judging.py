"""Judging within an evaluation budget: a search proposes masks, this asks the problem while evaluations last."""

from collections.abc import Callable, Sequence

from agents.base import Task
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario

Case = tuple[PruningMask, Scenario]

_WITHOUT_LIMIT = 384  # conf/config.yaml's `max_evaluations`
_PATIENCE = 50  # proposals in a row that hold nothing new: a small model runs out of masks


class Judging:
    """What one search has judged.

    Args:
        task: Its problem judges; its log hears of every batch.
        evaluations: Distinct masks that the search may ask about, if the problem's budget leaves so many. None for all
            that it leaves, or 384 where it has no limit.

    Attributes:
        allowed: How many it may ask about in all.
        rewards: Every judged mask's reward. All cases fit, so that it depends on the mask alone.

    Raises:
        ValueError: The number of evaluations is negative.
    """

    def __init__(self, task: Task, evaluations: int | None = None) -> None:
        if evaluations is not None and evaluations < 0:
            raise ValueError(f"expected at least 0 evaluations; got {evaluations}")
        budget = task.problem.budget
        limits = [evaluations, budget.left]
        self.allowed = max(0, min((limit for limit in limits if limit is not None), default=_WITHOUT_LIMIT))
        self.rewards: dict[PruningMask, float] = {}
        self._task, self._spent_before = task, budget.spent

    @property
    def spent(self) -> int:
        """Evaluations that this search has used."""
        return self._task.problem.budget.spent - self._spent_before

    def judge(self, cases: Sequence[Case]) -> int:
        """Judges masks that fit their scenarios, all together; where evaluations are short, the first ones.

        Returns:
            How many were new to this search.
        """
        new = self._affordable({mask: scenario for mask, scenario in cases if mask not in self.rewards})
        if new:
            problem = self._task.problem
            outcomes = problem.evaluate_many([(mask, s.workload, s.budget_bytes) for mask, s in new.items()])
            rewards = [problem.reward(outcome) for outcome in outcomes]
            self.rewards.update(zip(new, rewards, strict=True))
            self._task.log(self.spent, {"reward": sum(rewards) / len(rewards)})
            self._task.progress(self.spent, self.allowed)
        return len(new)

    def judge_until_used_up(self, propose: Callable[[], Sequence[Case]]) -> None:
        """Judges what is proposed until no evaluation is left, or nothing new has been proposed for long."""
        barren = 0
        while self.spent < self.allowed and barren < _PATIENCE:
            barren = 0 if self.judge(propose()) else barren + 1

    def _affordable(self, cases: dict[PruningMask, Scenario]) -> dict[PruningMask, Scenario]:
        """Leaves out what would exceed the budget; masks that the problem was asked about before are free."""
        affordable, left = {}, self.allowed - self.spent
        for mask, scenario in cases.items():
            cost = mask.digest not in self._task.problem.budget.asked
            if cost <= left:
                affordable[mask], left = scenario, left - cost
        return affordable
