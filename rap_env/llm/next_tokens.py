"""One new token of each of several sequences: the attention of all by one kernel, or by one call."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from rap_env.llm.attention import attention
from rap_env.llm.few_rows import attend, most_rows
from rap_env.llm.live_cache import SequenceCache

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attends_together(device: torch.device, dtype: torch.dtype, whole_step: bool) -> bool:
    """Whether there is such a kernel: ours for CPUs (torch's would have to copy all caches), or a GPU's.

    Args:
        device: Of the model.
        dtype: Of its activations.
        whole_step: Whether nothing else is read meanwhile; with prompts beside, a GPU's was not tried.
    """
    return most_rows(device, dtype) > 0 or (device.type == "cuda" and whole_step)


def attend_together(
    caches: Sequence[SequenceCache],
    index: int,
    states: States,
    positions: torch.Tensor,
    n_keys: int,
    scale: float | None,
) -> torch.Tensor:
    """What `SequenceCache.attend` does, for one new token of each of n sequences that have all heads of a layer.

    Args:
        caches: Of the sequences.
        index: Of the layer.
        states: Queries [hq, n, D], keys and values [h, n, D], a row for each sequence.
        positions: Of the new tokens [n].
        n_keys: Tokens that are looked at where all have to look at as many; those behind a sequence's own are not seen.
        scale: Of the scores.

    Returns:
        What each query head read [n, hq, D].
    """
    query, key, value = states
    query, kept = query.transpose(0, 1), [cache.states(index) for cache in caches]
    new = torch.stack((key, value))  # [2, h, n, D]
    if most_rows(query.device, query.dtype):
        return attend(query, [(own, cache.length) for own, cache in zip(kept, caches, strict=True)], new, scale)
    new = caches[0].form.encoded(new)
    # What is attended to is copied side by side. Nothing depends on a number that a GPU would have to tell, so that its
    # kernels can be recorded.
    for row, own in enumerate(kept):
        own.index_copy_(2, positions[row : row + 1], new[:, :, row : row + 1])
    read = [functional.pad(own[:, :, :n_keys], (0, 0, 0, max(0, n_keys - own.shape[2]))) for own in kept]
    keys, values = caches[0].form.decoded(torch.stack(read)).unbind(1)
    visible = torch.arange(n_keys, device=query.device) <= positions[:, None]
    return attention(query[:, :, None], keys, values, scale, visible[:, None, None])[:, 0]
