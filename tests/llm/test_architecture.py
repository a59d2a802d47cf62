"""The table of families: what is known, what is refused, and that a layer is the sum of its two residual functions."""

import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rap_env.components import KINDS, Site
from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.llm.architecture import ARCHITECTURES, architecture_of, decoder_layers
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.shape import ModelShape
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rng import isolated_rng

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(family):
    return build_tiny_llm(family)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(1))


def test_the_families_named_in_the_readme_are_supported():
    assert set(ARCHITECTURES) == {"llama", "mistral", "qwen2", "qwen3", "opt"}


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "qwen4", "smollm3"])
def test_an_unknown_family_is_refused_with_what_is_known_and_no_close_name_to_edit_it_to(model_type):
    config = AutoConfig.for_model("gpt2")
    config.model_type = model_type
    message = f"^unknown model architecture '{model_type}'; known: llama, mistral, opt, qwen2, qwen3$"
    for read in (architecture_of, ModelShape.from_config):
        with pytest.raises(UnknownName, match=message) as refusal:
            read(config)
    assert isinstance(refusal.value, KeyError) and str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


@pytest.mark.parametrize("option", [{"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}])
def test_an_opt_with_norms_after_its_sub_blocks_is_refused(option):
    config = AutoConfig.for_model("opt", ffn_dim=32, word_embed_proj_dim=16, **SIZES, **option)
    with pytest.raises(UnsupportedArchitecture, match="expected norms before the sub-blocks"):
        ModelShape.from_config(config)


def test_an_opt_with_projected_embeddings_is_refused():
    config = AutoConfig.for_model("opt", ffn_dim=32, word_embed_proj_dim=8, **SIZES)
    with pytest.raises(UnsupportedArchitecture, match=r"embeddings of the hidden size 16; .* projects them from 8"):
        SwitchableLLM(AutoModelForCausalLM.from_config(config), None, "opt")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_input_are_refused(rope_type, key):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    config = AutoConfig.for_model("llama", intermediate_size=16, max_position_embeddings=256, **SIZES, **{key: rope})
    assert config.rope_parameters["rope_type"] == rope_type
    with pytest.raises(UnsupportedArchitecture, match=f"do not depend on the input .*; got rope_type '{rope_type}'$"):
        ModelShape.from_config(config)


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("rope_type", ROPES)
@torch.inference_mode()
def test_a_result_does_not_depend_on_longer_sequences_before_it(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | ROPES[rope_type]
    sizes = {"intermediate_size": 16, "max_position_embeddings": 128, "rope_parameters": rope}
    llm = build_random_llm("llama", {**SIZES, **sizes, "vocab_size": 257})
    short, long = torch.arange(32)[None], torch.arange(300)[None] % 256
    before = llm.model(short).logits
    llm.model(long)
    assert torch.equal(llm.model(short).logits, before)


def test_a_config_of_quantised_weights_is_refused():
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config = AutoConfig.for_model("llama", intermediate_size=16, **SIZES, **quantised)
    with pytest.raises(UnsupportedArchitecture, match=r"expected plain weights; got quantised ones"):
        ModelShape.from_config(config)


def test_a_mix_of_full_and_sliding_attention_is_refused():
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = AutoConfig.for_model("qwen2", num_key_value_heads=1, intermediate_size=16, **SIZES, **sliding)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    with pytest.raises(UnsupportedArchitecture, match="expected one type of attention in all layers"):
        ModelShape.from_config(config)


def test_the_shape_from_the_config_alone_is_the_shape_of_the_loaded_model(llm):
    assert ModelShape.from_config(llm.model.config, torch.float32) == llm.shape


def test_reading_a_config_leaves_it_and_the_random_streams_alone():
    config = AutoConfig.for_model("llama", intermediate_size=16, **SIZES)
    before, state = config.to_dict(), torch.get_rng_state()
    ModelShape.from_config(config, torch.bfloat16)
    assert config.to_dict() == before and config.dtype is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_row_is_what_its_tensors_take(family, dtype, tokens):
    llm = build_tiny_llm(family, dtype=dtype)
    shape, cache = llm.shape, llm.model(tokens).past_key_values
    for row in shape.components:
        assert row.weight_bytes == sum(p.nbytes for p in llm.parameters_of(row.site)) > 0
        keys_and_values = 0
        if row.site.kind == "attention":
            layer = cache.layers[row.site.layer]
            keys_and_values = layer.keys.nbytes + layer.values.nbytes
        assert row.kv_bytes_per_token * tokens.numel() == keys_and_values
    assert shape.weight_bytes == sum(p.nbytes for p in llm.model.parameters())
    dropped = {id(p) for row in shape.components for p in llm.parameters_of(row.site)}
    assert shape.fixed_bytes == sum(p.nbytes for p in llm.model.parameters() if id(p) not in dropped)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_ties_are_counted_as_the_model_has_them(options):
    llm = build_random_llm("llama", {**SIZES, "intermediate_size": 24, "vocab_size": 257, **options})
    attention = 4 * (4 * 16 * 16 + (4 * 16 if "attention_bias" in options else 0))
    mlp = 4 * (3 * 16 * 24 + (24 + 24 + 16 if "mlp_bias" in options else 0))
    assert [row.weight_bytes for row in llm.shape.components] == [attention, mlp] * 2
    embeddings = 1 if "tie_word_embeddings" in options else 2
    assert llm.shape.fixed_bytes == 4 * (embeddings * 257 * 16 + 5 * 16)


def test_a_shape_comes_back_from_json(llm):
    read = ModelShape.from_dict(json.loads(json.dumps(llm.shape.to_dict())))
    assert read == llm.shape and hash(read) == hash(llm.shape)
    assert read.components is llm.shape.components, "so that masks over both are compared at once"
    assert read != build_tiny_llm(llm.shape.model_type, n_layers=3).shape


def test_components_come_in_the_order_in_which_the_model_runs_them(llm):
    assert [c.name for c in llm.shape.components[:3]] == ["layer0.attention", "layer0.mlp", "layer1.attention"]
    assert llm.shape.sites == tuple(Site(layer, kind) for layer in range(4) for kind in KINDS)
    assert [(c.site, c.part) for c in llm.shape.components] == [(site, None) for site in llm.shape.sites]


EXPECTED = {  # by hand from hidden 32, 4 heads of 8, 2 KV heads (OPT: 4), MLP 64, 257 tokens, 4 layers
    "llama": (2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64, 2 * 257 * 32 + 9 * 32, 16),
    "mistral": (2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64, 2 * 257 * 32 + 9 * 32, 16),
    "qwen2": (2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16, 3 * 32 * 64, 2 * 257 * 32 + 9 * 32, 16),  # biases
    "qwen3": (2 * 32 * 32 + 2 * 32 * 16 + 2 * 8, 3 * 32 * 64, 2 * 257 * 32 + 9 * 32, 16),  # query and key norms
    # Biases everywhere, two numbers a norm channel, a tied head, and 512 + 2 learned positions.
    "opt": (4 * (32 * 32 + 32), 2 * 32 * 64 + 64 + 32, 257 * 32 + 514 * 32 + 9 * 64, 32),
}


def test_sizes_of_each_family_by_hand(family, llm):
    shape = llm.shape
    attention, mlp, fixed, kv_channels = EXPECTED[family]
    assert [c.weight_bytes for c in shape.components] == [4 * attention, 4 * mlp] * 4
    assert [c.kv_bytes_per_token for c in shape.components] == [4 * 2 * kv_channels, 0] * 4
    assert (shape.fixed_bytes, shape.kv_channels) == (4 * fixed, kv_channels)
    assert (shape.model_type, shape.n_layers, shape.hidden_size, shape.intermediate_size) == (family, 4, 32, 64)
    assert (shape.query_channels, shape.vocab_size) == (32, 257)
    assert shape.context_tokens == (512 if family == "opt" else 8192)


def test_running_both_kinds_of_a_layer_is_exactly_upstreams_layer(llm, tokens):
    captured = []
    layer = decoder_layers(llm.model)[1]
    handle = layer.module.register_forward_hook(
        lambda module, args, kwargs, output: captured.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.inference_mode():
        llm.model(tokens, use_cache=False)
        handle.remove()
        (args, context, output) = captured[0]
        hidden = args[0] if args else context.pop("hidden_states")
        ours = layer.run("mlp", layer.run("attention", hidden, context), context)
    assert torch.equal(ours, output[0] if isinstance(output, tuple) else output)


def test_the_tiny_model_is_the_same_for_the_same_seed_only(family, llm, tokens):
    again, other = build_tiny_llm(family), build_tiny_llm(family, seed=1)
    assert again.digest == llm.digest != other.digest


def test_tiny_models_take_depth_and_type():
    llm = build_tiny_llm("llama", n_layers=2, dtype="bfloat16")
    assert (llm.shape.n_layers, llm.dtype, llm.shape.bytes_per_parameter) == (2, torch.bfloat16, 2)


def test_the_tiny_tokenizer_reads_and_writes_any_text(llm):
    text = "Grüße, 世界! \n 42"
    ids = llm.tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # one token a byte
    assert llm.tokenizer.decode(ids) == text
    assert llm.tokenizer.eos_token_id == llm.model.config.eos_token_id == 256


def test_building_a_tiny_model_leaves_the_random_streams_alone():
    with isolated_rng(0):
        expected = torch.rand(3)
    with isolated_rng(0):
        build_tiny_llm("llama", n_layers=1)
        assert torch.equal(torch.rand(3), expected)


def test_a_sliding_window_in_all_layers_is_one_type_of_attention():
    config = AutoConfig.for_model("mistral", sliding_window=4, num_key_value_heads=1, intermediate_size=16, **SIZES)
    assert architecture_of(config) is ARCHITECTURES["mistral"]
    assert len(decoder_layers(AutoModelForCausalLM.from_config(config))) == 2


def test_a_mistral_whose_cache_would_keep_more_than_its_masks_show_is_refused():
    layer_types = ["full_attention"] * 2  # transformers' cache follows them, its masks the window alone
    config = AutoConfig.for_model("mistral", sliding_window=4, layer_types=layer_types, intermediate_size=16, **SIZES)
    with pytest.raises(UnsupportedArchitecture, match="transformers caches all tokens and shows 4: correct the config"):
        architecture_of(config)


def test_the_head_reads_a_slice_of_states_as_a_tensor_of_its_own(llm, tokens):
    seen = []
    handle = llm.model.lm_head.register_forward_hook(lambda _head, inputs, _out: seen.append(inputs[0].stride()))
    try:
        with torch.inference_mode():
            whole, last = llm.model(tokens).logits, llm.model(tokens, logits_to_keep=1).logits
    finally:
        handle.remove()
    hidden = llm.model.config.hidden_size
    assert seen[0] == (tokens.shape[1] * hidden, hidden, 1), "as it was"
    assert seen[1] == (hidden, hidden, 1), "of a slice torch would copy the whole matrix for each sequence"
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-5)
