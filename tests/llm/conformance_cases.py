"""Members of every family, by what their configs say: those that are run, and those that are refused, with why."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 259}
SIZES |= {"max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": None}
GATED = {**SIZES, "intermediate_size": 44, "num_key_value_heads": 2, "initializer_range": 0.3}


@dataclass(frozen=True)
class Family:
    """What a family's tests need to know; paths are attribute paths in one of its layers."""

    sizes: dict
    attention_output: str = "self_attn.o_proj"  # dropping a site is the same as setting its output to zero
    mlp_output: str = "mlp.down_proj"
    activation: str = "hidden_act"  # the config's key
    rotary: bool = True
    head_size: int | None = None  # one that its config allows beside hidden size / heads
    slides: dict | None = None  # entries that let all layers look back 5 tokens
    options: tuple[dict, ...] = ()  # further entries that make other members


QWEN_SLIDES = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
FAMILIES = {
    "llama": Family(
        GATED,
        head_size=12,
        options=(
            {"attention_bias": True},
            {"mlp_bias": True},
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            {"layer_types": ["full_attention"] * 2, "sliding_window": 5},  # nothing slides: neither cache nor masks
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},  # as older files say it
        ),
    ),
    "mistral": Family(GATED | {"sliding_window": None}, head_size=6, slides={"sliding_window": 5}),
    "qwen2": Family(
        GATED,
        head_size=10,
        slides=QWEN_SLIDES,
        options=(
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
        ),
    ),
    "qwen3": Family(
        GATED | {"head_dim": 8}, head_size=20, slides=QWEN_SLIDES, options=({"attention_bias": True}, {"head_dim": 2})
    ),
    "opt": Family(
        {**SIZES, "ffn_dim": 44, "init_std": 0.3},
        attention_output="self_attn.out_proj",
        mlp_output="fc2",
        activation="activation_function",
        rotary=False,
        options=(
            {"enable_bias": False},
            {"layer_norm_elementwise_affine": False},
            {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
            {"hidden_size": 36, "word_embed_proj_dim": 36},  # heads of 9 channels, which nothing rotates
        ),
    ),
}
ROPES = {  # each type that transformers knows, with what it needs beside theta
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16},
    "proportional": {"partial_rotary_factor": 0.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
}
ROPES_REFUSED = {
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16},
}
TYPES_REFUSED = {
    ("full_attention", "sliding_attention"): "got a mix of full and sliding",
    ("chunked_attention", "chunked_attention"): "full or sliding attention; got layer_types of 'chunked_attention'",
    ("sliding_attention", "sliding_attention"): "a sliding_window for layer_types of 'sliding_attention'; got none",
}


def rope(rope_type: str, **entries) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0, **entries}}


def _members() -> Iterator[tuple[str, dict]]:
    for name, family in FAMILIES.items():
        yield from product(
            [name],
            [
                {},
                {"num_hidden_layers": 1},
                {"vocab_size": 263},
                {family.activation: "gelu"},
                {family.activation: "prelu"},
            ],
        )
        yield from product([name], [{"tie_word_embeddings": tied} for tied in (True, False)])
        yield from product([name], family.options)
        if family.rotary:
            yield from ((name, {"num_key_value_heads": n}) for n in (1, 4))
            yield from ((name, rope(rope_type, **entries)) for rope_type, entries in ROPES.items())
        if family.head_size:
            yield name, {"head_dim": family.head_size}
        if family.slides:
            yield from ((name, family.slides | {"sliding_window": window}) for window in (1, 2, 5, 48))
            yield name, family.slides | rope("yarn", **ROPES["yarn"]) | {"num_key_value_heads": 1}


def _refused_of_rotary() -> Iterator[tuple[dict, str]]:
    yield {"num_key_value_heads": 3}, "equal groups; got 4 attention heads for 3 key-value heads"
    yield {"num_key_value_heads": 8}, "equal groups; got 4 attention heads for 8 key-value heads"
    yield {"head_dim": 3}, "heads of an even size, whose halves rotate; got 3 channels"
    yield {"head_dim": 1}, "heads of an even size, whose halves rotate; got 1 channels"
    yield {"head_dim": 7}, "even"
    yield rope("linear", factor=2.0, partial_rotary_factor=0.5), "got partial_rotary_factor 0.5"
    yield {"partial_rotary_factor": 0.25}, "got partial_rotary_factor 0.25"
    yield rope("linear"), "its config is not valid: .*Missing required keys .*'factor'"
    yield rope("axial"), "got rope_type 'axial'"
    for rope_type, entries in ROPES_REFUSED.items():
        yield rope(rope_type, **entries), f"do not depend on the input .*; got rope_type '{rope_type}'"


def _refused() -> Iterator[tuple[str, dict, str]]:
    for name, family in FAMILIES.items():
        own_types = name.startswith("qwen")  # whose masks follow layer_types
        yield name, {"num_hidden_layers": 0}, "at least one layer; got num_hidden_layers 0"
        yield name, {family.activation: "swiglu"}, f"that transformers knows; got {family.activation} 'swiglu'"
        yield name, {"is_causal": False}, "causal attention; got is_causal false"
        yield name, {"return_dict": False}, "return_dict true"
        for key in ("quantization_config", "compression_config"):
            yield name, {key: {"quant_method": "gptq", "bits": 4}}, rf"got quantised ones \({key}\): dequantise them"
        yield (
            name,
            {"per_layer_config": {1: {"attention_dropout": 0.1}}},
            "layers that are alike; got a per_layer_config",
        )
        yield (
            name,
            {"per_layer_config": {1: {"num_attention_heads": 2}}},
            "may vary across layers|got a per_layer_config",
        )
        yield name, {"attention_chunk_size": 4}, f"got attention_chunk_size, which {name} layers do not have"
        yield name, {"kv_sharing_modes": ["own", "reuse"]}, f"got kv_sharing_modes, which {name} layers do not have"
        for types, message in TYPES_REFUSED.items():  # transformers reads a Mistral of layer_types as another family
            yield name, {"layer_types": types, "sliding_window": None}, f"{message}|unknown model .* 'ministral'"
        yield name, {"num_attention_heads": 0}, "its config is not valid|equal groups; got 0 attention heads"
        if family.slides:
            for window in (0, -1):
                yield name, family.slides | {"sliding_window": window}, f"window of at least 1 token; got {window}"
        else:
            for types in (None, ["sliding_attention"] * 2):
                entries = {"sliding_window": 5, "layer_types": types}
                yield name, entries, "transformers caches 5 tokens and shows all: correct the config"
        if own_types:
            yield name, QWEN_SLIDES | {"max_window_layers": 1}, "got a mix of full and sliding"
            yield (
                name,
                {"rope_parameters": {"full_attention": rope("linear", factor=2.0)["rope_parameters"]}},
                "for all layers",
            )
        if family.rotary:
            yield from ((name, *case) for case in _refused_of_rotary())
    yield "opt", {"word_embed_proj_dim": 16}, "embeddings of the hidden size 32; this OPT model projects them from 16"
    for entries in ({"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}):
        yield "opt", entries, "norms before the sub-blocks"


MEMBERS, REFUSED = list(_members()), list(_refused())
