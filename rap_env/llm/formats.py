"""Number formats: turns a loaded model into one whose weights, or whose KV cache, are INT8 or INT4, in place."""

import functools
from collections.abc import Callable

from torch import nn

from rap_env.errors import UnsupportedArchitecture, check_known
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.int4 import Int4Linear, check_int4
from rap_env.llm.int8_cache import cache_in_int8
from rap_env.llm.quantised import Int8Embedding, Int8Linear

_GROUPS = {"int4": 64, "int4g32": 32}  # inputs that share a scale; 576, SmolLM2's width, is no multiple of 128
WEIGHTS = ("full", "int8", *_GROUPS)
KV_CACHES = ("full", "int8")


def quantise(model: nn.Module, weights: str = "full", kv_cache: str = "full") -> nn.Module:
    """Quantises a model in place, by its weights alone, without any text, and returns it; what it had is released.

    What changes are the matrices of all attentions and MLPs, the embedding and the head; both of the latter become INT8
    and share one matrix where they were tied. Norms, biases and learned positions stay. The number format of all else,
    activations included, stays the model's. A `SwitchableLLM` that was made of the model before is not to be used
    any more: make it anew.

    Args:
        model: A causal LM, on any device; on the meta device only the sizes are real.
        weights: `"full"`, as they were loaded; `"int8"`, a symmetric scale for each output; `"int4"`, a scale and a
            zero point for each output and 64 inputs; or `"int4g32"`, the same for each 32 inputs.
        kv_cache: `"full"`, or `"int8"`: a scale for each token and head; see `cache_in_int8`.

    Raises:
        UnknownName: There is no such format, or the architecture table does not know the model's family.
        UnsupportedArchitecture: A matrix can't be INT4, has another form than a linear layer, or is quantised already.
    """
    check_known("format of weights", weights, WEIGHTS)
    check_known("format of the KV cache", kv_cache, KV_CACHES)
    layers = [layer.module for layer in decoder_layers(model)]
    if weights != "full":
        if not isinstance(model.lm_head, nn.Linear):
            raise UnsupportedArchitecture(f"expected weights as they were loaded to make {weights}; got quantised ones")
        linears = [
            (f"layer{index}.{name}", linear)
            for index, layer in enumerate(layers)
            for name, linear in layer.named_modules()
            if isinstance(linear, nn.Linear)
        ]
        if (group := _GROUPS.get(weights)) is not None:
            for name, linear in linears:  # all before the first is changed
                check_int4(name, linear.weight, group)
        quantised = Int8Linear if group is None else functools.partial(Int4Linear, group=group)
        for layer in layers:
            _quantise_linears(layer, quantised)
        _quantise_vocabulary(model)
    if kv_cache == "int8":
        for layer in layers:
            cache_in_int8(layer.self_attn)
    return model


def _quantise_linears(layer: nn.Module, quantised: Callable[..., nn.Module]) -> None:
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, quantised(child.weight, bias))
    for name, weight in layer.named_parameters():
        if weight.ndim > 1 and weight.is_floating_point() and not name.endswith("scales"):
            raise UnsupportedArchitecture(f"expected matrices in linear layers, which can be quantised; got {name}")


def _quantise_vocabulary(model: nn.Module) -> None:
    embedding, head = model.get_input_embeddings(), model.lm_head
    rows = Int8Embedding(embedding.weight)
    tied = head.weight is embedding.weight
    model.set_input_embeddings(rows)
    model.lm_head = Int8Linear(rows.weight, head.bias, rows.scales) if tied else Int8Linear(head.weight, head.bias)
    if tied:  # one tensor, counted and moved once
        model.lm_head.weight, model.lm_head.scales = rows.weight, rows.scales
