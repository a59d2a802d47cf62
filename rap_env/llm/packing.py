"""Token trees laid end to end: many requests in one stream, no padding, contexts shared by branches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional
from transformers import AttentionInterface

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
    visible: torch.Tensor | None  # which token may attend to which [B, 1, T, T]; None if all are plain sequences


class PackedStream(ABC):
    """Sequences that lie end to end in one stream: everything but attention runs over it as it is."""

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
    """

    def __init__(self, trees: Sequence[TokenTree], device: torch.device, window: int | None = None) -> None:
        self.tokens = torch.tensor([token for tree in trees for token in tree.tokens], device=device)
        self.positions = torch.tensor([position for tree in trees for position in tree.positions], device=device)
        self._trees, self._device, self._window = trees, device, window
        self._cuts: dict[int, list[tuple[slice, Packing]]] = {}
        self.starts, self._buckets, start = [], [], 0
        for length, group in groupby(trees, key=len):
            equal = list(group)
            tokens = slice(start, start := start + length * len(equal))
            self.starts += range(tokens.start, tokens.stop, length)
            self._buckets.append(_Bucket(tokens, len(equal), _visible(equal, device, window)))

    def cut(self, n_parts: int) -> list[tuple[slice, "Packing"]]:
        """At most so many parts of about equal length, each with the tokens of the stream that it stands for."""
        if n_parts not in self._cuts:
            bounds = [*self.starts, len(self.tokens)]
            self._cuts[n_parts] = [
                (slice(bounds[part.start], bounds[part.stop]), Packing(self._trees[part], self._device, self._window))
                for part in cut([len(tree) for tree in self._trees], n_parts)
            ]
        return self._cuts[n_parts]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention within trees; takes and returns what `PackedStream` says."""
        outputs = []
        for bucket in self._buckets:
            parts = [  # [B, heads, T, size], views of the stream
                tensor[0, :, bucket.tokens].unflatten(1, (bucket.trees, -1)).transpose(0, 1)
                for tensor in (query, key, value)
            ]
            attended = functional.scaled_dot_product_attention(
                *parts, attn_mask=bucket.visible, is_causal=bucket.visible is None, scale=scale, enable_gqa=True
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None]


def _visible(trees: list[TokenTree], device: torch.device, window: int | None) -> torch.Tensor | None:
    length = len(trees[0])
    if not any(tree.branches for tree in trees) and (window is None or length <= window):
        return None
    segments = torch.tensor([tree.segments for tree in trees])
    positions = torch.tensor([tree.positions for tree in trees])
    back = positions[:, :, None] - positions[:, None, :]
    same_or_context = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    visible = same_or_context & (back >= 0)
    if window is not None:
        visible &= back < window
    return visible[:, None].to(device)


def _packed_attention(module, query, key, value, attention_mask: PackedStream, scaling=None, **_context):
    return attention_mask.attend(query, key, value, scaling), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
