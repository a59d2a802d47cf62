"""Where an environment's importance ranking comes from: measured once, or anew for the present mask."""

from collections.abc import Sequence
from typing import Any

from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask


class ImportanceSource:
    """Orders a model's components from the least to the most important. A live object: copies of it are itself.

    Args:
        order: The static ranking, all component names (`ImportanceRanking.order`).
        meter: Evaluates by calibration loss; only `current` needs it.
    """

    def __init__(self, order: Sequence[str], meter: Meter | None = None) -> None:
        self.static = tuple(order)
        self._meter = meter

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImportanceSource":
        return self

    def current(self, mask: PruningMask) -> tuple[str, ...]:
        """Dropped components first, in static order; then the kept ones by the loss that dropping each would leave.

        Raises:
            ValueError: There is no meter.
            SearchExhausted: The meter's token budget does not cover the trials.
        """
        if self._meter is None:
            raise ValueError('gsi="current" evaluates masks: give the ImportanceSource a Meter')
        kept = [component.name for component in mask.kept]
        evaluated = self._meter.evaluate([mask.drop(name) for name in kept])
        losses = {name: -evaluation.score for name, evaluation in zip(kept, evaluated, strict=True)}
        dropped = [name for name in self.static if name not in losses]
        return (*dropped, *sorted(losses, key=losses.__getitem__))
