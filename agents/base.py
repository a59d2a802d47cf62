"""What every agent is: it asks for masks to be evaluated, takes the outcomes, and ends as a policy."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION, ImportanceRanking, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask, full_order
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.policies import ArchivePolicy, OrderPolicy, Policy, PricedPolicy
from rap_env.problem import Outcome, PruningProblem


class Case(NamedTuple):
    """A mask, and the scenario that it was proposed for."""

    mask: PruningMask
    scenario: Scenario


class Evaluated(NamedTuple):
    """A case with what came of it."""

    mask: PruningMask
    scenario: Scenario
    outcome: Outcome
    reward: float


@dataclass(frozen=True)
class Task:
    """What an agent is given. Everything that it learns about masks is paid for by the problem's token budget.

    Attributes:
        problem: Evaluates masks on the search half.
        windows: Calibration tokens [N, T].
        sampler: Draws the scenarios that the policy shall serve.
        scenarios: Those of them that are known beforehand; searches for one scenario at a time share their budget.
        seed: Seed of everything random in the agent.
        window_kinds: Of each window its kind of text; `""` or nothing where the text is of one.
        removals: Rounds of the importance ranking; None for a full one.
        exact: Whether the ranking tries every component in every round.
        archive: Rewards of all evaluated masks that fit their scenarios; the driver fills it, and `ranking`.
        progress: Called with (tokens spent, token budget), by learners also with (steps, all steps).
        log: Called with (tokens spent, metrics), by learners with (steps, metrics).
    """

    problem: PruningProblem
    windows: torch.Tensor
    sampler: ScenarioSampler
    scenarios: Sequence[Scenario]
    seed: int
    window_kinds: Sequence[str] = ()
    removals: int | None = None
    exact: bool = False
    archive: dict[PruningMask, float] = field(default_factory=dict, init=False)
    progress: Callable[[int, int], None] = lambda done, total: None
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None

    def pay_for_preparation(self) -> None:
        """Pays for the statistics that the order of the model's parts rests on, if it rests on any.

        Raises:
            SearchExhausted: The token budget does not cover them.
        """
        preparation, budget = self.problem.llm.preparation, self.problem.budget
        if preparation.tokens and budget.spend("preparation", ["order of parts"], preparation.tokens):
            budget.measured_seconds += preparation.seconds

    def progress_of_steps(self, done: int, total: int) -> None:
        """Reports the steps of a training, or the tokens while they are nearer to their end: later steps are cheap."""
        budget = self.problem.budget
        pays = budget.limit is not None and budget.left >= self.problem.meter.tokens_each
        if pays and budget.spent * total > budget.limit * done:
            done, total = budget.spent, budget.limit
        self.progress(done, total)

    def remember(self, masks: Iterable[PruningMask]) -> None:
        """Puts evaluated masks into the archive, with what they are worth in any context that they fit."""
        known = self.problem.known
        self.archive.update((mask, self.problem.reward_within_budget(known(mask))) for mask in masks)

    @functools.cached_property
    def calibration(self) -> Meter:
        """Evaluates masks by their loss on the calibration windows."""
        problem = self.problem
        return Meter(problem.llm, PerplexityEvaluator(self.windows, CALIBRATION), problem.store, problem.budget)

    @functools.cached_property
    def ranking(self) -> ImportanceRanking:
        """Greedy sequential importance, paid for by whoever asks first.

        Where the calibration windows are what masks are searched on, the losses that it measured on all windows are
        scores of the search half: they go into the archive, so that every agent that pays for the ranking has them.
        The lazy rule measures them in two batches, which changes them by what the number format rounds (about 0.001 in
        bfloat16).

        Raises:
            SearchExhausted: The token budget does not cover it.
        """
        ranking, searched = self.rank(), self.problem.evaluator
        if _without_name(searched) == _without_name(self.calibration.evaluator):
            for mask, loss in ranking.known.items():
                evaluation = Evaluation(-loss, {}, searched.tokens(self.problem.llm), 0.0)
                self.archive[mask] = self.problem.reward_within_budget(evaluation)
        return ranking

    def rank(self, workload: Workload | None = None) -> ImportanceRanking:
        """The same for each byte that is freed at a workload; nothing goes into the archive."""
        problem, budget = self.problem, self.problem.budget
        return greedy_sequential_importance(
            problem.llm,
            self.windows,
            self.removals,
            self.exact,
            problem.store,
            lambda _done, _total: self.progress(budget.spent, budget.limit or budget.spent),
            workload,
            budget,
        )

    @functools.cached_property
    def importance(self) -> ImportanceSource:
        """The ranking as environments take it."""
        return ImportanceSource(self.ranking.order, self.calibration)


def _without_name(evaluator: Evaluator) -> dict[str, Any]:
    return {key: value for key, value in evaluator.identity.items() if key != "name"}


class Agent:
    """Chooses masks. A YAML names its class; constructor arguments are the YAML's keys.

    Attributes:
        task: What it was given; set by `begin`.
        generator: Draws whatever is random in it.
        details: Whatever else a record should keep, as JSON can hold it.
    """

    task: Task
    generator: np.random.Generator
    details: dict[str, Any]

    def begin(self, task: Task) -> None:
        """Starts the search for one task; an agent searches once.

        Raises:
            SearchExhausted: The token budget does not cover what the search begins with.
        """
        self.task, self.generator, self.details = task, np.random.default_rng(task.seed), {}

    def ask(self, n: int) -> list[Case]:
        """Proposes masks that are to be evaluated together, or nothing.

        Nothing ends the search, unless there are outcomes that it was not given yet: then it is asked again after them.

        Args:
            n: New masks that the token budget still pays for; of more proposals the last are left out.
        """
        return []

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        """Takes the outcomes of earlier proposals, those that were paid for."""

    def policy(self) -> Policy:
        """What the search ends as; it may end at any time."""
        raise NotImplementedError


class ArchiveAgent(Agent):
    """Ends as the best mask for each budget among all that were evaluated, whatever scenario it was proposed for.

    Attributes:
        ranked: Whether it pays for the importance ranking; otherwise its order is a random one.
        fill: Whether its policy uses what the best mask leaves over, see `ArchivePolicy`.
        order: All component names, the first to go first; serves budgets that no evaluated mask fits.
    """

    ranked = True
    fill = False
    order: Sequence[str]

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.order = self.first_order()

    def first_order(self) -> Sequence[str]:
        """The order that it starts with."""
        return self.task.ranking.order if self.ranked else self.random_order()

    def random_order(self) -> list[str]:
        components = self.task.problem.shape.components
        drawn = self.generator.permutation(len(components))
        return list(full_order(components, [components[position].name for position in drawn]))

    def walks(self) -> list[Policy]:
        """What a ranked search starts from: the ranking's order, and where sites have parts also its costs' order."""
        shape = self.task.problem.shape
        walks: list[Policy] = [OrderPolicy(shape, self.order)]
        if self.ranked and shape.has_parts:
            walks.append(PricedPolicy(shape, self.task.ranking.costs))
        return walks

    def best(self) -> ArchivePolicy:
        """The best of what is known so far."""
        return ArchivePolicy(self.task.problem.shape, self.task.archive.items(), self.order, self.fill)

    def policy(self) -> Policy:
        return self.best()


class Learner(Agent):
    """Acts through environments on the task's problem, instead of asking."""

    def learn(self) -> None:
        """Trains for its steps; what the token budget does not pay for, it has to do without."""
        raise NotImplementedError
