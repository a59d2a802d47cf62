"""Components of a model that can be dropped, and the frozen keep-bits over them."""

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rap_env.errors import InvalidMask, UnknownName

ATTENTION = "attention"
MLP = "mlp"
KINDS = (ATTENTION, MLP)


@dataclass(frozen=True, order=True)
class Component:
    """One part of the model that can be kept or dropped.

    Attributes:
        layer: Index of the decoder layer.
        kind: `"attention"` or `"mlp"`.
        index: None for the whole sub-block (granularity `block`), else the group inside it.
    """

    layer: int
    kind: str
    index: int | None = None

    @functools.cached_property
    def name(self) -> str:
        """`layer3.attention`, or `layer3.attention.1` for a group."""
        base = f"layer{self.layer}.{self.kind}"
        return base if self.index is None else f"{base}.{self.index}"

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=32)
def _positions(components: tuple[Component, ...]) -> dict[str, int]:
    return {component.name: position for position, component in enumerate(components)}


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
        if len(self.keep) != len(self.components):
            raise InvalidMask(
                f"expected {len(self.components)} keep-bits, one for each component; got {len(self.keep)}"
            )

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
        for value in values:
            if value not in (0, 1):
                raise InvalidMask(f"expected keep-bits of 0 or 1; got {value!r}")
        return cls(shape.components, tuple(map(bool, values)))

    def position(self, name: "str | Component") -> int:
        """Position of a component in `keep`.

        Raises:
            UnknownName: The model has no such component.
        """
        positions = _positions(self.components)
        if str(name) not in positions:
            raise UnknownName("component", str(name), positions)
        return positions[str(name)]

    def _with(self, names: Iterable["str | Component"], value: bool) -> "PruningMask":
        keep = list(self.keep)
        for name in names:
            keep[self.position(name)] = value
        return PruningMask(self.components, tuple(keep))

    def drop(self, *names: "str | Component") -> "PruningMask":
        """A copy in which the named components are dropped."""
        return self._with(names, False)

    def restore(self, *names: "str | Component") -> "PruningMask":
        """A copy in which the named components are kept."""
        return self._with(names, True)

    def keeps(self, name: "str | Component") -> bool:
        return self.keep[self.position(name)]

    @functools.cached_property
    def kept(self) -> tuple[Component, ...]:
        return tuple(itertools.compress(self.components, self.keep))

    @functools.cached_property
    def dropped(self) -> tuple[Component, ...]:
        return tuple(itertools.compress(self.components, map(operator.not_, self.keep)))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the names of the dropped components and their number, hexadecimal."""
        text = f"{len(self.keep)}:" + ",".join(component.name for component in self.dropped)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"n_components": len(self.keep), "dropped": [c.name for c in self.dropped]})

    @classmethod
    def from_json(cls, shape, text: str) -> "PruningMask":
        """Reads what `to_json` wrote, for a model of the same shape.

        Raises:
            InvalidMask: The text is no mask, or one over another number of components.
            UnknownName: It names a component that the model does not have.
        """
        try:
            data = json.loads(text)
            n_components, dropped = data["n_components"], list(data["dropped"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidMask(f"expected the JSON of a pruning mask; got {text[:80]!r}") from error
        mask = cls.all_kept(shape)
        if n_components != len(mask.keep):
            raise InvalidMask(f"expected a mask over {len(mask.keep)} components; got {n_components}")
        return mask.drop(*dropped)

    def __str__(self) -> str:
        return f"{len(self.kept)} of {len(self.keep)} components kept"


def by_layer(components: Iterable[Component]) -> list[tuple[Component, ...]]:
    """Whole layers: components in model order, grouped by their layer."""
    return [tuple(layer) for _index, layer in itertools.groupby(components, key=lambda component: component.layer)]


def full_order(components: tuple[Component, ...], order: Sequence[str]) -> tuple[str, ...]:
    """An importance order, once it is sure to rank every component.

    Raises:
        InvalidMask: The order does not name each component once.
    """
    if sorted(order) != sorted(component.name for component in components):
        raise InvalidMask(f"expected an order over each of the {len(components)} components once")
    return tuple(order)
