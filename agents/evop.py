"""EvoP's evolutionary pruning pattern search (EPPS, arXiv 2502.14910): a genetic algorithm over keep-bits."""

from collections.abc import Sequence

import numpy as np

from agents.base import SearchResult, Task
from agents.grains import GRAINS, STARTS, Grain, check_known
from agents.scenario_judge import ScenarioJudge


class EvopAgent:
    """Tournament selection, two-point crossover, mutation and random repair, for one reported scenario after another.

    The evaluation budget is shared equally among the scenarios; a mask that was judged before costs nothing. The best
    mask ever judged is what a scenario gets, whichever scenario's search found it. A generation's offspring are judged
    together. The paper spends about 5,000 evaluations on a pattern: with a share of less than `population`, the search
    is random, so give small budgets a small population.

    Args:
        grain: `"block"` (a bit for each attention and MLP, masks that fit the bytes), `"layer"` (the paper's: a bit for
            each whole layer, exactly as many dropped as it takes) or `"equal_counts"` (as many attentions as MLPs).
        start: `"random"`, a first generation of random masks (the paper's), or `"greedy"`, of mutants of the importance
            order's mask.
        population: Members of a generation.
        generations: Generations behind the first, at most.
        tournament: Members that a parent is the best of; the paper does not say how many.
        mutation: Probability that a bit of a child flips.

    Raises:
        UnknownName: No such grain or start.
        ValueError: A tournament draws no member, or more than there are.
    """

    def __init__(
        self,
        grain: str = "block",
        start: str = "random",
        population: int = 50,
        generations: int = 100,
        tournament: int = 3,
        mutation: float = 0.001,
    ) -> None:
        if not 1 <= tournament <= population:
            raise ValueError(f"expected a tournament of 1 to {population} members, the population; got {tournament}")
        self._grain = check_known("grain", grain, GRAINS)
        self._start = check_known("start", start, STARTS)
        self._population, self._generations = population, generations
        self._tournament, self._mutation = tournament, mutation

    def search(self, task: Task) -> SearchResult:
        judge, generator = ScenarioJudge(task), np.random.default_rng(task.seed)
        for grain in judge.turns(self._grain):
            if self._start == "greedy":
                greedy = grain.greedy(task.importance.static)
                first = [greedy, *(self._mutant(greedy, grain, generator) for _ in range(self._population - 1))]
            else:
                first = [grain.random(generator) for _ in range(self._population)]
            self._evolve(first, grain, judge, generator)
        return judge.result()

    def _evolve(
        self, population: list[np.ndarray], grain: Grain, judge: ScenarioJudge, generator: np.random.Generator
    ) -> None:
        """Runs generations until they are done or the share is used up."""
        for _ in range(1 + self._generations):
            fitness = judge.judge([grain.mask(member) for member in population])
            if len(fitness) < len(population):
                return
            population = [self._child(population, fitness, grain, generator) for _ in population]

    def _child(
        self, population: list[np.ndarray], fitness: Sequence[float], grain: Grain, generator: np.random.Generator
    ) -> np.ndarray:
        mother, father = (population[self._winner(fitness, generator)] for _ in range(2))
        return self._mutant(two_point_crossover(mother, father, generator), grain, generator)

    def _mutant(self, member: np.ndarray, grain: Grain, generator: np.random.Generator) -> np.ndarray:
        return grain.repair(member ^ (generator.random(len(member)) < self._mutation), generator)

    def _winner(self, fitness: Sequence[float], generator: np.random.Generator) -> int:
        drawn = generator.choice(len(fitness), size=self._tournament, replace=False)
        return max(drawn, key=fitness.__getitem__)


def two_point_crossover(mother: np.ndarray, father: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mother's bits [n_bits], with the father's in a stretch between two random cuts."""
    start, end = np.sort(generator.choice(len(mother) + 1, size=2, replace=False))
    child = mother.copy()
    child[start:end] = father[start:end]
    return child
