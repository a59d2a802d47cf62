"""Sites that run, and components that can be dropped with what each costs."""

import functools
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

ATTENTION = "attention"
MLP = "mlp"
KINDS = (ATTENTION, MLP)


@dataclass(frozen=True, order=True)
class Site:
    """What runs: the attention or the MLP of a decoder layer, the whole of it or some of its parts.

    Attributes:
        layer: Index of the decoder layer.
        kind: `"attention"` or `"mlp"`.
        parts: Indices of the parts that run; None for the whole site.
    """

    layer: int
    kind: str
    parts: tuple[int, ...] | None = None

    @functools.cached_property
    def name(self) -> str:
        """`layer3.attention`."""
        return f"layer{self.layer}.{self.kind}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Component:
    """What can be kept or dropped, as a row of costs: a whole site, or one part of it.

    Attributes:
        name: That of the site, followed by `.PART` where the site has several.
        site: Where it runs.
        part: None for the whole site, else its index in the site.
        weight_bytes: What its weights take.
        kv_bytes_per_token: What it adds to the KV cache for each cached token.
    """

    name: str
    site: Site
    part: int | None
    weight_bytes: int
    kv_bytes_per_token: int

    def __hash__(self) -> int:
        return hash(self.name)  # tuples of components are keys, so this has to be fast

    def __str__(self) -> str:
        return self.name


class Components(tuple[Component, ...]):
    """All components of a model in the order in which it runs them; what masks look up in them is looked up once."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(repr(tuple(self)).encode()).digest()  # a hash is that of the names

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Components):  # by rows, each look into a cache that an equal model filled would take 1 ms
            return self is other or self._digest == other._digest
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    @functools.cached_property
    def positions(self) -> dict[str, tuple[int, ...]]:
        """Positions in model order by name: one for each component, all of its parts for a site."""
        positions: dict[str, tuple[int, ...]] = {}
        for position, component in enumerate(self):
            for name in {component.name, component.site.name}:
                positions[name] = (*positions.get(name, ()), position)
        return positions

    @functools.cached_property
    def sites(self) -> tuple[tuple[Site, slice], ...]:
        """Every site in order, with the positions of its components."""
        groups = itertools.groupby(range(len(self)), key=lambda position: self[position].site)
        runs = [(site, list(positions)) for site, positions in groups]
        return tuple((site, slice(positions[0], positions[-1] + 1)) for site, positions in runs)

    @functools.cached_property
    def n_parts(self) -> tuple[int, ...]:
        """How many components each site has."""
        return tuple(positions.stop - positions.start for _site, positions in self.sites)

    @functools.cached_property
    def costs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Weight bytes, and KV bytes per token, of every component."""
        return tuple(row.weight_bytes for row in self), tuple(row.kv_bytes_per_token for row in self)

    @functools.cached_property
    def running_costs(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """For each site the weight bytes of its first 0, 1, ... parts, and their KV bytes per token."""
        places = [positions for _site, positions in self.sites]
        weights, kv_bytes = (
            tuple(tuple(itertools.accumulate(of[place], initial=0)) for place in places) for of in self.costs
        )
        return weights, kv_bytes

    @functools.cached_property
    def prefixes(self) -> tuple[tuple[tuple[bool, ...], ...], ...]:
        """For each site the keep-bits of its first 0, 1, ... parts."""
        return tuple(tuple((True,) * n + (False,) * (of - n) for n in range(of + 1)) for of in self.n_parts)

    @property
    def have_parts(self) -> bool:
        """Whether there is a site of several components."""
        return len(self.sites) < len(self)


@functools.lru_cache(maxsize=32)
def _one_of_equals(components: tuple[Component, ...]) -> Components:
    return Components(components)


def shared(components: Iterable[Component]) -> Components:
    """One object for all that are equal, as far as can be, so that what is looked up in them is looked up once."""
    return components if isinstance(components, Components) else _one_of_equals(tuple(components))
