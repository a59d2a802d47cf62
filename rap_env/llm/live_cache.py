"""A KV cache across a change of masks: what goes is let go of, what comes back has no past, or reads it again."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from rap_env.errors import InvalidMask, UnsupportedArchitecture
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import ATTENTION, PruningMask


def carried(llm: SwitchableLLM, cache: DynamicCache, before: PruningMask, after: PruningMask) -> DynamicCache:
    """The cache of sequences that were read with one mask, for going on with another one.

    Attentions are renumbered, keys and values of KV heads that both masks keep are taken over, those of dropped ones
    are let go of with the old cache. A head that comes back has no past: it attends to the tokens from now on (in
    batches, from the same position for all sequences), while heads that stayed go on attending to everything. Its past
    takes the memory that it will need, as zeros.

    Args:
        llm: The model; whichever mask is applied.
        cache: Its layers are those of `before`; it is not to be used any more.
        before: The mask that the tokens were read with.
        after: The mask to go on with.

    Raises:
        InvalidMask: The cache has not as many layers as `before` has attentions, or `before` keeps no attention, so
            that there is no cache to go on with.
        UnsupportedArchitecture: A layer of the cache is not one that grows, or a head comes back whose past would have
            to be known within a sliding window.
    """
    heads_before, heads_after = _heads(llm, before), _heads(llm, after)
    layers = [layer for layer in cache.layers if layer.is_initialized]  # upstream makes one for every attention
    if not heads_before or len(layers) != len(heads_before):
        raise InvalidMask(
            f"expected a KV cache of the {len(heads_before)} attentions that the mask keeps, at least one; got one of"
            f" {len(layers)} layers"
        )
    old = dict(zip(heads_before, layers, strict=True))
    carried_on = DynamicCache()
    for index, heads in heads_after.items():
        layer, known = old.get(index, layers[0]), heads_before.get(index, ())
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedArchitecture(f"expected a KV cache that grows; got a layer {type(layer).__name__}")
        new = object.__new__(type(layer))
        vars(new).update(vars(layer))
        places = [known.index(head) if head in known else None for head in heads]
        if None in places and layer.is_sliding:
            raise UnsupportedArchitecture("a head that comes back under a sliding window has to read its past again")
        new.keys, new.values = (_picked(states, places) for states in (layer.keys, layer.values))
        starts = getattr(layer, "starts", [0] * len(known))
        new.starts = [layer.get_seq_length() if place is None else starts[place] for place in places]
        if any(new.starts):
            _watch(llm, index)
        carried_on.layers.append(new)
    return carried_on


@torch.inference_mode()
def read_again(llm: SwitchableLLM, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> DynamicCache:
    """The cache of tokens read from the start with the mask that is applied.

    Args:
        llm: The model.
        tokens: What was read so far [B, T].
        attention_mask: 0 where a sequence is padded, on its left [B, T].
    """
    inputs: dict[str, Any] = {}
    if attention_mask is not None:
        inputs = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    return llm.model(tokens, use_cache=True, logits_to_keep=1, **inputs).past_key_values


def _heads(llm: SwitchableLLM, mask: PruningMask) -> dict[int, tuple[int, ...]]:
    """The KV heads that a mask keeps, by layer."""
    n_heads = llm.shape.kv_channels // decoder_layers(llm.model)[0].module.self_attn.head_dim
    kept = {}
    for site, bits in mask.kept_parts:
        if site.kind == ATTENTION and any(bits):
            whole = len(bits) == 1
            kept[site.layer] = tuple(range(n_heads)) if whole else tuple(i for i, bit in enumerate(bits) if bit)
    return kept


def _picked(states: torch.Tensor, places: list[int | None]) -> torch.Tensor:
    """Keys or values [B, h, T, D] of some heads; zeros where there are none."""
    heads = [torch.zeros_like(states[:, :1]) if place is None else states[:, place : place + 1] for place in places]
    return torch.cat(heads, dim=1)


def _watch(llm: SwitchableLLM, index: int) -> None:
    """Lets a layer's attention see the tokens only that each of its heads has seen."""
    attention = decoder_layers(llm.model)[index].module.self_attn
    if not getattr(attention, "sees_from_start", False):
        attention.register_forward_pre_hook(_from_start, with_kwargs=True)
        attention.sees_from_start = True


def _from_start(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    cache = kwargs.get("past_key_values")
    layers = getattr(cache, "layers", ())
    starts = getattr(layers[attention.layer_idx], "starts", None) if attention.layer_idx < len(layers) else None
    if not starts or not any(starts):
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    n_new = hidden.shape[1]
    n_tokens = layers[attention.layer_idx].get_seq_length() + n_new
    positions = torch.arange(n_tokens, device=hidden.device)
    groups = attention.q_proj.out_features // attention.k_proj.out_features
    starting = torch.tensor(starts, device=hidden.device).repeat_interleave(groups)
    seen = positions >= starting[None, :, None, None]  # [1, query heads, 1, tokens]
    mask = kwargs.get("attention_mask")
    if mask is None:  # upstream leaves it to the attention function, which takes none for one token
        seen = seen & (positions <= positions[-n_new:, None])
    elif mask.dtype == torch.bool:
        seen = seen & mask[..., :n_tokens]
    else:
        seen = mask[..., :n_tokens].masked_fill(~seen, torch.finfo(mask.dtype).min)
    return args, kwargs | {"attention_mask": seen}
