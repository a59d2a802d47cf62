"""EvoP's evolutionary pruning pattern search (EPPS, arXiv 2502.14910): a genetic algorithm over keep-bits."""

from collections.abc import Sequence

import numpy as np

from agents.granularity import Granularity
from agents.scenarios import Evolution, ScenarioAgent


class EvopAgent(ScenarioAgent):
    """Tournament selection, two-point crossover, mutation and random repair.

    The paper spends about 5,000 evaluations on a pattern: with a share of less than `population` the search is random,
    so give small budgets a small population.

    Args:
        granularity: See `ScenarioAgent`; the paper's is `"layer"`.
        start: See `ScenarioAgent`; the paper's is `"random"`. A greedy start is a generation of mutants.
        population: Members of a generation.
        generations: Generations after the first, at most.
        tournament: Members that a parent is the best of; the paper does not say how many.
        mutation: Probability that a bit of a child flips.

    Raises:
        UnknownName: No such granularity or start.
        ValueError: A tournament draws no member, or more than there are.
    """

    def __init__(
        self,
        granularity: str = "component",
        start: str = "random",
        population: int = 50,
        generations: int = 100,
        tournament: int = 3,
        mutation: float = 0.001,
    ) -> None:
        super().__init__(granularity, start)
        if not 1 <= tournament <= population:
            raise ValueError(f"expected a tournament of 1 to {population} members, the population; got {tournament}")
        self._population, self._generations = population, generations
        self._tournament, self._mutation = tournament, mutation

    def evolve(self, space: Granularity) -> Evolution:
        if starts := self.started(space):
            mutants = (self._mutant(starts[0], space) for _ in range(self._population - len(starts)))
            population = [*starts, *mutants]
        else:
            population = [space.random(self.generator) for _ in range(self._population)]
        for _ in range(1 + self._generations):
            fitness = yield [space.mask(member) for member in population]
            population = [self._child(population, fitness, space) for _ in population]

    def _child(self, population: list[np.ndarray], fitness: Sequence[float], space: Granularity) -> np.ndarray:
        mother, father = (population[self._winner(fitness)] for _ in range(2))
        return self._mutant(two_point_crossover(mother, father, self.generator), space)

    def _mutant(self, member: np.ndarray, space: Granularity) -> np.ndarray:
        return space.repair(member ^ (self.generator.random(len(member)) < self._mutation), self.generator)

    def _winner(self, fitness: Sequence[float]) -> int:
        drawn = self.generator.choice(len(fitness), size=self._tournament, replace=False)
        return max(drawn, key=fitness.__getitem__)


def two_point_crossover(mother: np.ndarray, father: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mother's bits [n_bits], with the father's in a stretch between two random cuts."""
    start, end = np.sort(generator.choice(len(mother) + 1, size=2, replace=False))
    child = mother.copy()
    child[start:end] = father[start:end]
    return child
