"""A window of two sites that moves over a model: one computes, the next one is read meanwhile (after GRATING)."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from rap_env.components import Site
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask, kept_sites


class WeightWindow:
    """Has the weights of two sites in memory at most, an attention and an MLP; between two walks of none.

    GRATING's window is of two layers; sites are read one by one here, which halves it.

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
        self._sites: dict[Site, PruningMask] = {}
        for site in kept_sites(mask):
            own = [component.site == Site(site.layer, site.kind) for component in llm.shape.components]
            bits = [keep and here for keep, here in zip(mask.keep, own, strict=True)]
            self._sites[site] = PruningMask.from_bits(llm.shape, bits)
        self._none = PruningMask.from_bits(llm.shape, [False] * len(mask.keep))
        llm.apply(self._none)
        self._store.release(self._none)

    def walk(self) -> Iterator[Site]:
        """Yields one kept site after the other, each while its weights are in memory; may be closed anywhere.

        Raises:
            WeightsUnavailable: They can't be read. A later walk reads all of them anew.
        """
        coming: Future | None = None
        masks = [*self._sites.values(), self._none]
        try:
            self._store.restore(masks[0])
            for site, after in zip(self._sites, masks[1:], strict=True):
                coming = self._store.prefetch(after)
                yield site
                wait([coming])  # released pages would be read twice
                self._store.restore(after)
                self._store.release(after)
        finally:
            if coming is not None:
                wait([coming])
            self._store.release(self._none)
