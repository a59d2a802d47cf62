"""Token trees laid end to end: many requests in one stream, no padding, contexts shared by branches."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from transformers import AttentionInterface

from rap_env.llm.attention import attention
from rap_env.llm.lanes import cut

PACKED_ATTENTION = "rap_packed"


@dataclass(frozen=True)
class TokenTree:
    """A context and the continuations that follow it, each read as if it were the only one."""

    context: tuple[int, ...]  # at least one token
    branches: tuple[tuple[int, ...], ...] = ()  # at least one token each

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.branches))

    @property
    def tokens(self) -> list[int]:
        """The context, then the branches."""
        return [*self.context, *(token for branch in self.branches for token in branch)]

    @property
    def positions(self) -> list[int]:
        """Each token's position in its sequence; every branch goes on where the context ends."""
        start = len(self.context)
        return [*range(start), *(start + offset for branch in self.branches for offset in range(len(branch)))]

    @property
    def segments(self) -> list[int]:
        """0 for the context's tokens, 1, 2, ... for those of the branches."""
        return [0] * len(self.context) + [index for index, branch in enumerate(self.branches, 1) for _token in branch]


@dataclass(frozen=True)
class _Bucket:
    """B trees of T tokens each that lie side by side, so that attention sees them as a batch of equal sequences."""

    tokens: slice  # where they lie in the stream
    trees: int  # B
    # Which token may attend to which [B or 1, 1, T, P + T], first the P of the prefix; None: to all up to itself.
    visible: torch.Tensor | None


