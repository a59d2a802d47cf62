"""Granularities: the masks that a search for one scenario may choose from, as vectors of keep-bits."""

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from rap_env.components import Component
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import bytes_by_name, dense_bytes
from rap_env.memory.scenario import Scenario

LARGEST_MOVE = 0.125  # part of a site's parts that a search moves at once at most


def parts_to_move(n_parts: int, generator: np.random.Generator) -> int:
    """How many of a site's parts a search moves at once."""
    return 1 if n_parts == 1 else int(generator.integers(1, 1 + math.ceil(n_parts * LARGEST_MOVE)))


def by_layer(components: Iterable[Component]) -> list[tuple[Component, ...]]:
    """Whole layers: components in model order, grouped by their layer."""
    return [tuple(layer) for _index, layer in itertools.groupby(components, key=lambda component: component.site.layer)]


class Granularity:
    """One bit a component: every mask that fits and leaves no room for another bit.

    Args:
        shape: The model.
        scenario: What all allowed masks fit.

    Attributes:
        bits: For each bit the components that it keeps or drops.
        bit_bytes: What dropping each bit frees for the scenario's workload.
        excess_bytes: What has to be freed.
        trades: Whether bits of different costs may change places.
    """

    trades = True

    def __init__(self, shape: ModelShape, scenario: Scenario) -> None:
        self.shape, self.scenario = shape, scenario
        self.bits = self.divide(shape.components)
        freed = bytes_by_name(shape, scenario.workload)
        self.bit_bytes = [sum(freed[component.name] for component in bit) for bit in self.bits]
        self.excess_bytes = dense_bytes(shape, scenario.workload) - scenario.budget_bytes

    def divide(self, components: Sequence[Component]) -> list[tuple[Component, ...]]:
        """Components by bits."""
        return [(component,) for component in components]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """A number [n_bits] for each bit; bits with the same one cost the same."""
        costs = [
            [sum(row.weight_bytes for row in bit), sum(row.kv_bytes_per_token for row in bit)] for bit in self.bits
        ]
        return np.unique(costs, axis=0, return_inverse=True)[1].ravel()

    @functools.cached_property
    def groups(self) -> list[np.ndarray]:
        """Positions of the bits that are parts of one site, in its order; a bit of several sites is a group alone."""
        sites = [{component.site for component in bit} for bit in self.bits]
        starts = [i for i, site in enumerate(sites) if i == 0 or len(site) > 1 or site != sites[i - 1]]
        return np.split(np.arange(len(self.bits)), starts[1:])

    def beside(self, keep: np.ndarray, bit: int, generator: np.random.Generator) -> np.ndarray:
        """Bits of one site that move with a bit: the last that are kept, or the first that are dropped.

        Where the site has parts they are up to an eighth of all; else it is the bit alone.
        """
        group = next(group for group in self.groups if group[0] <= bit <= group[-1])
        if len(group) == 1:
            return group
        n_moved = parts_to_move(len(group), generator)
        return group[keep[group]][::-1][:n_moved] if keep[bit] else group[~keep[group]][:n_moved]

    def nest(self, keep: np.ndarray) -> np.ndarray:
        """As many bits of each group, but the first ones."""
        if len(self.groups) == len(keep):
            return keep
        return np.concatenate([np.sort(keep[group])[::-1] for group in self.groups])

    @property
    def key(self) -> Hashable:
        """Equal for scenarios that allow the same masks: where all bits free as much, those that drop equally many."""
        if len(set(self.bit_bytes)) > 1:
            return self.scenario
        return max(0, -(-self.excess_bytes // self.bit_bytes[0]))

    def fit(self, keep: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """An allowed vector near `keep` [n_bits]: drops from the front of an order of bits, restores from its end."""
        fitted, order = keep.tolist(), np.asarray(order).tolist()  # Python's numbers loop ten times faster
        missing_bytes = self.excess_bytes - sum(itertools.compress(self.bit_bytes, ~keep))
        for bit in order:
            if missing_bytes > 0 and fitted[bit]:
                fitted[bit] = False
                missing_bytes -= self.bit_bytes[bit]
        for bit in reversed(order):
            if not fitted[bit] and self.bit_bytes[bit] <= -missing_bytes:
                fitted[bit] = True
                missing_bytes += self.bit_bytes[bit]
        return self.nest(np.array(fitted))

    def repair(self, keep: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Random drops until the vector is allowed, random restores while there is room."""
        return self.fit(keep, generator.permutation(len(self.bits)))

    def random(self, generator: np.random.Generator) -> np.ndarray:
        return self.repair(np.ones(len(self.bits), dtype=bool), generator)

    def greedy(self, order: Sequence[str]) -> np.ndarray:
        """The walk along an importance order of component names; a bit of several stands at their mean place."""
        rank = {name: place for place, name in enumerate(order)}
        places = [np.mean([rank[component.name] for component in bit]) for bit in self.bits]
        return self.fit(np.ones(len(self.bits), dtype=bool), np.argsort(places, kind="stable"))

    def in_proportion(self, wishes: np.ndarray) -> np.ndarray:
        """The allowed vector in which groups keep bits in proportion to a wish each [n_groups]."""
        depths = [
            (np.arange(len(group)) + 0.5) / len(group) / wish for group, wish in zip(self.groups, wishes, strict=True)
        ]
        return self.fit(np.ones(len(self.bits), dtype=bool), np.argsort(-np.concatenate(depths), kind="stable"))

    def uniform(self) -> np.ndarray:
        """The same part of every group."""
        return self.in_proportion(np.ones(len(self.groups)))

    def bits_of(self, mask: PruningMask) -> np.ndarray:
        """An allowed vector near a mask: a bit is kept where the mask keeps most of what it stands for."""
        kept = np.array([np.mean([mask.keeps(component) for component in bit]) > 0.5 for bit in self.bits])
        return self.fit(kept, np.arange(len(self.bits))[::-1])

    def mask(self, keep: np.ndarray) -> PruningMask:
        dropped = [component for bit in np.flatnonzero(~keep) for component in self.bits[bit]]
        return PruningMask.all_kept(self.shape).drop(*dropped)


class LayerGranularity(Granularity):
    """One bit a layer: where layers are alike, exactly as many are dropped as it takes, as in the papers."""

    def divide(self, components: Sequence[Component]) -> list[tuple[Component, ...]]:
        return by_layer(components)


class EqualCounts(Granularity):
    """As many attentions dropped as MLPs: of all costs the same part, the smallest number of layers that fits."""

    trades = False

    @functools.cached_property
    def key(self) -> int:
        """How many layers' worth of bits every allowed vector drops."""
        return max(0, -(-self.excess_bytes * self.shape.n_layers // sum(self.bit_bytes)))

    def fit(self, keep: np.ndarray, order: Sequence[int]) -> np.ndarray:
        keep, order = keep.copy(), np.asarray(order)
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            kept, dropped = members[keep[members]], members[~keep[members]]
            missing = -(-self.key * len(members) // self.shape.n_layers) - len(dropped)
            keep[kept[: max(0, missing)]] = False
            keep[dropped[::-1][: max(0, -missing)]] = True
        return self.nest(keep)


GRANULARITIES: dict[str, type[Granularity]] = {
    "component": Granularity,
    "equal_counts": EqualCounts,
    "layer": LayerGranularity,
}


def distinct_searches(name: str, shape: ModelShape, scenarios: Sequence[Scenario]) -> list[Granularity]:
    """What is to be searched for these scenarios; those that allow the same masks are searched once."""
    searches = (GRANULARITIES[name](shape, scenario) for scenario in scenarios)
    return list({search.key: search for search in searches}.values())
