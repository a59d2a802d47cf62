"""Bayesian optimisation: a surrogate learns from the evaluated masks and says which to evaluate next."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from agents.archive import BATCH, LocalSearchAgent, swap_one
from agents.base import Case, Evaluated, Task
from rap_env.evaluation.predictor import ScorePredictor
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies import ArchivePolicy
from rap_env.policies.walk import fit_to_budget

_DRAWN = 12  # scenarios from the sampler that a batch is proposed for, beside those of the search
_OF_EACH = 3  # proposals that a scenario has in a batch at most
_PREDICTED = 512  # scenarios that the policy gets a predicted mask for, if that betters the evaluated ones
_NEIGHBOURS, _CLIMBS = 48, 6  # swaps that are looked at in a climb, and how often


class SurrogateAgent(LocalSearchAgent):
    """Evaluates few masks, predicts all others, and evaluates next what promises most.

    It begins with the ranking's masks for search scenarios and drawn ones. Then, batch by batch: fit the predictor to
    all evaluated masks, and to what the ranking measured; for scenarios from the search and the sampler climb from the
    best known mask by swaps; evaluate those that may be expected to better that mask by most. For budgets between
    those of evaluated masks the final policy also holds masks that were only predicted.
    """

    walk_part = 0.1

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._predictor: ScorePredictor | None = None
        self._fitted_to = 0
        self._evaluated: dict[PruningMask, float] = {}
        self._proposed: set[PruningMask] = set()
        self.details["predictor_errors"] = []

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        self._evaluated.update((one.mask, one.reward) for one in evaluated)

    def propose(self) -> list[Case]:
        """The most promising masks that were not proposed yet, each for a scenario."""
        if len(self._evaluated) < 2:
            return super().propose()
        self._fit()
        best, gains = self.best(), {}
        for scenario in (*self.task.scenarios, *(self.draw() for _ in range(_DRAWN))):
            known = best.decide(scenario.workload, scenario.budget_bytes)
            promise = functools.partial(self._predictor.expected_improvement, score=self._score(known))
            for mask, gain in self._climb(known, scenario, promise):
                if gain > gains.get(mask, (0.0, None))[0]:
                    gains[mask] = gain, scenario
        promising = sorted(gains, key=lambda mask: gains[mask][0], reverse=True)[:BATCH]
        self._proposed.update(promising)
        return [Case(mask, gains[mask][1]) for mask in promising] or super().propose()

    def policy(self) -> ArchivePolicy:
        """The archive, and between the budgets of its masks others that are predicted to be better.

        These are climbed to for scenarios from the sampler, from the best known mask with whatever there is still room
        for, and stand in the archive with a cautious prediction as their score. They cost no evaluation.
        """
        best, shape, scores = self.best(), self.task.problem.shape, dict(self.task.archive)
        if len(self._evaluated) < 2:
            return best
        self._fit()
        for scenario in (self.draw() for _ in range(_PREDICTED)):
            known = best.decide(scenario.workload, scenario.budget_bytes)
            filled = fit_to_budget(known, shape, self.order, scenario.workload, scenario.budget_bytes)
            for mask, score in self._climb(filled, scenario, self._predictor.cautious)[:1]:
                if score > self._score(known):
                    scores[mask] = score
        return ArchivePolicy(shape, scores.items(), self.order, self.fill)

    def _fit(self) -> None:
        """Fits the kernel's sizes again whenever there is half as much again to fit them to."""
        worst = min(self._evaluated.values())  # the ranking may also know far worse masks, which nobody asks about
        scores = {mask: reward for mask, reward in self.task.archive.items() if reward >= worst}
        settled = self._predictor if len(scores) < 1.5 * self._fitted_to else None
        self._fitted_to = self._fitted_to if settled else len(scores)
        self._predictor = ScorePredictor(scores, settled, self.task.ranking.known)
        self.details["predictor_errors"].append(self._predictor.leave_one_out_error)

    def _score(self, mask: PruningMask) -> float:
        """A mask's reward, or where it is not known what is predicted."""
        known = self.task.archive.get(mask)
        return float(self._predictor.predict([mask])[0]) if known is None else known

    def _climb(
        self, start: PruningMask, scenario: Scenario, promise: Callable[[list[PruningMask]], np.ndarray]
    ) -> list[tuple[PruningMask, float]]:
        """The most promising new masks among a start and swaps of the best ones, with what they promise."""
        shape, seen = self.task.problem.shape, {start: float(promise([start])[0])}
        for _ in range(_CLIMBS):
            top = max(seen, key=seen.__getitem__)
            swaps = (swap_one(top, scenario, shape, self.order, self.generator) for _ in range(_NEIGHBOURS))
            fresh = [mask for mask in dict.fromkeys(swaps) if mask not in seen]
            if fresh:
                seen.update(zip(fresh, promise(fresh).tolist(), strict=True))
        known = self._proposed | self.task.archive.keys()
        new = [(mask, promised) for mask, promised in seen.items() if mask not in known]
        return sorted(new, key=lambda entry: entry[1], reverse=True)[:_OF_EACH]
