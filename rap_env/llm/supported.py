"""Which members of a family can be run: what a config may say, so that what is computed and counted is upstream's."""

from collections.abc import Callable, Iterator

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from rap_env.errors import UnsupportedArchitecture

Window = Callable[[PretrainedConfig], int | None]
# Others follow the longest sequence of each batch.
_FIXED_ROPE = ("default", "linear", "llama3", "proportional", "yarn")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def check_member(config: PretrainedConfig, window: Window) -> None:
    """Refuses what is not a plain pre-norm stack of equal layers of causal attention.

    Args:
        config: The config of a known family.
        window: Tokens that the family's attention masks let a token look back by a config; None for all.

    Raises:
        UnsupportedArchitecture: Layers differ, weights are quantised, upstream can't run what the config says, its
            cache keeps other tokens than its masks show, or a sequence's result depends on the others of its batch.
    """
    for problem in _problems(config, window):
        raise UnsupportedArchitecture(problem)


def _problems(config: PretrainedConfig, window: Window) -> Iterator[str]:
    if config.is_heterogeneous:  # its other entries can't even be read
        yield "expected layers that are alike; got a per_layer_config"
    yield from _stack_problems(config)
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None) is not None:
            yield f"expected plain weights; got quantised ones ({key}): dequantise them"
    for key in ("hidden_act", "activation_function"):
        if (name := getattr(config, key, None)) is not None and name not in ACT2FN:
            yield f"expected an activation that transformers knows; got {key} {name!r}"
    if getattr(config, "is_causal", True) is False:
        yield "expected causal attention; got is_causal false"
    if not config.return_dict:
        yield "expected return_dict true, without which transformers can't run these families; got false"
    yield from _window_problems(config, window(config))
    if getattr(config, "rope_parameters", None):
        yield from _rotary_problems(config, config.rope_parameters)


def _stack_problems(config: PretrainedConfig) -> Iterator[str]:
    if not getattr(config, "do_layer_norm_before", True) or getattr(config, "_remove_final_layer_norm", False):
        yield "expected norms before the sub-blocks; this OPT model has them after"
    embedding_size = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if embedding_size != config.hidden_size:
        yield (
            f"expected embeddings of the hidden size {config.hidden_size}; this OPT model projects them from"
            f" {embedding_size}"
        )
    if config.num_hidden_layers < 1:
        yield f"expected at least one layer; got num_hidden_layers {config.num_hidden_layers}"


def _window_problems(config: PretrainedConfig, window: int | None) -> Iterator[str]:
    layer_types, size = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if unknown := sorted(layer_types - {_FULL, _SLIDING}):
        yield f"expected full or sliding attention; got layer_types of {unknown[0]!r}"
    if len(layer_types) > 1:
        yield "expected one type of attention in all layers; got a mix of full and sliding"
    if layer_types == {_SLIDING} and size is None:
        yield "expected a sliding_window for layer_types of 'sliding_attention'; got none"
    if window is not None and window < 1:
        yield f"expected a sliding_window of at least 1 token; got {window}"
    for key in ("attention_chunk_size", "kv_sharing_modes"):  # upstream's cache follows them in every family
        if getattr(config, key, None) is not None:
            yield f"expected a cache of all layers' own tokens; got {key}, which {config.model_type} layers do not have"
    cached = None if layer_types == {_FULL} else size  # as upstream's cache reads them, whatever the family's masks do
    if cached != window:
        yield (
            f"expected a cache that keeps what attention looks back on; by sliding_window {size} and layer_types of"
            f" {sorted(layer_types) or None} transformers caches {cached or 'all'} tokens and shows {window or 'all'}:"
            " correct the config"
        )


def _rotary_problems(config: PretrainedConfig, rope: dict) -> Iterator[str]:
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        yield f"expected the same rope_parameters for all layers; got those of {nested[0]!r} apart"
    rope_type, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    if rope_type not in _FIXED_ROPE:
        yield (
            f"expected rotary frequencies that do not depend on the input ({', '.join(_FIXED_ROPE)}); got rope_type"
            f" {rope_type!r}"
        )
    if rope_type != "proportional" and share not in (None, 1):
        yield f"expected rotary positions over whole heads; got partial_rotary_factor {share}"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        yield f"expected heads in equal groups; got {heads} attention heads for {kv_heads} key-value heads"
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if size % 2:
        yield f"expected heads of an even size, whose halves rotate; got {size} channels"
