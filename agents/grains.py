"""Grains: the masks that a search for one scenario may choose from, as vectors of keep-bits."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from rap_env.errors import UnknownName
from rap_env.llm.shape import ModelShape
from rap_env.mask import KINDS, Component, PruningMask
from rap_env.memory.footprint import component_bytes, dense_bytes
from rap_env.memory.scenario import Scenario
from rap_env.policies.walk import fit_to_budget


class Grain(ABC):
    """Vectors of keep-bits [n_bits], and the walk that turns any of them into one that the scenario allows.

    Attributes:
        scenario: What all allowed masks fit.
        bits: For each bit the components that it keeps or drops.
        kinds: Label [n_bits] of each bit; bits with the same label free the same bytes.
        trades: Whether bits with different labels may change places.
    """

    bits: tuple[tuple[Component, ...], ...]
    trades = False

    def __init__(self, shape: ModelShape, scenario: Scenario) -> None:
        self._shape, self.scenario = shape, scenario
        self.bits = tuple((component,) for component in shape.components)

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        return np.array([KINDS.index(components[0].kind) for components in self.bits])

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Equal for grains of one class that allow the same masks."""

    @abstractmethod
    def fit(self, keep: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """An allowed vector near `keep` [n_bits]: drops from the front of an order of bits, restores from its end."""

    def repair(self, keep: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Random drops until the vector is allowed, random restores while there is room."""
        return self.fit(keep, generator.permutation(len(self.bits)))

    def random(self, generator: np.random.Generator) -> np.ndarray:
        return self.repair(np.ones(len(self.bits), dtype=bool), generator)

    def greedy(self, order: Sequence[str]) -> np.ndarray:
        """The walk along an importance order of component names; a bit of several stands at their mean place."""
        rank = {name: place for place, name in enumerate(order)}
        places = [np.mean([rank[component.name] for component in components]) for components in self.bits]
        return self.fit(np.ones(len(self.bits), dtype=bool), np.argsort(places, kind="stable"))

    def mask(self, keep: np.ndarray) -> PruningMask:
        dropped = [component for bit in np.flatnonzero(~keep) for component in self.bits[bit]]
        return PruningMask.all_kept(self._shape).drop(*dropped)


class BlockGrain(Grain):
    """One bit a component: every mask that fits and leaves no room for another component."""

    trades = True

    @property
    def key(self) -> Hashable:
        return self.scenario

    def fit(self, keep: np.ndarray, order: Sequence[int]) -> np.ndarray:
        names = [self.bits[bit][0].name for bit in order]
        mask = PruningMask.from_bits(self._shape, keep)
        return np.array(
            fit_to_budget(mask, self._shape, names, self.scenario.workload, self.scenario.budget_bytes).keep
        )


class CountedGrain(Grain):
    """As many attentions dropped as MLPs: the smallest number of each that fits, so that the masks' bytes are equal."""

    @property
    def key(self) -> Hashable:
        return self.n_dropped

    @functools.cached_property
    def n_dropped(self) -> int:
        """Bits of each kind that every allowed vector drops."""
        workload = self.scenario.workload
        excess_bytes = dense_bytes(self._shape, workload) - self.scenario.budget_bytes
        layer_bytes = sum(component_bytes(self._shape, workload)) // self._shape.n_layers
        return max(0, -(-excess_bytes // layer_bytes))  # rounded up

    def fit(self, keep: np.ndarray, order: Sequence[int]) -> np.ndarray:
        keep, order = keep.copy(), np.asarray(order)
        for kind in np.unique(self.kinds):
            members = order[self.kinds[order] == kind]
            kept, dropped = members[keep[members]], members[~keep[members]]
            missing = self.n_dropped - len(dropped)
            keep[kept[: max(0, missing)]] = False
            keep[dropped[::-1][: max(0, -missing)]] = True
        return keep


class LayerGrain(CountedGrain):
    """One bit a layer: exactly as many whole layers dropped as it takes, the papers' own setting."""

    def __init__(self, shape: ModelShape, scenario: Scenario) -> None:
        super().__init__(shape, scenario)
        layers = range(shape.n_layers)
        self.bits = tuple(tuple(c for c in shape.components if c.layer == layer) for layer in layers)


GRAINS: dict[str, type[Grain]] = {"block": BlockGrain, "equal_counts": CountedGrain, "layer": LayerGrain}


STARTS = ("random", "greedy")  # what a search may begin with: random masks, or the importance order's


def check_known(kind: str, name: str, known: Collection[str]) -> str:
    """A name, once it is sure to be one of those known.

    Raises:
        UnknownName: It is not.
    """
    if name not in known:
        raise UnknownName(kind, name, known)
    return name


def grains_of(name: str, shape: ModelShape, scenarios: Sequence[Scenario]) -> list[Grain]:
    """What is to be searched for these scenarios; those that allow the same masks are searched once."""
    grains = (GRAINS[name](shape, scenario) for scenario in scenarios)
    return list({grain.key: grain for grain in grains}.values())
