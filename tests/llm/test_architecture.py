"""The table of families: what is known, what is refused, and that a layer is the sum of its two residual functions."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.llm.architecture import ARCHITECTURES, ModelShape, architecture_of, decoder_layers
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import KINDS, Component
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


@pytest.mark.parametrize(
    ("model_type", "hint"), [("bloom", "known: llama, mistral, opt, qwen2, qwen3"), ("qwen4", "did you mean qwen")]
)
def test_an_unknown_family_is_refused_with_what_is_known(model_type, hint):
    config = AutoConfig.for_model("gpt2")
    config.model_type = model_type
    for read in (architecture_of, ModelShape.from_config):
        with pytest.raises(UnknownName, match=f"unknown model architecture '{model_type}'; {hint}"):
            read(config)


@pytest.mark.parametrize("option", [{"do_layer_norm_before": False}, {"_remove_final_layer_norm": True}])
def test_an_opt_with_norms_behind_its_sub_blocks_is_refused(option):
    config = AutoConfig.for_model("opt", ffn_dim=32, word_embed_proj_dim=16, **SIZES, **option)
    with pytest.raises(UnsupportedArchitecture, match="expected norms before the sub-blocks"):
        ModelShape.from_config(config)


def test_a_mix_of_full_and_sliding_attention_is_refused():
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = AutoConfig.for_model("qwen2", num_key_value_heads=1, intermediate_size=16, **SIZES, **sliding)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    with pytest.raises(UnsupportedArchitecture, match="expected one type of attention in all layers"):
        ModelShape.from_config(config)


def test_the_shape_from_the_config_alone_is_the_shape_of_the_loaded_model(llm):
    assert ModelShape.from_config(llm.model.config, torch.float32) == llm.shape


def test_parameters_are_counted_as_the_model_has_them(llm):
    assert llm.shape.n_parameters == sum(p.numel() for p in llm.model.parameters())
    for component in llm.shape.components:
        assert llm.shape.parameters_of(component) == sum(p.numel() for p in llm.parameters_of(component))


def test_components_come_in_the_order_in_which_the_model_runs_them(llm):
    assert [c.name for c in llm.shape.components[:3]] == ["layer0.attention", "layer0.mlp", "layer1.attention"]
    assert llm.shape.components == tuple(Component(layer, kind) for layer in range(4) for kind in KINDS)


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
    sizes = (shape.attention_parameters, shape.mlp_parameters, shape.fixed_parameters, shape.kv_channels)
    assert sizes == EXPECTED[family]
    assert (shape.model_type, shape.n_layers, shape.hidden_size, shape.intermediate_size) == (family, 4, 32, 64)
    assert (shape.query_channels, shape.vocab_size) == (32, 257)
    assert shape.context_tokens == (512 if family == "opt" else 8192)


def test_running_both_kinds_of_a_layer_is_upstreams_layer_to_the_bit(llm, tokens):
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
