"""A model that reads ragged batches with whatever mask is applied: prompts and next tokens of sequences in one pass."""

from collections.abc import Sequence

import torch

from rap_env.llm.live_cache import CacheFormat, ComingBack, SequenceCache
from rap_env.llm.packing import PackedStream
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import ATTENTION, PruningMask, kept_sites

Reading = tuple[SequenceCache, Sequence[int]]  # a sequence's cache, and its tokens that are to be read next


class RaggedStream(PackedStream):
    """New tokens of several sequences end to end; attention runs for each sequence over its own cache.

    Args:
        readings: Each sequence's cache and how many tokens of it the stream has, in order.

    Attributes:
        layer: Index of the layer that runs now.
        heads: The KV heads that it runs with.
    """

    def __init__(self, readings: Sequence[tuple[SequenceCache, int]]) -> None:
        self._readings = readings
        self.layer, self.heads = 0, ()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention of each sequence's new tokens to all that it has read; see `PackedStream`."""
        outputs, start = [], 0
        for cache, n_new in self._readings:
            own = slice(start, start := start + n_new)
            states = query[0, :, own], key[0, :, own], value[0, :, own]
            outputs.append(cache.attend(self.layer, self.heads, states, scale))
        return torch.cat(outputs)[None]


class LiveModel:
    """Generates with a model whose mask changes between any two tokens.

    Args:
        llm: The model, with a `WeightStore` or without; nothing else may apply masks to it meanwhile.

    Raises:
        UnsupportedArchitecture: Its attention has a sliding window.
    """

    def __init__(self, llm: SwitchableLLM) -> None:
        self.llm, self.form = llm, CacheFormat.of(llm)
        self._prepare()

    def switch(self, mask: PruningMask) -> None:
        """Goes on with another mask; caches are carried over by themselves (`SequenceCache.switch`).

        Raises what `WeightStore.switch` and `SwitchableLLM.apply` raise; then the mask before stays.
        """
        if self.llm.store is None:
            self.llm.apply(mask)
        else:
            self.llm.store.switch(mask)
        self._prepare()

    def _prepare(self) -> None:
        self.heads = self.form.heads_of(self.llm.mask)
        self._steps = [(site, self.llm.layer_of(site)) for site in kept_sites(self.llm.mask)]

    def new_cache(self, capacity_tokens: int) -> SequenceCache:
        """A cache for a sequence that is read with the present mask."""
        return SequenceCache(self.form, self.heads, capacity_tokens)

    def carry(self, cache: SequenceCache, coming_back: ComingBack) -> None:
        """Takes a cache over to the present mask."""
        cache.switch(self.heads, coming_back)

    @torch.inference_mode()
    def read(self, readings: Sequence[Reading]) -> torch.Tensor:
        """Reads new tokens of several sequences.

        Args:
            readings: At least one sequence, with at least one token each.

        Returns:
            Logits of what follows each sequence's last token [len(readings), V], in the model's type.

        Raises:
            InvalidWorkload: A cache has no room for the tokens; then none was read.
        """
        for cache, tokens in readings:
            cache.check_room(len(tokens))
        stream = RaggedStream([(cache, len(tokens)) for cache, tokens in readings])
        device = self.llm.device
        flat = torch.tensor([token for _cache, tokens in readings for token in tokens], device=device)
        places = [range(cache.length, cache.length + len(tokens)) for cache, tokens in readings]
        positions = torch.tensor([place for own in places for place in own], device=device)
        unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # stops upstream from building a mask
        hidden, context = self.llm.open_stream(flat[None], position_ids=positions[None], attention_mask=unmasked)
        context = context | {"attention_mask": stream}
        for site, layer in self._steps:
            if site.kind == ATTENTION:
                stream.layer, stream.heads = site.layer, self.heads[site.layer]
            hidden = layer.run(site.kind, hidden, context)
        ends = torch.tensor([len(tokens) for _cache, tokens in readings], device=device).cumsum(0) - 1
        for cache, tokens in readings:
            cache.length += len(tokens)
        return self.llm.logits(hidden[0, ends])
