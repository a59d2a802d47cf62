"""A model that reads ragged batches with whatever mask is applied: prompts and next tokens of sequences in one pass."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn import functional

from rap_env.components import ATTENTION
from rap_env.llm.few_rows import for_few_rows, most_rows
from rap_env.llm.kernels import product
from rap_env.llm.live_cache import CacheFormat, Heads, SequenceCache, filled
from rap_env.llm.next_tokens import States, attend_together, attends_together
from rap_env.llm.packing import PackedStream
from rap_env.llm.quantised import KERNEL_ROWS, Quantised
from rap_env.llm.recorded_steps import RecordedSteps
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.memory.measured import trim_freed_memory

_FEW_ROWS, _ROWS = (1, 4, 16), 64  # see `padded`

Reading = tuple[SequenceCache, Sequence[int]]  # a sequence's cache, and its tokens that are to be read next


class RaggedStream(PackedStream):
    """New tokens of several sequences end to end; attention runs for each sequence over its own cache.

    Args:
        readings: Each sequence's cache and how many tokens of it the stream has, in order.
        positions: Of all rows of the stream [N], those of padding behind the tokens included.
        heads: The KV heads of the mask that is applied.

    Attributes:
        layer: Index of the layer that runs now.
        heads: The KV heads that it runs with.
        step: The caches, where one kernel attends for all sequences; None where it does not.
        n_keys: Tokens that this kernel looks at.
    """

    encodes = True

    def __init__(self, readings: Sequence[tuple[SequenceCache, int]], positions: torch.Tensor, heads: Heads) -> None:
        self.positions, self.layer, self.heads = positions, 0, ()
        ends = list(accumulate(n_new for _, n_new in readings))
        rows = [slice(end - n_new, end) for end, (_, n_new) in zip(ends, readings, strict=True)]
        form = readings[0][0].form
        next_tokens = [place for place, (own, n_new) in enumerate(readings) if n_new == 1 and own.has_just(heads)]
        whole_step = len(next_tokens) == len(readings)
        if not attends_together(form.device, form.dtype, whole_step):
            next_tokens, whole_step = [], False
        self._together = [readings[place][0] for place in next_tokens]
        self.n_keys = filled(1 + max((cache.length for cache in self._together), default=0))
        self.step = self._together if whole_step else None
        if not whole_step:
            alone = set(range(len(readings))) - set(next_tokens)
            self._alone = [(readings[place][0], rows[place]) for place in sorted(alone)]
            self._rows_together = [rows[place].start for place in next_tokens]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention of each sequence's new tokens to all that it has read; see `PackedStream`."""

        def of(rows: slice | list[int]) -> States:
            return query[0, :, rows], key[0, :, rows], value[0, :, rows]

        def read_together(rows: slice | list[int]) -> torch.Tensor:
            return attend_together(self._together, self.layer, of(rows), self.positions[rows], self.n_keys, scale)

        n_rows = query.shape[2]
        if self.step is not None:
            n_own = len(self.step)
            read = read_together(slice(n_own))
            return (functional.pad(read, (0, 0, 0, 0, 0, n_rows - n_own)) if n_rows > n_own else read)[None]
        read = query.new_zeros(n_rows, query.shape[1], query.shape[3])
        if self._together:
            read[self._rows_together] = read_together(self._rows_together)
        for cache, rows in self._alone:
            read[rows] = cache.attend(self.layer, self.heads, of(rows), scale)
        return read[None]


