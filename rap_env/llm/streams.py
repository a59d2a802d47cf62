"""The residual stream of several sequences or token trees, cut into parts that do not depend on each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rap_env.llm.lanes import cut, n_lanes
from rap_env.llm.packing import Packing
from rap_env.mask import PruningMask

Stream = tuple[torch.Tensor, Mapping[str, Any]]  # hidden states, and upstream's keyword arguments to a layer


def cut_stream(hidden: torch.Tensor, context: Mapping[str, Any]) -> list[Stream]:
    """Cuts a stream into lanes: by sequences [B, T, H], or by trees where it is packed [1, N, H].

    Entries of the context that belong to all sequences alike are not copied.
    """
    lanes = n_lanes(hidden.shape[0] * hidden.shape[1], hidden.device)
    packing = context.get("attention_mask")
    if lanes == 1 or context.get("past_key_values") is not None:
        return [(hidden, context)]
    if isinstance(packing, Packing):
        return [
            (hidden[:, tokens], _entries(context, 1, tokens) | {"attention_mask": part})
            for tokens, part in packing.cut(lanes)
        ]
    return [(hidden[rows], _entries(context, 0, rows)) for rows in cut([1] * len(hidden), lanes)]


def join_streams(parts: Sequence[torch.Tensor], context: Mapping[str, Any]) -> torch.Tensor:
    """Puts the parts of `cut_stream` together again."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=1 if isinstance(context.get("attention_mask"), Packing) else 0)


def context_of(context: Mapping[str, Any], packing: Packing, n_rows: int) -> dict[str, Any]:
    """The context of a packed stream.

    Args:
        context: Of one sequence with at least as many positions.
        packing: Of the stream.
        n_rows: Of the stream; those behind the last tree, which belong to nobody, get some position.
    """
    positions = nn.functional.pad(packing.positions, (0, n_rows - packing.end))
    return _entries(context, 1, positions) | {"attention_mask": packing}


def _entries(context: Mapping[str, Any], dim: int, part: slice | torch.Tensor) -> dict[str, Any]:
    return {name: _of_part(value, dim, part) for name, value in context.items()}


def _of_part(value: Any, dim: int, part: slice | torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_of_part(entry, dim, part) for entry in value)
    if not isinstance(value, torch.Tensor) or value.shape[dim] == 1:
        return value
    return value[part] if dim == 0 else value[:, part]


def parting(masks: Sequence[PruningMask], start: int) -> int:
    """The first site from `start` on of which masks keep different parts; the number of sites if there is none."""
    first, *others = (mask.kept_parts for mask in masks)
    differing = (site for site in range(start, len(first)) if any(parts[site] != first[site] for parts in others))
    return next(differing, len(first))
