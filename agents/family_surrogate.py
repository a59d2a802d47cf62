"""A surrogate over a whole family of contexts: it asks where contexts lie, and ends as a table for all of them."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from agents.base import Agent, Case, Evaluated, Task
from agents.family_answers import Answer, ClimbedTable
from agents.family_critic import FamilyCritic, widths_of
from agents.width_moves import WidthMoves
from agents.widths import UniformAgent
from rap_env.evaluation.width_predictor import WidthPredictor
from rap_env.importance.site_curves import measure_site_curves
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies import OrderPolicy, Policy, PricedPolicy

_STARTS = 3  # evaluated masks that a climb may start from, beside the greedy and the uniform one
_NEIGHBOURS, _CLIMBS = 48, 12  # masks that are looked at in a step of a climb, and steps while it asks
_REFITTED = 1.2  # times as many masks as the kernel's sizes were fitted to, before they are fitted again


class FamilySurrogateAgent(Agent):
    """Evaluates masks along the budgets of a whole family, each of which tells about all others.

    It begins with curves of single sites, the prior of its predictor and its first data, and with masks of the greedy
    walk along them and of uniform widths. Then, batch by batch: for contexts drawn from the sampler, climb by shifts of
    widths from the best known masks to what is predicted to be best, as far as one may hope; evaluate those. In the end
    the predictor stands in for the model, with what one must fear, and an `Answer` makes a policy of it: as a rule it
    climbs once more for many contexts, and serves these masks as a table.

    What it asks for does not depend on the token budget but through the levels of the curves, so that a larger budget
    repeats the evaluations of a smaller one.

    Args:
        levels: Measured widths of a site alone, at most; fewer where the budget does not pay for them.
        batch: Masks that are evaluated between two fits.
        hope: Deviations below the predicted logarithm of a loss that a mask is given credit for when it is asked for.
        fear: Deviations above that it is charged with in the end.
        answer: Makes the policy in the end; `ClimbedTable` by default.
    """

    def __init__(
        self,
        levels: int = 2,
        batch: int = 8,
        hope: float = 1.0,
        fear: float = 1.0,
        answer: Answer | None = None,
    ) -> None:
        self._levels, self._batch = levels, batch
        self._hope, self._fear, self._answer = hope, fear, answer or ClimbedTable()

    def begin(self, task: Task) -> None:
        super().begin(task)
        problem = task.problem
        curves = measure_site_curves(problem.meter, self._levels)
        rewards = {mask: problem.reward_within_budget(problem.meter.known[mask]) for mask in curves.known}
        self._curves = dataclasses.replace(curves, known=rewards)
        self._greedy, uniform = PricedPolicy(problem.shape, self._curves.costs), UniformAgent()
        uniform.task = task
        self._walks: list[Policy] = [self._greedy, OrderPolicy(problem.shape, uniform.rank())]
        self._known = dict(rewards)
        task.archive.update(rewards)
        self._taken = {mask.widths for mask in rewards}  # evaluated, or proposed
        self._begun = False
        self._predictor: WidthPredictor | None = None
        self._fitted_to = self._sized_by = 0
        self.details |= {"levels": curves.levels, "prediction_errors": []}

    def ask(self, n: int) -> list[Case]:
        cases = []
        for turn, context in enumerate([self._draw(self.generator) for _ in range(self._batch)]):
            walk = self._walks[turn % len(self._walks)]
            mask = walk.decide(context.workload, context.budget_bytes)
            if self._begun:
                mask = self._climbed(context, -self._hope, self.generator, self._taken)
            if mask and mask.widths not in self._taken:
                self._taken.add(mask.widths)
                cases.append(Case(mask, context))
        first, self._begun = not self._begun, True
        return cases or (self.ask(n) if first else [])

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        new = {one.mask: one.reward for one in evaluated if one.outcome.fits}
        if self._predictor and new:
            mean, _deviation = self._predictor.predict(widths_of(new))
            missed = np.abs(self._predictor.excess(mean) - self._excess(new.values()))
            self.details["prediction_errors"].append(float(missed.mean()))
        self._known |= new

    def policy(self) -> Policy:
        critic = FamilyCritic(
            task=self.task,
            predictor=self._fit(),
            fear=self._fear,
            dense_reward=self._known[self._curves.dense],
            climb=self._answered,
            greedy=self._greedy,
        )
        return self._answer.policy(critic, self.details)

    def _answered(self, context: Scenario, generator: np.random.Generator, climbs: int) -> PruningMask:
        return self._climbed(context, self._fear, generator, climbs=climbs)

    def _draw(self, generator: np.random.Generator) -> Scenario:
        return self.task.sampler.sample(self.task.problem.shape, generator)

    def _excess(self, rewards: Iterable[float]) -> np.ndarray:
        return self._known[self._curves.dense] - np.array(list(rewards))

    def _fit(self) -> WidthPredictor:
        if self._fitted_to < len(self._known):
            settled = self._predictor if len(self._known) < _REFITTED * self._sized_by else None
            self._sized_by = self._sized_by if settled else len(self._known)
            self._fitted_to, self._all_widths = len(self._known), widths_of(self._known)
            excess = self._excess(self._known.values())
            self._predictor = WidthPredictor(self._curves.increases, self._all_widths, excess, settled)
            self._by_excess = excess.argsort(kind="stable")
        return self._predictor

    def _climbed(
        self,
        context: Scenario,
        deviations: float,
        generator: np.random.Generator,
        without: Collection[tuple[int, ...]] = (),
        climbs: int = _CLIMBS,
    ) -> PruningMask | None:
        """The best mask for a context among what a climb looks at, by the predicted logarithm plus so many deviations.

        Args:
            context: What it has to fit.
            deviations: Negative to hope, positive to fear.
            generator: Draws the moves.
            without: Widths that it shall not be; None where there are no others.
            climbs: Steps.
        """
        predictor, moves = self._fit(), WidthMoves(self.task.problem.shape, context)
        fitting = self._by_excess[moves.slack(self._all_widths[self._by_excess]) >= 0.0][:_STARTS]
        walked = [walk.decide(context.workload, context.budget_bytes) for walk in self._walks]
        seen = np.concatenate([widths_of(walked), self._all_widths[fitting]])
        seen = np.concatenate([seen, moves.fitted(seen, generator)])
        found: list[tuple[float, tuple[int, ...]]] = []
        for _ in range(1 + climbs):
            mean, deviation = predictor.predict(seen)
            found += zip((mean + deviations * deviation).tolist(), map(tuple, seen.tolist()), strict=True)
            seen = moves.neighbours(np.array(min(found)[1]), _NEIGHBOURS, generator)
        best = min((each for each in found if each[1] not in without), default=None)
        return PruningMask.from_widths(self.task.problem.shape, best[1]) if best else None
