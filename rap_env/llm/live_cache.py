"""The KV cache of each sequence that is being generated, and its way from one mask to another."""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from rap_env.components import ATTENTION
from rap_env.errors import InvalidWorkload, UnsupportedArchitecture
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.few_rows import attend, most_rows
from rap_env.llm.int8_cache import decoded, encoded, in_int8
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

_FEW_TOKENS, _TOKENS = 32, 64  # rows and keys of attention are so few, or come in multiples of so many

Heads = Mapping[int, tuple[int, ...]]  # numbers of KV heads by layer, ascending
ComingBack = Literal["left out", "from now"]


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values of a model are kept.

    Attributes:
        n_heads: KV heads of a whole attention.
        head_bytes: What a token's key, or its value, of one head takes.
        dtype: Type of the activations.
        int8: Whether keys and values are kept in INT8, each with a scale (`rap_env.llm.int8_cache`).
        device: Where they are.
    """

    n_heads: int
    head_bytes: int
    dtype: torch.dtype
    int8: bool
    device: torch.device

    @classmethod
    def of(cls, llm: SwitchableLLM) -> "CacheFormat":
        """That of a model.

        Raises:
            UnsupportedArchitecture: Its attention looks back over fewer tokens than its context has.
        """
        window, shape = llm.shape.attention_window, llm.shape
        if window is not None and window < shape.context_tokens:
            raise UnsupportedArchitecture(
                f"expected an attention over all of the {shape.context_tokens:,} tokens of the context; that of"
                f" {llm.name} looks back over {window:,}"
            )
        module = decoder_layers(llm.model)[0].module.self_attn
        int8, channels = in_int8(module), module.head_dim
        head_bytes = channels + llm.dtype.itemsize if int8 else channels * llm.dtype.itemsize
        return cls(shape.kv_channels // channels, head_bytes, llm.dtype, int8, llm.device)

    def heads_of(self, mask: PruningMask) -> dict[int, tuple[int, ...]]:
        """The KV heads that a mask keeps, by layer."""
        kept = {}
        for site, bits in mask.kept_parts:
            if site.kind == ATTENTION and any(bits):
                bits = bits * self.n_heads if len(bits) == 1 else bits
                kept[site.layer] = tuple(head for head, bit in enumerate(bits) if bit)
        return kept

    def empty(self, n_heads: int, n_tokens: int) -> torch.Tensor:
        """Room for keys and values [2, h, T, ...] of so many heads and tokens; it takes memory as it is written to."""
        dtype = torch.int8 if self.int8 else self.dtype
        shape = 2, n_heads, n_tokens, self.head_bytes // dtype.itemsize
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        # Pages of their own, which leave the process with the tensor, whatever the C library keeps for later.
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    def encoded(self, states: torch.Tensor) -> torch.Tensor:
        return encoded(states) if self.int8 else states

    def decoded(self, states: torch.Tensor) -> torch.Tensor:
        return decoded(states, self.dtype) if self.int8 else states


@dataclass
class _Layer:
    """Keys and values of one layer.

    Attributes:
        heads: Numbers of the KV heads, ascending.
        starts: Position of the first token that each of them has read.
        states: Keys and values [2, h, T, ...].
    """

    heads: tuple[int, ...]
    starts: tuple[int, ...]
    states: torch.Tensor


class SequenceCache:
    """Keys and values of one sequence, for so many tokens as it may come to have.

    Args:
        form: How they are kept.
        heads: The KV heads that the mask keeps which the sequence is read with.
        capacity_tokens: Tokens that the sequence may come to have.

    Attributes:
        form: How they are kept.
        length: Tokens that were read.
        switches: How often its heads were changed.
    """

    def __init__(self, form: CacheFormat, heads: Heads, capacity_tokens: int) -> None:
        self.capacity_tokens, self.length, self.switches, self.form = capacity_tokens, 0, 0, form
        self._layers = {
            index: _Layer(own, (0,) * len(own), form.empty(len(own), capacity_tokens)) for index, own in heads.items()
        }

    @property
    def nbytes(self) -> int:
        """What it takes once all tokens are read."""
        return sum(layer.states.nbytes for layer in self._layers.values())

    @property
    def written_bytes(self) -> int:
        """What it takes now."""
        return self.nbytes * self.length // self.capacity_tokens

    def lacks(self, heads: Heads) -> bool:
        """Whether it misses any of some KV heads, or what one of them read before it was dropped."""
        for index, wanted in heads.items():
            own = self._layers.get(index)
            if own is None or any(own.starts) or not set(wanted) <= set(own.heads):
                return True
        return False

    def has_just(self, heads: Heads) -> bool:
        """Whether it has these KV heads and no others, each with all tokens."""
        have = {index: layer.heads for index, layer in self._layers.items()}
        return have == heads and not any(any(layer.starts) for layer in self._layers.values())

    def states(self, index: int) -> torch.Tensor:
        """Keys and values of a layer [2, h, capacity, ...]."""
        return self._layers[index].states

    def switch(self, heads: Heads, coming_back: ComingBack = "left out") -> None:
        """Lets go of the heads that another mask drops, at once, and of nothing else.

        A head that comes back has not read the tokens so far. Either it is left out: for this sequence it stays
        dropped. Or it attends to the tokens from now on. A sequence that is to attend to everything has to be read
        again, into a new cache.

        Args:
            heads: The KV heads that the other mask keeps.
            coming_back: What becomes of heads that the sequence does not have.
        """
        known, self._layers = self._layers, {}
        self.switches += 1
        for index, wanted in heads.items():
            before = known.pop(index, None)
            had = () if before is None else before.heads
            chosen = tuple(head for head in wanted if head in had) if coming_back == "left out" else wanted
            if before is not None and chosen == had:
                self._layers[index] = before
            elif chosen:
                self._layers[index] = self._carried(before, chosen)

    def _carried(self, before: _Layer | None, heads: tuple[int, ...]) -> _Layer:
        states = self.form.empty(len(heads), self.capacity_tokens)
        starts = [self.length] * len(heads)
        for place, head in enumerate(heads):
            if before is not None and head in before.heads:
                old = before.heads.index(head)
                starts[place] = before.starts[old]
                states[:, place, : self.length] = before.states[:, old, : self.length]
        return _Layer(heads, tuple(starts), states)

    def attend(
        self,
        index: int,
        heads: tuple[int, ...],
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float | None,
    ) -> torch.Tensor:
        """Writes the keys and values of n new tokens, and attends from them to all; see `RaggedStream.attend`.

        Args:
            index: Of the layer.
            heads: The KV heads that the layer runs with; those that the sequence does not have give zeros.
            states: Queries [hq, n, D], keys and values [h, n, D] of these heads.
            scale: Of the scores.

        Returns:
            What each query head read [n, hq, D].
        """
        query, key, value = states
        own, end = self._layers.get(index), self.length + query.shape[1]
        if own is None:
            return query.new_zeros(query.shape).transpose(0, 1)
        places = [heads.index(head) for head in own.heads]
        grouped = query.unflatten(0, (len(heads), -1))
        if whole := len(places) == len(heads):
            chosen = grouped
        else:
            chosen, key, value = grouped[places], key[places], value[places]
        own.states[:, :, self.length : end] = self.form.encoded(torch.stack((key, value)))
        attended = self._read(own, chosen.flatten(0, 1), end, scale)
        if not whole:
            everything = torch.zeros_like(grouped)
            everything[places] = attended.unflatten(0, (len(places), -1))
            attended = everything.flatten(0, 1)
        return attended.transpose(0, 1)

    def _read(self, own: _Layer, query: torch.Tensor, end: int, scale: float | None) -> torch.Tensor:
        """What n new tokens [hq, n, D] read of all keys and values so far; the same shape."""
        n_new = query.shape[1]
        if n_new == 1 and not any(own.starts) and most_rows(query.device, query.dtype):
            return attend(query[None, :, 0], [(own.states, self.length)], None, scale)[0, :, None]
        # As with the rows of matrix products, few shapes mean few programs; keys behind the end are nobody's to see.
        fill = _FEW_TOKENS if end <= _FEW_TOKENS else _TOKENS
        n_rows, n_keys = (1, end) if n_new == 1 else (filled(n_new, fill), min(filled(end, fill), self.capacity_tokens))
        keys, values = self.form.decoded(own.states[:, :, :n_keys])
        return functional.scaled_dot_product_attention(
            functional.pad(query, (0, 0, 0, n_rows - n_new))[None],
            keys[None],
            values[None],
            attn_mask=self._visible(own.starts, n_rows, n_keys, len(query) // len(own.heads)),
            is_causal=n_new > 1 and self.length == 0,
            scale=scale,
            enable_gqa=True,
        )[0, :, :n_new]

    def _visible(self, starts: tuple[int, ...], n_rows: int, n_keys: int, group: int) -> torch.Tensor | None:
        """Which tokens each query head of new tokens may see [1, hq or 1, rows, T]; None where causality is all."""
        if self.length == 0 or (n_rows == 1 and not any(starts)):
            return None
        keys = torch.arange(n_keys, device=self.form.device)
        seen = keys <= torch.arange(self.length, self.length + n_rows, device=self.form.device)[:, None]
        if any(starts):
            beginning = torch.tensor(starts, device=self.form.device).repeat_interleave(group)
            seen = seen & (keys >= beginning[:, None, None])
        return seen.expand(1, -1, -1, -1) if seen.ndim == 3 else seen[None, None]

    def check_room(self, n_tokens: int) -> None:
        """Refuses more tokens than there is room for.

        Raises:
            InvalidWorkload: There is not.
        """
        if self.length + n_tokens > self.capacity_tokens:
            raise InvalidWorkload(
                f"expected at most {self.capacity_tokens} tokens of the sequence; got {self.length + n_tokens}"
            )


def filled(n_tokens: int, fill: int = _TOKENS) -> int:
    """The next multiple of `fill`."""
    return -(-n_tokens // fill) * fill
