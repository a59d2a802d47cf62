"""Search on predictions, as an agent: a surrogate learns from the judged masks and says which to judge next."""

import time
from collections.abc import Callable

import numpy as np

from agents.archive import archive_of, neighbours, swap_one
from agents.base import SearchResult, Task
from agents.judging import Case, Judging
from agents.policy_gradient import PolicyGradient
from rap_env.evaluation.predictor import ScorePredictor
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies import ArchivePolicy, OrderPolicy
from rap_env.policies.walk import fit_to_budget

_BATCH = 16  # proposals that are judged together, between two fits of the predictor
_WALK_PART = 0.1  # scenarios drawn for the greedy walk, as a part of the evaluations
_DRAWN = 12  # scenarios from the sampler that a batch is proposed for, beside the grid's
_OF_EACH = 3  # proposals that a scenario has in a batch at most
_PREDICTED = 512  # scenarios that the policy gets a predicted mask for, if that betters the judged ones
_NEIGHBOURS, _CLIMBS = 48, 6  # swaps that are looked at in a climb, and how often


class SurrogateAgent:
    """Judges few masks, predicts all others, and judges next what promises most (Bayesian optimisation).

    It begins with the static order's masks for the grid and for drawn scenarios. Then, until the evaluations are used
    up: fit the predictor to all judged masks, and to what the ranking measured; for scenarios from the grid and the
    sampler climb from the best judged mask by swaps; judge those that may be expected to better the best known mask of
    their scenario by most. What was judged is kept in a Pareto archive, which decides; for budgets between those of its
    masks it also holds masks that were only predicted.

    With policy steps it becomes Dyna (Sutton 1991): a policy network trains on predicted rewards of its own masks, for
    scenarios from the sampler, and its masks are further starts of the climbs.

    Args:
        evaluations: Distinct masks to judge at most; see `Judging`.
        policy_steps: Gradient steps of a policy network between two batches of judged masks; 0 for no such network.
        width: Its hidden units.
    """

    def __init__(self, evaluations: int | None = None, policy_steps: int = 0, width: int = 64) -> None:
        self._evaluations, self._policy_steps, self._width = evaluations, policy_steps, width

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        search = _Search(task, Judging(task, self._evaluations), self._policy_steps, self._width)
        search.begin()
        search.judging.judge_until_used_up(search.propose)
        policy = search.policy()
        details = {"predictor_errors": search.errors}
        return SearchResult(policy, search.judging.spent, time.perf_counter() - started, details)


class _Search:
    """The state of one search."""

    def __init__(self, task: Task, judging: Judging, policy_steps: int, width: int) -> None:
        self.judging = judging
        self.errors: list[float] = []
        self._task, self._policy_steps = task, policy_steps
        self._generator = np.random.default_rng(task.seed)
        self._policy: PolicyGradient | None = None
        if policy_steps:
            self._policy = PolicyGradient(task.problem.shape, task.importance.static, width, task.seed)
        self._predictor: ScorePredictor | None = None
        self._fitted_to = 0

    def begin(self) -> None:
        """Judges the dense model and the greedy walk."""
        shape = self._task.problem.shape
        greedy = OrderPolicy(shape, self._task.importance.static)
        drawn = [self._draw() for _ in range(int(_WALK_PART * self.judging.allowed))]
        self.judging.judge([(greedy.decide(s.workload, s.budget_bytes), s) for s in (*self._task.grid, *drawn)])

    def archive(self) -> ArchivePolicy:
        return archive_of(self._task, self.judging)

    def policy(self) -> ArchivePolicy:
        """The archive, and between the budgets of its masks others that are predicted to be better.

        These are climbed to for scenarios from the sampler, from the best judged mask with whatever there is still room
        for, and stand in the archive with a cautious prediction as their score. They cost no evaluation, and no time
        when the policy serves.
        """
        scores, best = dict(self.judging.rewards), self.archive()
        shape, order = self._task.problem.shape, self._task.importance.static
        if len(scores) > 1:
            self._fit()
            for scenario in (self._draw() for _ in range(_PREDICTED)):
                known = best.decide(scenario.workload, scenario.budget_bytes)
                filled = fit_to_budget(known, shape, order, scenario.workload, scenario.budget_bytes)
                for mask, score in self._climb([filled], scenario, self._predictor.cautious)[:1]:
                    if score > self._score(known):
                        scores[mask] = score
        return ArchivePolicy(shape, scores.items(), order)

    def propose(self) -> list[Case]:
        """A batch of masks that were not judged yet, the most promising for a scenario each."""
        if len(self.judging.rewards) < 2:
            return neighbours(self._task, self.judging, self._generator)
        self._fit()
        reward = self._predictor.predict
        for _ in range(self._policy_steps):
            self._policy.step([self._draw() for _ in range(_BATCH)], reward)
        best, gains = self.archive(), {}
        for scenario in (*self._task.grid, *[self._draw() for _ in range(_DRAWN)]):
            known = best.decide(scenario.workload, scenario.budget_bytes)
            starts = [known, *self._policy.propose(scenario, 4)] if self._policy else [known]
            score = self._score(known)
            for mask, gain in self._climb(
                starts, scenario, lambda masks, score=score: self._predictor.expected_improvement(masks, score)
            ):
                if gain > gains.get(mask, (0.0, None))[0]:
                    gains[mask] = gain, scenario
        promising = sorted(gains, key=lambda mask: gains[mask][0], reverse=True)[:_BATCH]
        cases = [(mask, gains[mask][1]) for mask in promising]
        return cases or neighbours(self._task, self.judging, self._generator)

    def _fit(self) -> None:
        """Fits the kernel's sizes again whenever there is half as much again to fit them to."""
        n = len(self.judging.rewards)
        settled = self._predictor if n < 1.5 * self._fitted_to else None
        self._fitted_to = self._fitted_to if settled else n
        self._predictor = ScorePredictor(self.judging.rewards, settled, self._task.importance.known)
        self.errors.append(self._predictor.leave_one_out_error)

    def _score(self, mask: PruningMask) -> float:
        """A mask's reward, or where it was not judged what is predicted."""
        known = self.judging.rewards.get(mask)
        return float(self._predictor.predict([mask])[0]) if known is None else known

    def _climb(
        self, starts: list[PruningMask], scenario: Scenario, promise: Callable[[list[PruningMask]], np.ndarray]
    ) -> list[tuple[PruningMask, float]]:
        """The most promising new masks among the starts and swaps of the best ones, and what they may better."""
        shape, order = self._task.problem.shape, self._task.importance.static
        seen: dict[PruningMask, float] = {}

        def look(masks: list[PruningMask]) -> None:
            fresh = [mask for mask in dict.fromkeys(masks) if mask not in seen]
            if fresh:
                seen.update(zip(fresh, promise(fresh).tolist(), strict=True))

        look(starts)
        for _ in range(_CLIMBS):
            top = max(seen, key=seen.__getitem__)
            look([swap_one(top, scenario, shape, order, self._generator) for _ in range(_NEIGHBOURS)])
        new = [(mask, gain) for mask, gain in seen.items() if mask not in self.judging.rewards]
        return sorted(new, key=lambda entry: entry[1], reverse=True)[:_OF_EACH]

    def _draw(self) -> Scenario:
        return self._task.sampler.sample(self._task.problem.shape, self._generator)
