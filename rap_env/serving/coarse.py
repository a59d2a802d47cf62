"""Masks of few different widths, so that a switch finds everything ready that was made for another mask."""

from rap_env.errors import InfeasibleBudget
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.serving.controller import Decider

_FEW_PARTS = 8  # of a site; up to so many each width is run


class CoarseWidths:
    """Lets a policy decide on widths, and moves each to the nearest of a few.

    A library that makes a program for each shape of a matrix product has few to make then; otherwise the first step
    after a switch takes several times as long, and the programs take more memory than pruning frees from a small model.

    Args:
        decider: The policy; its masks keep first parts of sites.
        shape: The model.
        step: Of the parts of a site that has many, as many are dropped or kept together.
    """

    def __init__(self, decider: Decider, shape: ModelShape, step: int = 4) -> None:
        self._decider, self._shape, self._step = decider, shape, step

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """The nearest coarse mask to the policy's that fits the budget.

        Raises:
            InfeasibleBudget: There is none, or the policy has no mask.
        """
        wanted = self._decider.decide(workload, budget_bytes)
        lower, upper = zip(*map(self._around, wanted.widths, self._shape.components.n_parts), strict=True)
        nearest = [
            up if up - width < width - low else low for low, width, up in zip(lower, wanted.widths, upper, strict=True)
        ]
        # While it does not fit, the site that was widened the most goes back.
        widened = sorted(range(len(nearest)), key=lambda site: nearest[site] - wanted.widths[site])
        while True:
            mask = PruningMask.from_widths(self._shape, nearest)
            needed = footprint(self._shape, mask, workload).peak_bytes
            if needed <= budget_bytes:
                return mask
            if not widened:
                raise InfeasibleBudget(budget_bytes, needed, workload)
            site = widened.pop()
            nearest[site] = lower[site]

    def _around(self, width: int, n_parts: int) -> tuple[int, int]:
        """The coarse widths at or below, and at or above a width."""
        if n_parts <= _FEW_PARTS:
            return width, width
        dropped = n_parts - width
        above = n_parts - dropped // self._step * self._step
        return (above, above) if above == width else (max(0, above - self._step), above)

    def levels(self) -> list[PruningMask]:
        """Masks that have all widths among them."""
        n_parts = self._shape.components.n_parts
        options = [sorted({self._around(width, n)[0] for width in range(1, n + 1)} - {0}) for n in n_parts]
        n_levels = max(map(len, options))
        return [
            PruningMask.from_widths(self._shape, [own[min(level, len(own) - 1)] for own in options])
            for level in range(n_levels)
        ]
