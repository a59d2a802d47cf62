"""A window of two layers that moves over a model: one computes, the next one is read meanwhile (GRATING)."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask


class LayerWindow:
    """Has the weights of two layers in memory at most; between two walks of none.

    Args:
        llm: The model, which from then on runs only what a walk has just reached: no mask but the empty one can be
            applied to it. What its mask drops is never read.
        folder: For the weights; see `WeightStore`.

    The file may be removed, and what is written into it is told; where it is cut while it is mapped, the process ends
    (`MappedWeights`).

    Raises what `WeightStore` raises.
    """

    def __init__(self, llm: SwitchableLLM, folder: Path) -> None:
        mask = llm.mask
        self._store = WeightStore(llm, folder)
        self._layers: list[PruningMask] = []
        for layer in range(1 + max(site.layer for site in llm.shape.sites)):
            bits = [
                keep and component.site.layer == layer
                for component, keep in zip(llm.shape.components, mask.keep, strict=True)
            ]
            self._layers.append(PruningMask.from_bits(llm.shape, bits))
        self._none = PruningMask.from_bits(llm.shape, [False] * len(mask.keep))
        llm.apply(self._none)
        self._store.release(self._none)

    def walk(self) -> Iterator[int]:
        """Yields one layer after the other, each while its weights are in memory; may be closed anywhere.

        Raises:
            WeightsUnavailable: They can't be read. A later walk reads all of them anew.
        """
        coming: Future | None = None
        try:
            self._store.restore(self._layers[0])
            for layer, after in enumerate([*self._layers[1:], self._none]):
                coming = self._store.prefetch(after)
                yield layer
                wait([coming])  # released pages would be read twice
                self._store.restore(after)
                self._store.release(after)
        finally:
            if coming is not None:
                wait([coming])
            self._store.release(self._none)
