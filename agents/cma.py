"""CMA-ES (Hansen 2016, arXiv 1604.00772) over how much each site keeps, by the package `cmaes`."""

import numpy as np
from cmaes import CMA

from agents.granularity import Granularity
from agents.scenarios import Evolution, ScenarioAgent

_LEAST, _MOST = 0.05, 1.0  # of a site's wish


class CmaAgent(ScenarioAgent):
    """Moves a Gaussian over the wishes of all sites towards those whose masks score best.

    A wish scales the depths of a site's parts: parts go in the order of depth / wish until the scenario is met, so a
    site keeps in proportion to its wish. The first wishes are equal: the same part of every site.

    Args:
        population: Masks of a generation.
        sigma: Deviation of the wishes in the first generation.
    """

    def __init__(self, population: int = 12, sigma: float = 0.1) -> None:
        super().__init__(granularity="component", start="uniform")
        self._population, self._sigma = population, sigma

    def evolve(self, space: Granularity) -> Evolution:
        """Runs generations until the share is used up."""
        sites = len(space.groups)
        optimizer = CMA(
            mean=np.full(sites, (_LEAST + _MOST) / 2),
            sigma=self._sigma,
            bounds=np.tile([_LEAST, _MOST], (sites, 1)),
            population_size=self._population,
            seed=int(self.generator.integers(2**31)),
        )
        while not optimizer.should_stop():
            wishes = [optimizer.ask() for _ in range(self._population)]
            masks = [space.mask(space.in_proportion(wish)) for wish in wishes]
            rewards = yield masks
            optimizer.tell([(wish, -reward) for wish, reward in zip(wishes, rewards, strict=True)])
