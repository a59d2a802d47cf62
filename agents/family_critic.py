"""What a search over a family of contexts knows in the end: a critic that predicts the reward of any mask."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.base import Task
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.width_predictor import WidthPredictor
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.policies import ArchivePolicy, PricedPolicy
from rap_env.problem import PruningProblem


@dataclass(frozen=True)
class FamilyCritic:
    """The predictor after a search, with what a policy for the whole family is made from. It costs no evaluation.

    Attributes:
        task: What was searched.
        predictor: Fitted to all evaluated masks.
        fear: Deviations above the predicted logarithm of a loss that a mask is charged with.
        dense_reward: That of the dense model.
        climb: The mask that is predicted to be best for a context, among what a climb of so many steps looks at.
        greedy: The walk along the curves of single sites.
    """

    task: Task
    predictor: WidthPredictor
    fear: float
    dense_reward: float
    climb: Callable[[Scenario, np.random.Generator, int], PruningMask]
    greedy: PricedPolicy

    @property
    def shape(self):
        return self.task.problem.shape

    def logarithms(self, masks: Iterable[PruningMask]) -> np.ndarray:
        """Cautious logarithms of what masks lose [N]; parts that are kept count as the first of their site."""
        mean, deviation = self.predictor.predict(widths_of(masks))
        return mean + self.fear * deviation

    def contexts(self, n: int) -> list[Scenario]:
        """Contexts of the family, always the same."""
        generator = np.random.default_rng([self.task.seed, 1])
        return [self.task.sampler.sample(self.shape, generator) for _ in range(n)]

    def order(self, contexts: Sequence[Scenario]) -> tuple[str, ...]:
        """The greedy walk's order at the context in the middle: in which a table's masks are filled up."""
        window = self.shape.attention_window
        by_cache = sorted(contexts, key=lambda each: each.workload.cached_tokens(window))
        return self.greedy.order(by_cache[len(by_cache) // 2].workload)

    def table(self, answers: Sequence[tuple[Scenario, PruningMask]]) -> ArchivePolicy:
        """A policy of masks for contexts, with what they are feared to lose; bytes that they leave over are used.

        Args:
            answers: Masks, and what they were made for.
        """
        masks = list(dict.fromkeys(mask for _context, mask in answers))
        rewards = self.dense_reward - self.predictor.excess(self.logarithms(masks))
        order = self.order([context for context, _mask in answers])
        return ArchivePolicy(self.shape, zip(masks, rewards.tolist(), strict=True), order, fill=True)

    def training_task(self) -> Task:
        """A task of its own, in which evaluations are predictions and cost nothing."""
        task, problem = self.task, self.task.problem
        predicted = PruningProblem(problem.llm, CriticEvaluator(self), None, {"accuracy": 1.0})
        return _CriticTask(predicted, task.windows, task.sampler, task.scenarios, task.seed, critic=self)


@dataclass(frozen=True)
class _CriticTask(Task):
    critic: FamilyCritic = field(kw_only=True)

    @functools.cached_property
    def importance(self) -> ImportanceSource:
        """The greedy walk's order; nothing is measured for it."""
        return ImportanceSource(self.critic.order(self.scenarios))


class CriticEvaluator(Evaluator):
    """Minus the cautious logarithm of what a mask loses, predicted.

    Args:
        critic: Predicts.
    """

    name = "critic"
    runs_model = False

    def __init__(self, critic: FamilyCritic) -> None:
        self._critic = critic

    @property
    def identity(self) -> dict[str, Any]:
        return {"evaluator": "critic"}

    def tokens(self, llm) -> int:
        return 0

    def evaluate_many(
        self, llm, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        for mask, logarithm in zip(masks, self._critic.logarithms(masks).tolist(), strict=True):
            yield mask, Evaluation(-logarithm, {}, 0, 0.0)


def widths_of(masks: Iterable[PruningMask]) -> np.ndarray:
    """How many parts of each site masks keep [N, S]."""
    return np.array([mask.n_kept for mask in masks])
