"""Rounds of greedy removal: what each rule has in common, and the exact rule."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask


class Removal(NamedTuple):
    """A removed component, and the calibration loss without it."""

    name: str
    loss: float


def price(increase: float, freed: float) -> float:
    """Loss increase for what a removal frees; where the loss falls, freeing more is better too."""
    return increase / freed if increase > 0 else increase * freed


class Rounds:
    """The shrinking model of one greedy search; a subclass plays the rounds (`remove_least_important`).

    Args:
        shape: The model's `ModelShape`.
        freed: What dropping each component is worth (bytes, or 1 each); the search minimises loss increase / worth.

    Attributes:
        mask: What is left.
        loss: Its calibration loss.
        increases: Loss increase without each component, when it was measured last.
        first_increases: The same when the first round was over.
        tried: All masks that were evaluated to choose among them.
        known: Losses of the masks that were measured on all windows.
    """

    def __init__(self, shape, freed: Mapping[str, int]) -> None:
        self.mask = PruningMask.all_kept(shape)
        self.loss = 0.0
        self.increases: dict[str, float] = {}
        self.first_increases: dict[str, float] = {}
        self.tried: set[PruningMask] = set()
        self.known: dict[PruningMask, float] = {}
        self._freed = freed

    def all_costs(self) -> dict[str, float]:
        """What dropping each component costs, as far as it is known: by how much the dense model's loss rose."""
        return self.first_increases

    def left(self) -> list[str]:
        """Names of what was not removed, the least important first."""
        return sorted((component.name for component in self.mask.kept), key=self._price)

    def _price(self, name: str) -> float:
        return price(self.increases.get(name, 0.0), self._freed[name])

    def _losses(self, meter: Meter, names: Sequence[str], near: PruningMask | None = None) -> dict[str, float]:
        """Losses of the present mask without each of some components, evaluated together."""
        masks = [self.mask.drop(name) for name in names]
        evaluations = meter.evaluate(masks, near)
        self.tried.update(masks)
        return {name: -evaluation.score for name, evaluation in zip(names, evaluations, strict=True)}


class ExactRounds(Rounds):
    """Every round tries every component that is left, on all windows."""

    def __init__(self, meter: Meter, *, freed: Mapping[str, int]) -> None:
        super().__init__(meter.llm.shape, freed)
        self._meter = meter
        self.loss = self.known[self.mask] = -meter.evaluate([self.mask])[0].score

    def remove_least_important(self) -> Removal:
        losses = self._losses(self._meter, [component.name for component in self.mask.kept])
        self.known |= {self.mask.drop(name): loss for name, loss in losses.items()}
        self.increases = {name: loss - self.loss for name, loss in losses.items()}
        self.first_increases = self.first_increases or self.increases
        name = min(self.increases, key=self._price)
        self.mask, self.loss = self.mask.drop(name), losses[name]
        return Removal(name, self.loss)
