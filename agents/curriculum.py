"""FastForward's curricula: the first episodes prune less, and are evaluated on less text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.base import Task
from rap_env.errors import InvalidConfig, SearchExhausted
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.problem import Outcome, PruningProblem

_TEXT_STEPS = 10  # further parts of the text: on each of them every mask is paid for anew, and an evaluator set up


@dataclass(frozen=True)
class Curriculum:
    """How the first episodes differ from the later ones (FastForward, arXiv 2511.18977).

    Both grow as `start + (end - start) * (1 - (1 - x)^3)` with the share x of the curriculum's episodes that are over:
    the cubic schedule of gradual pruning (arXiv 1710.01878).

    Attributes:
        episodes: Length of the curriculum; 0 for none.
        sparsity: Freed share of the dense bytes at its beginning, where the scenario asks for more.
        text: Share of the evaluation data at its beginning. Ten steps lead to the whole.

    Raises:
        InvalidConfig: The length is negative, or a share is not above 0 and at most 1.
    """

    episodes: int = 1000
    sparsity: float = 0.05
    text: float = 0.05

    def __post_init__(self) -> None:
        if self.episodes < 0:
            raise InvalidConfig(f"curriculum.episodes: expected at least 0; got {self.episodes}")
        for name in ("sparsity", "text"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise InvalidConfig(f"curriculum.{name}: expected above 0 and at most 1; got {getattr(self, name)}")

    def grown(self, episode: int, start: float, end: float) -> float:
        """A quantity in an episode, counted from 0."""
        share = min(1.0, episode / self.episodes) if self.episodes else 1.0
        return start + (end - start) * (1.0 - (1.0 - share) ** 3)

    def text_share(self, episode: int) -> float:
        """Share of the evaluation data in an episode, rounded up to a tenth; at the beginning as it is."""
        share = self.grown(episode, self.text, 1.0)
        return share if share == self.text else min(1.0, math.ceil(share * _TEXT_STEPS - 1e-9) / _TEXT_STEPS)


class CurriculumSampler:
    """Draws a task's scenarios, with larger budgets in the first episodes.

    Args:
        sampler: Draws the scenarios that the policy shall serve.
        curriculum: By how much they are eased.

    Attributes:
        kinds: The sampler's.
        episodes: Scenarios that were drawn so far.
    """

    def __init__(self, sampler: ScenarioSampler, curriculum: Curriculum) -> None:
        self._sampler, self._curriculum = sampler, curriculum
        self.kinds, self.episodes = sampler.kinds, 0

    def check(self, shape) -> None:
        """As `ScenarioSampler.check`: larger budgets are no harder to meet."""
        self._sampler.check(shape)

    def sample(self, shape, generator: np.random.Generator) -> Scenario:
        """Draws one scenario for a model, and counts it as an episode."""
        scenario = self._sampler.sample(shape, generator)
        dense = dense_bytes(shape, scenario.workload)
        target = 1.0 - scenario.budget_bytes / dense
        episode, self.episodes = self.episodes, self.episodes + 1
        if target <= self._curriculum.sparsity or episode >= self._curriculum.episodes:
            return scenario
        sparsity = self._curriculum.grown(episode, self._curriculum.sparsity, target)
        return Scenario(scenario.workload, max(scenario.budget_bytes, int((1.0 - sparsity) * dense)))


class CurriculumProblem:
    """Stands in for a task's problem in the environments that a learner trains in.

    The masks of the first episodes are evaluated on a part of the data: the first windows of a text, or the first items
    of each task. A part is an evaluator of its own, so its tokens are charged and its results stored under its own
    identity; a reward relative to the dense model is relative to it on the same part. Nothing is guessed: a batch that
    the token budget does not pay for ends the training.

    Args:
        task: Its problem evaluates; its archive gets the reward of every mask that fits, once it was evaluated on all
            of the data.
        curriculum: How much of the data.

    Attributes:
        episodes: Episodes that were evaluated so far.
        rewards: Their mean rewards, batch by batch, as [episodes, mean].
    """

    def __init__(self, task: Task, curriculum: Curriculum) -> None:
        self._whole, self._remember, self._curriculum = task.problem, task.remember, curriculum
        self._parts: dict[float, PruningProblem] = {1.0: task.problem}
        self.shape, self.reward = task.problem.shape, task.problem.reward
        self.episodes, self.rewards = 0, []

    def evaluate_many(self, cases: Sequence[tuple[PruningMask, Workload, int]]) -> list[Outcome]:
        """Evaluates the masks of the episodes that end, on as much of the data as the first of them is due.

        Raises:
            SearchExhausted: The token budget does not cover all of them; none was evaluated.
        """
        problem = self.problem()
        problem.prepare()
        masks = dict.fromkeys(mask for mask, _workload, _budget_bytes in cases)
        if len(problem.meter.affordable(list(masks))) < len(masks):
            budget = problem.budget
            raise SearchExhausted(
                f"{budget.spent:,} of {budget.limit:,} tokens are spent; no further batch is paid for"
            )
        outcomes = problem.evaluate_many(cases)
        rewards = list(map(self.reward, outcomes))
        if problem is self._whole:
            self._remember(mask for (mask, *_scene), outcome in zip(cases, outcomes, strict=True) if outcome.fits)
        self.episodes += len(cases)
        if rewards:
            self.rewards.append([self.episodes, sum(rewards) / len(rewards)])
        return outcomes

    def problem(self) -> PruningProblem:
        """What evaluates the next episode."""
        share, whole = self._curriculum.text_share(self.episodes), self._whole
        if share not in self._parts:
            part = whole.evaluator.first(share)
            self._parts[share] = whole if part is whole.evaluator else _with_evaluator(whole, part)
        return self._parts[share]


def _with_evaluator(problem: PruningProblem, evaluator) -> PruningProblem:
    return PruningProblem(problem.llm, evaluator, problem.store, problem.reward_weights, problem.budget)
