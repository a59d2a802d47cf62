"""What learners train on: the task's problem with an answer for every mask, and rewards relative to greedy pruning."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.base import Task
from rap_env.mask import PruningMask
from rap_env.memory.footprint import component_bytes, footprint, smallest_bytes
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy
from rap_env.policies.walk import fit_to_budget
from rap_env.problem import Outcome


@dataclass(frozen=True)
class TrainingOutcome(Outcome):
    """An outcome as a learner sees it.

    Attributes:
        greedy_reward: Reward of the greedy order's mask for the same scenario.
        evaluated: Whether this mask was evaluated; else its evaluation is that of the nearest mask that was.
    """

    greedy_reward: float
    evaluated: bool


class TrainingProblem:
    """Stands in for a task's problem in the environments that a learner trains in.

    **Rewards are relative** to the greedy order's mask for the same scenario. How well a scenario can be served at all
    depends mostly on its budget, and that would drown what the agent's own choices changed. What is subtracted does not
    depend on the action, so the best policy stays the best (a baseline as in self-critical sequence training, arXiv
    1612.00563). The masks along one order are few; they are evaluated in the same call as the agent's.

    **One-step masks are projected** onto those that fit, as `OneStepPolicy` does when it serves; the gradient belongs
    to the agent's own bits, as in FastForward (arXiv 2511.18977). Without this half of a training goes into hitting the
    budget, which arithmetic does better.

    **Masks that the token budget does not pay for are answered by the nearest evaluated one.** Learning takes tens of
    thousands of steps, and a budget pays for a few hundred masks. Once it is used up, a new mask keeps its own
    footprint but gets the evaluation of the mask at the smallest Hamming distance, among those that fit the scenario if
    it fits itself. That is a guess, and often a wrong one: from then on a learner makes more of what was measured, and
    learns nothing new about the model. Of equally near masks the one of the lowest score answers, so that training is
    drawn to masks that were measured to be good, not to the borders between them.

    Args:
        task: Its problem evaluates; its archive gets the reward of every evaluated mask that fits.
        project: Whether masks are projected.

    Attributes:
        evaluated_steps: Finished episodes whose mask was evaluated.
        approximated_steps: Finished episodes that the nearest mask answered for.
    """

    def __init__(self, task: Task, project: bool) -> None:
        self._problem, self._archive, self._project = task.problem, task.archive, project
        self.shape, self._order = task.problem.shape, task.importance.static
        self._greedy = OrderPolicy(self.shape, self._order)
        self._ascending: list[PruningMask] = []  # evaluated masks by score
        self.evaluated_steps = self.approximated_steps = 0

    def evaluate_many(self, cases: Sequence[tuple[PruningMask, Workload, int]]) -> list[TrainingOutcome]:
        """Evaluates what the token budget still pays for, the agent's masks first, and guesses the rest.

        Args:
            cases: Masks, workloads and budgets in bytes of the episodes that end.
        """
        if self._project:
            cases = [(fit_to_budget(mask, self.shape, self._order, *scene), *scene) for mask, *scene in cases]
        both = [*cases, *((self._greedy.decide(*scene), *scene) for _mask, *scene in cases)]
        paid = set(self._problem.meter.affordable([mask for mask, *_scene in both]))
        measured = iter(self._problem.evaluate_many([case for case in both if case[0] in paid]))
        outcomes = [next(measured) if case[0] in paid else self._guess(*case) for case in both]
        rewards = list(map(self._problem.reward, outcomes))
        for (mask, *_scene), outcome, reward in zip(both, outcomes, rewards, strict=True):
            if mask in paid and outcome.fits:
                self._archive[mask] = reward
        n, flags = len(cases), [mask in paid for mask, *_scene in cases]
        self.evaluated_steps += sum(flags)
        self.approximated_steps += n - sum(flags)
        own = zip(outcomes[:n], rewards[n:], flags, strict=True)
        return [TrainingOutcome(**vars(outcome), greedy_reward=greedy, evaluated=flag) for outcome, greedy, flag in own]

    def reward(self, outcome: TrainingOutcome) -> float:
        """What the mask is worth above the greedy one."""
        return self._problem.reward(outcome) - outcome.greedy_reward

    def _guess(self, mask: PruningMask, workload: Workload, budget_bytes: int) -> Outcome:
        known = self._problem.meter.known
        if len(known) != len(self._ascending):
            self._ascending = sorted(known, key=lambda mask: known[mask].score)
            self._bits = np.array([mask.keep for mask in self._ascending])  # [M, n]
        distances = (self._bits != np.array(mask.keep)).sum(axis=1)
        needed = footprint(self.shape, mask, workload)
        if needed.peak_bytes <= budget_bytes:
            freed = np.array(component_bytes(self.shape, workload), dtype=np.float64)  # sums are exact below 2**53
            too_large = smallest_bytes(self.shape, workload) + self._bits @ freed > budget_bytes
            distances[too_large] += len(mask.keep) + 1  # they answer only where nothing that was evaluated fits
        nearest = self._ascending[int(distances.argmin())]  # the first of equals
        return Outcome(
            known[nearest], needed, budget_bytes, from_store=True, seconds=0.0, dense_score=self._problem.dense_score
        )
