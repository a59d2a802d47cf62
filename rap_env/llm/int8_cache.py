"""A KV cache in INT8: every token's key and value of each head as whole numbers, with a scale of their own.

Attention reads dequantised keys and values wherever it reads any: from the cache, of the prompt that it is reading just
now, and where there is no cache at all, as when losses or choices are scored. So what is evaluated is the model that
generates.

Shapes: B sequences, h KV heads, T tokens, D channels of a head, S bytes of a scale, which has the model's type.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from rap_env.errors import UnsupportedArchitecture


def encoded(states: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, h, T, D] as INT8 [B, h, T, D + S]: D numbers and the bytes of their scale."""
    exact = states.float()
    scales = (exact.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(states.dtype).tiny).to(states.dtype)
    numbers = (exact / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([numbers, scales.view(torch.int8)], -1)


def decoded(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `encoded` made of keys or values of a type, rounded: [B, h, T, D + S] -> [B, h, T, D]."""
    size = codes.shape[-1] - dtype.itemsize
    scales = codes[..., size:].clone(memory_format=torch.contiguous_format)  # a view may begin anywhere
    return codes[..., :size] * scales.view(dtype)


def cached_bytes(attention: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that one token of an attention takes in the KV cache, keys and values of all heads.

    Args:
        attention: The upstream module.
        dtype: Type of the model's activations.
    """
    channels = attention.k_proj.out_features
    if not in_int8(attention):
        return 2 * channels * dtype.itemsize
    return 2 * (channels + channels // attention.head_dim * dtype.itemsize)


class _Int8Layer:
    """Turns a layer of transformers' cache into one that holds codes: it concatenates and cuts tokens, whatever they
    hold."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Adds tokens, and returns all keys and values that attention looks back on, dequantised."""
        keys, values = super().update(encoded(key_states), encoded(value_states), *args, **kwargs)
        return decoded(keys, key_states.dtype), decoded(values, value_states.dtype)


class Int8DynamicLayer(_Int8Layer, DynamicLayer):
    """Codes of all tokens."""


class Int8SlidingWindowLayer(_Int8Layer, DynamicSlidingWindowLayer):
    """Codes of the tokens in a sliding window."""


_INT8_LAYERS = {DynamicLayer: Int8DynamicLayer, DynamicSlidingWindowLayer: Int8SlidingWindowLayer}


class _NoCache:
    """Stands in for a cache where there is none: what is read is what a cache would give back."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any):
        return tuple(decoded(encoded(states), states.dtype) for states in (key_states, value_states))


def cache_in_int8(attention: nn.Module) -> None:
    """Makes an attention store and read INT8, by a hook; whatever generates finds its own cache's layers turned.

    Args:
        attention: The upstream module. Its copies, such as those with some of its heads, do the same.
    """
    if not in_int8(attention):
        attention.register_forward_pre_hook(_with_int8_layer, with_kwargs=True)
        attention.kv_cache = "int8"


def in_int8(attention: nn.Module) -> bool:
    """Whether `cache_in_int8` was called on an attention."""
    return getattr(attention, "kv_cache", None) == "int8"


def only_hooked_by_int8(attention: nn.Module) -> bool:
    """Whether nobody but `cache_in_int8` wants to see an attention's calls."""
    return in_int8(attention) and len(attention._forward_pre_hooks) == 1 and not attention._forward_hooks


def _with_int8_layer(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cache: Cache | None = kwargs.get("past_key_values")
    if cache is None:
        encodes = getattr(kwargs.get("attention_mask"), "encodes", False)  # a `PackedStream` with caches of its own
        return args, kwargs if encodes else kwargs | {"past_key_values": _NoCache()}
    while len(cache.layers) <= attention.layer_idx and cache.layer_class_to_replicate in _INT8_LAYERS:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[attention.layer_idx]
    if type(layer) in _INT8_LAYERS and not layer.is_initialized:
        turned = cache.layers[attention.layer_idx] = object.__new__(_INT8_LAYERS[type(layer)])
        vars(turned).update(vars(layer))  # whatever upstream has set in it, such as the window
    elif not isinstance(layer, _Int8Layer):
        raise UnsupportedArchitecture(
            f"expected a dynamic KV cache, new or in INT8; got one whose layer {attention.layer_idx} is a"
            f" {type(layer).__name__}{' with tokens in it' if layer.is_initialized else ''}"
        )
    return args, kwargs