def padded(n_rows: int, few_rows: Sequence[int]) -> int:
    """The number of rows that so many are filled up to: the next of a few, or a multiple of 64.

    oneDNN makes and keeps a program for each shape of a matrix product: 1 to 10 ms, and about 0.6 MB. A batch has
    another number of rows at each step, and a mask other widths in each layer; with few numbers of rows there are few
    programs. Quantised layers have kernels of their own for few rows, which take longer for each row.
    """
    return next((size for size in few_rows if n_rows <= size), -(-n_rows // _ROWS) * _ROWS)


class LiveModel:
    """Generates with a model whose mask changes between any two tokens.

    Args:
        llm: The model, with a `WeightStore` or without; nothing else may apply masks to it meanwhile.

    Raises:
        UnsupportedArchitecture: Its attention has a sliding window.
    """

    def __init__(self, llm: SwitchableLLM) -> None:
        self.llm, self.form = llm, CacheFormat.of(llm)
        quantised = any(isinstance(module, Quantised) for module in llm.model.modules())
        self._kernel_rows = most_rows(llm.device, llm.dtype)
        self._without_program = max(self._kernel_rows, KERNEL_ROWS if quantised else 0)
        self._few_rows = sorted({*range(1, 1 + self._without_program), 16, 32}) if self._without_program else _FEW_ROWS
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
        self._step = RecordedSteps(self._logits_of).run if self.llm.device.type == "cuda" else self._logits_of
        self._steps = [(site, self.llm.layer_of(site)) for site in kept_sites(self.llm.mask)]
        if self._kernel_rows:
            self._few_steps = [(site, layer.with_modules(site.kind, for_few_rows)) for site, layer in self._steps]
            self._few_head = for_few_rows(self.llm.model.lm_head)

    def new_cache(self, capacity_tokens: int) -> SequenceCache:
        """A cache for a sequence that is read with the present mask."""
        return SequenceCache(self.form, self.heads, capacity_tokens)

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
        flat = [token for _cache, tokens in readings for token in tokens]
        positions = [cache.length + place for cache, tokens in readings for place in range(len(tokens))]
        padding = [0] * (padded(len(flat), self._few_rows) - len(flat))
        inputs = torch.tensor([[*flat, *padding], [*positions, *padding]], device=self.llm.device)
        stream = RaggedStream([(cache, len(tokens)) for cache, tokens in readings], inputs[1], self.heads)
        if stream.step is None:
            last = [end - 1 for end in accumulate(len(tokens) for _cache, tokens in readings)]
            rows = [*last, *last[-1:] * (padded(len(last), self._few_rows) - len(last))]
            logits = self._logits(self._forward(inputs, stream)[0, rows])
        else:
            logits = self._step(inputs, stream)
        for cache, tokens in readings:
            cache.length += len(tokens)
        return logits[: len(readings)]

    def _forward(self, inputs: torch.Tensor, stream: RaggedStream) -> torch.Tensor:
        """Tokens and positions [2, N] -> the residual stream behind the last site [1, N, H]."""
        unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.llm.device)  # upstream would build a mask
        hidden, context = self.llm.open_stream(inputs[:1], position_ids=inputs[1:], attention_mask=unmasked)
        context = context | {"attention_mask": stream}
        for site, layer in self._few_steps if inputs.shape[1] <= self._kernel_rows else self._steps:
            if site.kind == ATTENTION:
                stream.layer, stream.heads = site.layer, self.heads[site.layer]
            hidden = layer.run(site.kind, hidden, context)
        return hidden

    def _logits_of(self, inputs: torch.Tensor, stream: RaggedStream) -> torch.Tensor:
        """Logits [N, V] of one token of each sequence."""
        return self._logits(self._forward(inputs, stream)[0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self._few_head if len(hidden) <= self._kernel_rows else self.llm.model.lm_head
        return product(head, self.llm.final_norm(hidden))

    def warm_up(self, read_tokens: int, masks: Sequence[PruningMask], longest_tokens: int) -> None:
        """Reads once in every number of rows that will come for which libraries make a program.

        What reading leaves behind in the C library's allocator is given back, and then left behind once more: it is
        there whatever is measured afterwards.

        Args:
            read_tokens: Tokens that are read at once at most.
            masks: With all widths of sites that will be run; the mask that is applied stays.
            longest_tokens: Of a sequence; attention over many tokens leaves more behind.
        """
        before = self.llm.mask
        for mask in masks:
            self._read_all_rows(mask, read_tokens, longest_tokens)
        trim_freed_memory()
        self._read_all_rows(masks[-1] if masks else before, read_tokens, longest_tokens)
        self.switch(before)
        for n_sequences in self._few_rows[max(0, self._without_program - 1) :]:
            self.read([(self.new_cache(1), [0]) for _ in range(n_sequences)])

    def _read_all_rows(self, mask: PruningMask, read_tokens: int, longest_tokens: int) -> None:
        self.switch(mask)
        with_program = range(max(1, self._without_program), read_tokens + 1)
        for n_tokens in sorted({1, *(padded(n, self._few_rows) for n in with_program)}):
            self.read([(self.new_cache(n_tokens), [0] * n_tokens)])
        cache, n_tokens = self.new_cache(longest_tokens), min(read_tokens, longest_tokens)
        cache.length = longest_tokens - n_tokens  # as if so many had been read
        self.read([(cache, [0] * n_tokens)])
