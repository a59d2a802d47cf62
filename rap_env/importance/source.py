"""Where an environment's importance ranking comes from: measured once, or anew for the present mask."""

from collections.abc import Mapping, Sequence

from rap_env.importance.trials import RemovalMeter
from rap_env.mask import PruningMask


class ImportanceSource:
    """Orders a model's components from the least to the most important.

    Args:
        order: The static ranking, all component names (`ImportanceRanking.order`).
        meter: Measures the present mask's trials; only `current` and `loss_after` need it.
        known: Calibration losses of the masks that the ranking measured (`ImportanceRanking.known`).
    """

    def __init__(
        self, order: Sequence[str], meter: RemovalMeter | None = None, known: Mapping[PruningMask, float] | None = None
    ) -> None:
        self.static = tuple(order)
        self.known = dict(known or {})
        self._meter = meter

    def current(self, mask: PruningMask) -> tuple[str, ...]:
        """Dropped components first, in static order; then the kept ones by the loss that dropping each would leave."""
        losses = {name: trial.loss for name, trial in self._require_meter().trials(mask).items()}
        dropped = [name for name in self.static if name not in losses]
        return (*dropped, *sorted(losses, key=losses.__getitem__))

    def loss_after(self, mask: PruningMask, name: str) -> float:
        """Calibration loss of the mask after dropping one more component."""
        return self._require_meter().trial(mask, mask.components[mask.position(name)]).loss

    def loss(self, mask: PruningMask) -> float:
        """Calibration loss of the mask."""
        return self._require_meter().trial(mask).loss

    def _require_meter(self) -> RemovalMeter:
        if self._meter is None:
            raise ValueError('gsi="current" and shaping measure trials: give the ImportanceSource a RemovalMeter')
        return self._meter
