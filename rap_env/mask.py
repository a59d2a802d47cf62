"""Frozen keep-bits over a model's components."""

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, count

from rap_env.components import Component, Site, shared
from rap_env.errors import InvalidMask, check_known


@dataclass(frozen=True)
class PruningMask:
    """Which components a model keeps. A value: equal masks have equal digests, in any process.

    Attributes:
        components: All components in the order in which the model runs them.
        keep: One bit for each component, True where it is kept.

    Raises:
        InvalidMask: There is not exactly one bit for each component.
    """

    components: tuple[Component, ...]
    keep: tuple[bool, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", shared(self.components))
        if len(self.keep) != (n := len(self.components)):
            raise InvalidMask(f"expected {n} keep-bits, one for each component; got {len(self.keep)}")

    def __getattr__(self, name: str) -> tuple[bool, ...]:
        """The bits of a mask that was made from widths, once somebody asks for them: most ask for the widths only."""
        if name != "keep" or "widths" not in vars(self):
            raise AttributeError(f"a pruning mask has no attribute {name!r}")
        keep = tuple(itertools.chain.from_iterable(map(operator.getitem, self.components.prefixes, self.widths)))
        vars(self)["keep"] = keep
        return keep

    def __hash__(self) -> int:
        return hash(self.keep)  # the bits alone: hashing every row would take longer than a forward of a tiny model

    @classmethod
    def all_kept(cls, shape) -> "PruningMask":
        """The dense mask of a `ModelShape`."""
        return cls(shape.components, (True,) * len(shape.components))

    @classmethod
    def from_bits(cls, shape, bits: Sequence) -> "PruningMask":
        """Builds a mask from an action or an array of `n_components` zeros and ones, in component order.

        Raises:
            InvalidMask: The length is wrong, or a value is neither 0 nor 1.
        """
        values = bits.tolist() if hasattr(bits, "tolist") else list(bits)  # Python's numbers compare ten times faster
        if wrong := [value for value in values if value not in (0, 1)]:
            raise InvalidMask(f"expected keep-bits of 0 or 1; got {wrong[0]!r}")
        return cls(shape.components, tuple(map(bool, values)))

    @classmethod
    def from_widths(cls, shape, widths: Sequence[int]) -> "PruningMask":
        """Keeps the first parts of every site, as many as it is told; a whole site counts as one part.

        Args:
            shape: A `ModelShape`.
            widths: A number for each site, in the order in which the model runs them.

        Raises:
            InvalidMask: There is not exactly one number for each site, or a site does not have as many parts.
        """
        components, widths = shared(shape.components), tuple(map(int, widths))
        if len(widths) != len(components.sites):
            raise InvalidMask(f"expected {len(components.sites)} widths, one for each site; got {len(widths)}")
        if min(widths) < 0 or not all(map(operator.le, widths, components.n_parts)):
            for (site, _positions), n_parts, width in zip(components.sites, components.n_parts, widths, strict=True):
                if not 0 <= width <= n_parts:
                    raise InvalidMask(f"expected a width of 0 to {n_parts} for {site}; got {width}")
        mask = object.__new__(cls)
        vars(mask).update(components=components, widths=widths)  # as the cached property has them
        return mask

    def _positions(self, name: str | Site | Component) -> tuple[int, ...]:
        positions = self.components.positions
        return positions[check_known("component", str(name), positions)]

    def _with(self, names: Iterable[str | Site | Component], value: bool) -> "PruningMask":
        keep = list(self.keep)
        for name in names:
            for position in self._positions(name):
                keep[position] = value
        return PruningMask(self.components, tuple(keep))

    def drop(self, *names: str | Site | Component) -> "PruningMask":
        """A copy in which the named components are dropped; a site's name drops all its parts.

        Raises:
            UnknownName: The model has no such component or site.
        """
        return self._with(names, False)

    def restore(self, *names: str | Site | Component) -> "PruningMask":
        """A copy in which the named components are kept; takes, and refuses, the names that `drop` does."""
        return self._with(names, True)

    def keeps(self, name: str | Site | Component) -> bool:
        """Whether a component is kept; of a site, whether any part is."""
        return any(self.keep[position] for position in self._positions(name))

    @functools.cached_property
    def kept(self) -> tuple[Component, ...]:
        return tuple(compress(self.components, self.keep))

    @functools.cached_property
    def dropped(self) -> tuple[Component, ...]:
        return tuple(compress(self.components, map(operator.not_, self.keep)))

    @functools.cached_property
    def weight_bytes(self) -> int:
        """What the weights of the kept components take."""
        return self._sum(0)

    @functools.cached_property
    def kv_bytes_per_token(self) -> int:
        """What each cached token takes in the KV cache of the kept components."""
        return self._sum(1)

    def _sum(self, cost: int) -> int:
        """Over sites where the widths are known, which are fewer."""
        if "widths" in vars(self):
            return sum(map(operator.getitem, self.components.running_costs[cost], self.widths))
        return sum(compress(self.components.costs[cost], self.keep))

    @functools.cached_property
    def kept_parts(self) -> tuple[tuple[Site, tuple[bool, ...]], ...]:
        """Every site in the order in which the model runs them, with the keep-bits of its components."""
        return tuple((site, self.keep[positions]) for site, positions in self.components.sites)

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """How many parts each site keeps, in the order in which the model runs the sites.

        Raises:
            InvalidMask: What a site keeps are not its first parts.
        """
        for site, bits in self.kept_parts:
            if not all(bits[: sum(bits)]):
                raise InvalidMask(f"expected a mask that keeps the first parts of each site; {site} keeps others")
        return self.n_kept

    @property
    def n_kept(self) -> tuple[int, ...]:
        """How many parts each site keeps, whichever these are."""
        return self.widths if "widths" in vars(self) else tuple(sum(bits) for _site, bits in self.kept_parts)

    @functools.cached_property
    def nested(self) -> "PruningMask":
        """A mask that keeps as many parts of each site, but the first ones; itself where it does already."""
        if not self.components.have_parts:
            return self
        parts = (sorted(bits, reverse=True) for _site, bits in self.kept_parts)
        keep = tuple(itertools.chain.from_iterable(parts))
        return self if keep == self.keep else PruningMask(self.components, keep)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the names of the dropped components and their number, hexadecimal."""
        text = f"{len(self.keep)}:" + ",".join(component.name for component in self.dropped)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"n_components": len(self.keep), "dropped": [c.name for c in self.dropped]})

    @classmethod
    def from_json(cls, shape, text: str) -> "PruningMask":
        """Reads what `to_json` wrote, for the same shape; raises `InvalidMask` or `UnknownName` for anything else."""
        try:
            data = json.loads(text)
            n_components, dropped = data["n_components"], [str(name) for name in data["dropped"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InvalidMask(f"expected the JSON of a pruning mask; got {text[:80]!r}") from error
        if n_components != len(shape.components):
            raise InvalidMask(f"expected a mask over {len(shape.components)} components; got {n_components}")
        return cls.all_kept(shape).drop(*dropped)

    def __str__(self) -> str:
        return f"{len(self.kept)} of {len(self.keep)} components kept"


def kept_sites(mask: PruningMask, start: int = 0, stop: int | None = None) -> list[Site]:
    """The sites of which a mask keeps any part, between two places in the order of all sites."""
    kept = ((site, bits) for site, bits in mask.kept_parts[start:stop] if any(bits))
    return [site if all(bits) else Site(site.layer, site.kind, tuple(compress(count(), bits))) for site, bits in kept]


def full_order(components: tuple[Component, ...], order: Sequence[str]) -> tuple[str, ...]:
    """An importance order, once it is sure to rank every component, from the last part of each site to its first.

    Where an order has parts of a site in another sequence, they change places among themselves, so that a walk along it
    keeps the first parts of each site.

    Raises:
        InvalidMask: The order does not name each component once.
    """
    site_of = {component.name: component.site for component in components}
    if sorted(order) != sorted(site_of):
        raise InvalidMask(f"expected an order over each of the {len(components)} components once")
    parts: dict[Site, list[str]] = {}
    for name, site in site_of.items():
        parts.setdefault(site, []).append(name)
    return tuple(parts[site_of[name]].pop() for name in order)
