"""Widths of all sites that meet one memory budget: many neighbours at once, as arrays."""

import math

import numpy as np

from agents.granularity import LARGEST_MOVE
from rap_env.llm.shape import ModelShape
from rap_env.memory.footprint import component_bytes, smallest_bytes
from rap_env.memory.scenario import Scenario


class WidthMoves:
    """Moves between masks of nested widths that fit a scenario.

    Shapes: N masks, S sites, P the largest number of parts of a site.

    Args:
        shape: The model.
        scenario: What all masks have to fit.
    """

    def __init__(self, shape: ModelShape, scenario: Scenario) -> None:
        sites, freed = shape.components.sites, component_bytes(shape, scenario.workload)
        self.n_parts = np.array(shape.components.n_parts)
        # Bytes of each site at each width [S, P + 1]; there is no width that takes infinitely many.
        self._bytes = np.full((len(sites), self.n_parts.max() + 1), np.inf)
        for row, (_site, own) in zip(self._bytes, sites, strict=True):
            row[: own.stop - own.start + 1] = np.concatenate([[0.0], np.cumsum(freed[own])])
        self._room = scenario.budget_bytes - smallest_bytes(shape, scenario.workload)

    def slack(self, widths: np.ndarray) -> np.ndarray:
        """Bytes that masks [N, S] leave over [N]; negative where they do not fit."""
        return self._room - self._bytes[np.arange(widths.shape[1]), widths].sum(axis=1)

    def fitted(self, widths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Masks near [N, S] that fit and leave no room for another part: random sites become narrower, then wider."""
        widths, rows = widths.copy(), np.arange(len(widths))
        slack = self.slack(widths)
        while (over := slack < 0.0).any():
            keys = np.where(widths[over] > 0, generator.random(widths[over].shape), -1.0)
            of, site = rows[over], keys.argmax(axis=1)
            had = widths[of, site]
            bytes_of = self._bytes[site]
            allowed = bytes_of[np.arange(len(of)), had] + slack[over]  # what the site may still take
            widths[of, site] = np.maximum((bytes_of <= allowed[:, None]).sum(axis=1) - 1, 0)
            slack[over] += bytes_of[np.arange(len(of)), had] - bytes_of[np.arange(len(of)), widths[of, site]]
        for site in generator.permutation(widths.shape[1]):
            bytes_of = self._bytes[site]
            taken = bytes_of[widths[:, site]]
            widths[:, site] = (bytes_of <= (taken + slack)[:, None]).sum(axis=1) - 1
            slack -= bytes_of[widths[:, site]] - taken
        return widths

    def neighbours(self, widths: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
        """Masks [n, S] in which one or two sites of a mask [S] are wider, and others narrower as far as it takes."""
        made, rows = np.repeat(widths[None], n, axis=0), np.arange(n)
        for moving in (np.ones(n, dtype=bool), generator.random(n) < 0.5):
            site = np.where(made < self.n_parts, generator.random(made.shape), -1.0).argmax(axis=1)
            most = np.array([math.ceil(count * LARGEST_MOVE) for count in self.n_parts])[site]
            wider = np.minimum(made[rows, site] + generator.integers(1, most + 1), self.n_parts[site])
            made[rows, site] = np.where(moving, wider, made[rows, site])
        return self.fitted(made, generator)
