"""Residual streams that are held between calls, so that masks which differ late start late."""

import torch

from rap_env.llm.streams import parting
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites


class HeldStreams:
    """The residual streams in front of every kept site of one mask, run no further than asked.

    A mask that differs from it in one late site costs only what follows that site: half of the work on average over
    single removals. The result is exactly that of running the mask from the start.

    Args:
        llm: The model.
        hidden: The residual stream [B, T, H] in front of the first site.
        context: What `open_stream` returned with it.
    """

    def __init__(self, llm: SwitchableLLM, hidden: torch.Tensor, context: dict) -> None:
        self._llm, self.first, self.context = llm, hidden, context  # `first`: in front of the first site
        self._mask = PruningMask.all_kept(llm.shape)
        self._streams = [hidden]  # in front of site 0, 1, ... as far as it was run

    def move_to(self, mask: PruningMask) -> None:
        """Turns to another mask of the model and keeps the streams as far as the first site that differs."""
        self._llm.check(mask)
        del self._streams[parting([self._mask, mask], 0) + 1 :]
        self._mask = mask

    def in_front_of_parting(self, mask: PruningMask) -> tuple[int, torch.Tensor]:
        """The first site at which a mask parts from the held one, and the stream in front of it.

        For the held mask itself that is the number of sites, and the stream after the last one.
        """
        first = parting([self._mask, mask], 0)
        while len(self._streams) <= first:
            site = len(self._streams) - 1
            sites = kept_sites(self._mask, site, site + 1)
            self._streams.append(self._llm.run(sites, self._streams[-1], self.context))
        return first, self._streams[first]
