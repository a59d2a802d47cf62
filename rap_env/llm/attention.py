"""Scaled dot-product attention of whole sequences, by the way that is quickest on the device.

Shapes: B sequences of T tokens, h query heads, g KV heads that as many query heads read each, D channels of a head.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from rap_env.llm.widened import widens

_BLOCK_ROWS = 64  # queries of a block
_FILL = 32  # a few queries or keys are filled up to a multiple of it, more of them to whole blocks
_BLOCK_SCORES = 2**19  # that exist at once: they stay in a core's cache


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """What queries read, [B, h, T, D] -> [B, T, h, D].

    PyTorch's kernel multiplies bfloat16 by AMX; where a CPU has other instructions for it, it is slower than batched
    products over blocks of queries, whose scores are rounded to bfloat16. Without any its products are in float32.

    Args:
        query: [B, h, T, D].
        key: [B, g, S, D].
        value: As `key`.
        scale: Of the scores; by default 1 / sqrt(D).
        visible: Which keys each query may see [B or 1, 1, T, S], none behind its own: the last query's is the last key.
            None where each sees all of those. There are at least as many keys as queries.
    """
    in_bfloat16 = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not widens(query)
    if in_bfloat16 and not torch.cpu._is_amx_tile_supported():
        return _in_blocks(query, key, value, scale or query.shape[-1] ** -0.5, visible)
    if visible is None and (before := key.shape[2] - query.shape[2]):  # is_causal takes the first keys for the own ones
        visible = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_(before)[None, None]
    if visible is not None and query.device.type == "cuda":  # no kernel has both a mask and shared heads
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    ).transpose(1, 2)


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visible: torch.Tensor | None
) -> torch.Tensor:
    sequences, heads, n_queries, size = query.shape
    groups, n_keys = key.shape[1:3]
    # oneDNN makes and keeps a program for each shape of a product: few shapes, so rows and keys are filled up.
    more_rows, more_keys = (-n % (_FILL if n <= _BLOCK_ROWS else _BLOCK_ROWS) for n in (n_queries, n_keys))
    query = functional.pad(query * scale, (0, 0, 0, more_rows)).unflatten(1, (groups, -1))
    key, value = (functional.pad(states, (0, 0, 0, more_keys)) for states in (key, value))
    unseen = None
    if visible is not None:
        unseen = query.new_zeros(()).masked_fill(~visible, -torch.inf).unsqueeze(1)
        unseen = functional.pad(functional.pad(unseen, (0, more_keys), value=-torch.inf), (0, 0, 0, more_rows))
    rows = min(n_queries + more_rows, _BLOCK_ROWS)
    later = query.new_full((rows, 2 * rows), -torch.inf).triu_(1)  # those behind a block's own keys are filled up
    read = query.new_empty(sequences, n_queries + more_rows, heads, size)
    for own in power_runs(sequences, _BLOCK_SCORES // (heads * rows * (n_keys + more_keys))):
        keys, values = (states[own].flatten(0, 1) for states in (key, value))
        for start in range(0, n_queries, rows):
            block = slice(start, min(start + rows, n_queries + more_rows))
            n_rows, first, last = block.stop - start, start + n_keys - n_queries, block.stop + n_keys - n_queries
            end = min(last + -last % rows, keys.shape[1])
            queries = query[own, :, :, block].flatten(0, 1).flatten(1, 2)
            scores = torch.bmm(queries, keys[:, :end].contiguous().transpose(1, 2)).view(
                -1, groups, heads // groups, n_rows, end
            )
            if unseen is None:
                scores[..., first:] += later[:n_rows, : end - first]
            else:
                scores += unseen[own if len(unseen) > 1 else slice(1), :, :, block, :end]
            weights = scores.softmax(-1).view(len(keys), -1, end)
            parts = torch.bmm(weights, values[:, :end].contiguous()).view(-1, groups, heads // groups, n_rows, size)
            read[own, block] = parts.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return read[:, :n_queries]


def power_runs(n: int, most: int) -> Iterator[slice]:
    """Cuts so many things into runs of powers of two, of at most `most` unless that is less than one."""
    start = 0
    while start < n:
        length = 1 << (max(1, min(most, n - start)).bit_length() - 1)
        yield slice(start, start := start + length)
