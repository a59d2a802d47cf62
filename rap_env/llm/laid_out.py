"""Matrices as oneDNN's kernels want them: laid out once, where torch would do it anew for each product.

For few rows, as in decoding, laying out a bfloat16 matrix takes longer than the product. A laid-out one weighs as much,
and would be in memory beside the one that it was made from; so that one is in a file, and leaves memory.
"""

from collections.abc import Iterable

import torch
from torch import nn

from rap_env.components import Site
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.kernels import LaidOutLinear, computes_bfloat16
from rap_env.llm.mapped_weights import MappedWeights
from rap_env.llm.stored import stored_whole
from rap_env.llm.switchable import SwitchableLLM


class LaidOut:
    """The laid-out matrices of a live model: one site after another, so that no step waits for all of them.

    Args:
        llm: Nothing is laid out unless it is a bfloat16 model with a store, on a CPU that computes in bfloat16, and no
            site runs with copies of its own: these would be in memory twice.

    Attributes:
        head: [..., H] -> [..., V]; hooks of upstream's are not called where it is laid out.

    Raises:
        WeightsUnavailable: The head's file can't be written.
    """

    def __init__(self, llm: SwitchableLLM) -> None:
        self._llm, self._layers, self._waiting = llm, {}, []
        self.head: nn.Module = llm.model.lm_head
        self._embedding: _MappedEmbedding | None = None
        computes = llm.device.type == "cpu" and llm.dtype == torch.bfloat16 and computes_bfloat16()
        self._possible = computes and llm.store is not None and not llm.store.has_copies
        if self._possible and type(self.head) is nn.Linear:
            self.head = LaidOutLinear(self.head)
            self._embedding = _MappedEmbedding(llm)

    def follow(self, sites: Iterable[Site]) -> dict[Site, DecoderLayer]:
        """The layers that sites run in from now on; what other sites had goes.

        Args:
            sites: Those that the model keeps, in order, with their parts.
        """
        sites = tuple(sites)
        self._layers = {site: self._layers[site] for site in sites if site in self._layers}
        missing = [site for site in sites if site not in self._layers and _has_first_parts(site)]
        self._waiting = missing[::-1] if self._possible else []
        return {site: self._layers.get(site) or self._llm.layer_of(site) for site in sites}

    def next(self) -> tuple[Site, DecoderLayer] | None:
        """Lays out one more site, which runs in the returned layer from now on; None where all are laid out."""
        if not self._waiting:
            return None
        site = self._waiting.pop()
        layer = self._layers[site] = self._llm.layer_of(site).laid_out(site.kind)
        self._llm.store.set_aside(site)
        return site, layer

    def inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """What upstream's decoder reads for tokens [1, N]; raises what `MappedWeights.rows` raises."""
        if self._embedding is None:
            return {"input_ids": tokens}
        return {"input_ids": None, "inputs_embeds": self._embedding.of(tokens)}


class _MappedEmbedding:
    """Rows of the matrix that the head was made from, which is in a file from now on, and out of memory."""

    def __init__(self, llm: SwitchableLLM) -> None:
        self._shared = stored_whole("lm_head.weight", llm.model.lm_head.weight)
        self._memory = MappedWeights(llm.store.memory.folder)
        self._memory.take([self._shared], llm.digest)
        self._whole = llm.model.get_input_embeddings()

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, N] -> [1, N, H]."""
        if self._whole.weight is not self._shared.parameter:  # not tied: in memory
            return self._whole(tokens)
        return self._memory.rows(self._shared, tokens[0].tolist())[None]


def _has_first_parts(site: Site) -> bool:
    return site.parts is None or site.parts == tuple(range(len(site.parts)))
