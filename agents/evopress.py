"""EvoPress (arXiv 2410.14649): one parent, offspring by swaps, selected in stages of rising cost."""

import numpy as np

from agents.base import Task
from agents.granularity import Granularity
from agents.scenarios import Evolution, ScenarioAgent
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION
from rap_env.mask import PruningMask

_INITIALLY_GENERATED = 64  # random candidates that the first parent is selected from, as the paper's depth pruning does
_MOST_SWAPS = 3  # a mutation makes min(U{1..3}, U{1..3}) of them: mostly one


class EvopressAgent(ScenarioAgent):
    """An elitist (1 + lambda) search by swaps.

    Each generation the parent has `offspring` mutants. The first stage evaluates them by their loss on the first
    calibration windows and lets `survivors` pass; these get their score, and the best takes the parent's place unless
    it is worse. The paper's fitness is the KL divergence to the dense model on 2,048 tokens, then on 32,768. The token
    budget pays for both stages. A first stage that would cost as much as the second is left out.

    Args:
        granularity: See `ScenarioAgent`; the paper's are `"equal_counts"` and `"layer"`.
        start: See `ScenarioAgent`; the paper's is `"random"`: the best of 64 masks.
        generations: For each scenario, at most; the paper takes k (n - k) / 1.5 for k of n layers.
        offspring: Mutants in a generation.
        survivors: How many of them pass the first stage.
        cheap_windows: Calibration windows of the first stage, at most as many as there are; 0 for no such stage.
        fill: See `ScenarioAgent`.

    Raises:
        UnknownName: No such granularity or start.
        ValueError: No offspring, no survivor, or less than no window.
    """

    def __init__(  # noqa: PLR0913 - its arguments are the keys of a YAML
        self,
        granularity: str = "component",
        start: str = "random",
        generations: int = 160,
        offspring: int = 32,
        survivors: int = 2,
        cheap_windows: int = 1,
        fill: bool = False,
    ) -> None:
        super().__init__(granularity, start, fill)
        if offspring < 1 or survivors < 1 or cheap_windows < 0:
            raise ValueError(
                "expected offspring and survivors of at least 1 and cheap_windows of at least 0;"
                f" got {offspring}, {survivors} and {cheap_windows}"
            )
        self._generations, self._offspring, self._survivors = generations, offspring, survivors
        self._cheap_windows = cheap_windows

    def begin(self, task: Task) -> None:
        super().begin(task)
        self._first_stage, problem = None, task.problem
        windows = task.windows[: self._cheap_windows]
        if 0 < windows.numel() < problem.meter.tokens_each:
            evaluator = PerplexityEvaluator(windows, CALIBRATION)
            self._first_stage = Meter(problem.llm, evaluator, problem.store, problem.budget)

    def evolve(self, space: Granularity) -> Evolution:
        """Runs generations until they are done, the share is used up, or there is no other mask."""
        parent, fitness = None, -np.inf
        drawn = (space.random(self.generator) for _ in range(_INITIALLY_GENERATED))
        candidates = self.started(space) or list(drawn)
        for _ in range(1 + self._generations):
            bits = {mask: keep for keep in candidates if (mask := space.mask(keep)) != parent}
            finalists = self._passing(list(bits))
            if not finalists:
                return
            rewards = yield finalists
            if max(rewards) >= fitness:
                fitness = max(rewards)
                parent = finalists[rewards.index(fitness)]
                parent_bits = bits[parent]
            candidates = [mutate(parent_bits, space, self.generator) for _ in range(self._offspring)]

    def _passing(self, masks: list[PruningMask]) -> list[PruningMask]:
        """Survivors of the first stage, in which as many take part as the share pays for together with the second."""
        if self._first_stage is None or len(masks) <= self._survivors:
            return masks
        cheap, full = self._first_stage.tokens_each, self.task.problem.meter.tokens_each
        costs = [n * cheap + min(n, self._survivors) * full for n in range(1, len(masks) + 1)]
        paid = masks[: sum(cost <= self.share_left for cost in costs)]
        scores = [evaluation.score for evaluation in self._first_stage.evaluate(paid)]
        ranked = sorted(range(len(paid)), key=scores.__getitem__, reverse=True)
        return [paid[position] for position in ranked[: self._survivors]]


def mutate(parent: np.ndarray, space: Granularity, generator: np.random.Generator) -> np.ndarray:
    """Swaps: a dropped and a kept bit that cost the same change places, mostly once; parts of sites in numbers.

    Where the space trades, every other swap is of any two bits. It may free too few bytes or more than it takes: then
    the repair drops or restores others at random.
    """
    child = parent.copy()
    for _ in range(generator.integers(1, _MOST_SWAPS + 1, size=2).min()):
        if child.all():
            break
        restored = _one_of(np.flatnonzero(~child), generator)
        trade = space.trades and generator.random() < 0.5
        partners = np.flatnonzero(child & (trade | (space.labels == space.labels[restored])))
        if len(partners):
            going = space.beside(child, _one_of(partners, generator), generator)
            coming = space.beside(child, restored, generator)
            child[going], child[coming] = False, True
    return space.repair(child, generator)


def _one_of(positions: np.ndarray, generator: np.random.Generator) -> int:
    return positions[generator.integers(len(positions))]  # what `choice` draws, much quicker
