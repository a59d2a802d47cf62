"""What searches for one scenario after another share: parts of the evaluation budget, and an archive at the end."""

import math
import time
from collections.abc import Iterator, Sequence

from agents.base import SearchResult, Task
from agents.grains import Grain, grains_of
from rap_env.mask import PruningMask
from rap_env.policies import ArchivePolicy


class ScenarioJudge:
    """Judges masks for one scenario after another, each within an equal share of what is left of the budget.

    Every mask that it judges fits, so that its reward does not depend on the scenario: overshoot is zero.

    Args:
        task: Its problem judges; its grid is what is searched for.

    Attributes:
        rewards: Reward of every mask that was judged.
        evaluation_tokens: Tokens that one evaluation forwards; 1 before the first.
        calibration_tokens: Tokens that the search forwarded beside the problem's evaluations; its shares pay for them,
            so that searches of one budget forward equally many tokens in all.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._started = task, time.perf_counter()
        self._grain: Grain | None = None
        self._share_ends = math.inf
        self._n_searches = 0
        self.rewards: dict[PruningMask, float] = {}
        self.evaluation_tokens = 1
        self.calibration_tokens = 0

    def turns(self, grain: str) -> Iterator[Grain]:
        """The searches that the grid asks for, one after the other; each begins with a share of its own."""
        grains = grains_of(grain, self._task.problem.shape, self._task.grid)
        self._n_searches = len(grains)
        for number, self._grain in enumerate(grains):
            limit = self._task.problem.budget.limit
            if limit is not None:
                self._share_ends = self._spent + (limit - self._spent) / (len(grains) - number)
            yield self._grain
            evaluations = self._task.problem.budget.spent
            best = max(self.rewards.values(), default=math.nan)
            self._task.log(evaluations, {"evaluations": evaluations, "best_reward": best})
            if limit is None:
                self._task.progress(number + 1, len(grains))

    @property
    def _spent(self) -> float:
        return self._task.problem.budget.spent + self.calibration_tokens / self.evaluation_tokens

    @property
    def left(self) -> float:
        """Evaluations that the present share still pays."""
        return self._share_ends - self._spent

    def judge(self, masks: Sequence[PruningMask]) -> list[float]:
        """Rewards of the first masks, together in one call: as many as the share pays; known ones cost nothing."""
        new: set[str] = set()
        for number, mask in enumerate(masks):
            new |= {mask.digest} - self._task.problem.budget.asked
            if len(new) > self.left:
                masks = masks[:number]
                break
        scenario = self._grain.scenario
        cases = [(mask, scenario.workload, scenario.budget_bytes) for mask in masks]
        outcomes = self._task.problem.evaluate_many(cases)
        for mask, outcome in zip(masks, outcomes, strict=True):
            self.rewards[mask] = self._task.problem.reward(outcome)
            self.evaluation_tokens = outcome.evaluation.tokens
        if (limit := self._task.problem.budget.limit) is not None:
            self._task.progress(self._task.problem.budget.spent, limit)
        return [self.rewards[mask] for mask in masks]

    def result(self) -> SearchResult:
        """Ends as the best mask for each budget among all that were judged, whatever scenario it was judged for."""
        problem = self._task.problem
        policy = ArchivePolicy(problem.shape, self.rewards.items(), self._task.importance.static)
        seconds = time.perf_counter() - self._started
        details = {"searches": self._n_searches}
        return SearchResult(policy, problem.budget.spent, seconds, details, self.calibration_tokens)