class PackedStream(ABC):
    """Sequences that lie end to end in one stream: everything but attention runs over it as it is.

    Attributes:
        encodes: Whether `attend` itself brings keys and values into the KV cache's number format.
    """

    encodes = False

    @abstractmethod
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Within sequences, [1, heads, N, size] -> [1, N, heads, size]; keys and values may have fewer heads."""


class Packing(PackedStream):
    """Trees in one stream of N tokens, ordered by length.

    Norms, projections and MLPs run over the stream as it is; attention runs over groups of trees of equal length, as
    views of the stream. So no token is padding, and none sees another tree.

    Args:
        trees: What to pack, in order of length.
        device: Where the model is.
        window: Tokens that attention looks back, the own one included; None for all.
        prefix: Tokens in front of every tree, which are in a stream of their own; None for none.

    A stream may have rows behind the last tree, which belong to nobody and attend to nothing.
    """

    def __init__(
        self,
        trees: Sequence[TokenTree],
        device: torch.device,
        window: int | None = None,
        prefix: "SharedPrefix | None" = None,
    ) -> None:
        first = 0 if prefix is None else len(prefix.tokens)
        tokens = [token for tree in trees for token in tree.tokens]
        positions = [first + place for tree in trees for place in tree.positions]
        self.tokens = torch.tensor(tokens, device=device)
        self.positions = torch.tensor(positions, device=device)
        *self.starts, self.end = accumulate(map(len, trees), initial=0)
        self._trees, self._device, self._window, self._prefix = trees, device, window, prefix
        self._cuts: dict[int, list[tuple[slice, Packing]]] = {}

    def cut(self, n_parts: int) -> list[tuple[slice, "Packing"]]:
        """At most so many parts of about equal length, each with the tokens of the stream that it stands for."""
        if n_parts not in self._cuts:
            self._cuts[n_parts] = self._runs(cut([len(tree) for tree in self._trees], n_parts))
        return self._cuts[n_parts]

    def chunks(self, most_tokens: int, step: int = 1) -> list[tuple[slice, "Packing"]]:
        """Parts of at most so many tokens, as `cut` returns them; a longer tree is a part of its own.

        Args:
            most_tokens: Of a part's trees.
            step: Each part's slice has a multiple of so many rows: it reaches into what follows, up to `step - 1` rows
                behind the last tree.
        """
        bounds, tokens = [0], 0
        for index, tree in enumerate(self._trees):
            if tokens and tokens + len(tree) > most_tokens:
                bounds.append(index)
                tokens = 0
            tokens += len(tree)
        runs = self._runs([slice(*ends) for ends in pairwise([*bounds, len(self._trees)])])
        return [(slice(own.start, own.stop + (own.start - own.stop) % step), part) for own, part in runs]

    def select(self, kept: Sequence[int]) -> "Packing":
        """What is left when trees leave the stream; takes positions of the trees that stay, ascending."""
        return self._packed([self._trees[tree] for tree in kept])

    def _runs(self, runs: Sequence[slice]) -> list[tuple[slice, "Packing"]]:
        bounds = [*self.starts, self.end]
        return [(slice(bounds[run.start], bounds[run.stop]), self._packed(self._trees[run])) for run in runs]

    def _packed(self, trees: Sequence[TokenTree]) -> "Packing":
        return Packing(trees, self._device, self._window, self._prefix)

    @functools.cached_property
    def _buckets(self) -> list[_Bucket]:
        buckets, start = [], 0
        for length, group in groupby(self._trees, key=len):
            equal = list(group)
            tokens = slice(start, start := start + length * len(equal))
            buckets.append(_Bucket(tokens, len(equal), self._visible(equal)))
        return buckets

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention within trees, and to the prefix; takes and returns what `PackedStream` says.

        Rows behind the last tree get zeros.
        """
        outputs = []
        for bucket in self._buckets:
            parts = [  # [B, heads, T, size], views of the stream
                tensor[0, :, bucket.tokens].unflatten(1, (bucket.trees, -1)).transpose(0, 1)
                for tensor in (query, key, value)
            ]
            if self._prefix is not None:
                parts[1:] = self._prefix.in_front_of(*parts[1:])
            outputs.append(attention(*parts, scale, bucket.visible).flatten(0, 1))
        if behind := query.shape[2] - self.end:
            outputs.append(query.new_zeros(behind, *outputs[0].shape[1:]))
        return torch.cat(outputs)[None]

    def _visible(self, trees: list[TokenTree]) -> torch.Tensor | None:
        length, window, plain = len(trees[0]), self._window, not any(tree.branches for tree in trees)
        first = 0 if self._prefix is None else len(self._prefix.tokens)
        if plain and (window is None or first + length <= window):
            return None
        shown = trees[:1] if plain else trees  # plain sequences of one length are alike
        segments = torch.tensor([tree.segments for tree in shown])
        positions = torch.tensor([tree.positions for tree in shown])
        back = positions[:, :, None] - positions[:, None, :]
        same_or_context = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        visible = same_or_context & (back >= 0)
        if first:  # all of it is seen
            to_prefix = first + positions[:, :, None] - torch.arange(first)
            back = torch.cat([to_prefix, back], 2)
            visible = torch.cat([torch.ones_like(to_prefix, dtype=torch.bool), visible], 2)
        if window is not None:
            visible &= back < window
        return visible[:, None].to(self._device)


class SharedPrefix(Packing):
    """Tokens that stand in front of all trees of other packings; a layer reads them once, before it reads those.

    Args:
        tokens: At least one.
        device: Where the model is.
        window: As in `Packing`.
    """

    def __init__(self, tokens: Sequence[int], device: torch.device, window: int | None = None) -> None:
        super().__init__([TokenTree(tuple(tokens))], device, window)
        self._read: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values [1, heads, P, size]

    def cut(self, n_parts: int) -> list[tuple[slice, Packing]]:
        """Itself: one sequence is one part."""
        return [(slice(0, len(self.tokens)), self)]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """As `Packing.attend`; remembers the layer's keys and values for the packings behind it."""
        self._read = key, value
        return super().attend(query, key, value, scale)

    def in_front_of(self, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values [B, heads, T, size] with its own in front of them, [B, heads, P + T, size]."""
        assert self._read is not None, "the layer has to read the prefix first"
        behind = zip(self._read, (key, value), strict=True)
        return [torch.cat([own.expand(len(other), -1, -1, -1), other], 2) for own, other in behind]


def _packed_attention(module, query, key, value, attention_mask: PackedStream, scaling=None, **_context):
    return attention_mask.attend(query, key, value, scaling), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
