"""DeciLM checkpoints: what their readers' rules make of them, and what they can't hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from rap_env.errors import ExportRefused
from rap_env.export import deci
from rap_env.export.configuration_decilm import AttentionBlock, DeciLMConfig, FeedForwardBlock
from rap_env.export.pruned import PrunedModel
from rap_env.export.save import export_pruned
from rap_env.mask import PruningMask
from tests.export.cases import HELD, MEMBERS, PAIRS, SIZES, cut_llm

TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def exported(llm, tmp_path, *dropped: str):
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    return export_pruned(llm, mask, "deci", tmp_path / "out").folder


@pytest.mark.parametrize("member", HELD)
def test_masks_of_whole_attentions_and_groups_of_channels_are_held(member, tmp_path):
    llm = cut_llm(*HELD[member])
    folder = exported(llm, tmp_path, "layer1.attention", "layer1.mlp.0:16", "layer2.mlp")
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, None, 2]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True]
    assert [block["ffn"]["ffn_mult"] for block in blocks] == [12.0, 12.0, None]  # 3 / 2 * 256 / 32


@pytest.mark.parametrize("member", HELD)
def test_llama_itself_computes_the_masked_logits_from_the_weights(member, tmp_path):
    llm = cut_llm(*HELD[member])
    dropped = [f"layer{index}.mlp.16:40" for index in range(2)]
    folder = exported(llm, tmp_path, *dropped)
    values = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(**{key: value for key, value in values.items() if key not in ("model_type", "block_configs")})
    assert config.intermediate_size == 256 and config.num_key_value_heads == 4
    model, state = LlamaForCausalLM(config).eval(), load_file(folder / "model.safetensors")
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.inference_mode(), llm.pruned(PruningMask.all_kept(llm.shape).drop(*dropped)):
        assert torch.allclose(model(TOKENS).logits, llm.model(TOKENS).logits, atol=2e-5)


def test_added_channels_are_zeros(tmp_path):
    folder = exported(cut_llm(*HELD["llama, biases"]), tmp_path, "layer1.mlp.0:16")
    state = load_file(folder / "model.safetensors")
    mlp = "model.layers.1.mlp"
    assert state[f"{mlp}.gate_proj.weight"].shape == (256, 32) and state[f"{mlp}.down_proj.weight"].shape == (32, 256)
    assert state[f"{mlp}.gate_proj.weight"][:48].any(1).all() and not state[f"{mlp}.gate_proj.weight"][48:].any()
    assert not state[f"{mlp}.up_proj.bias"][48:].any() and not state[f"{mlp}.down_proj.weight"][:, 48:].any()


def test_a_layer_of_which_nothing_is_kept_is_not_there(tmp_path):
    folder = exported(cut_llm("llama", PAIRS), tmp_path, "layer0.attention", "layer0.mlp")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 2


def test_a_model_without_any_mlp_is_held(tmp_path):
    folder = exported(cut_llm("llama", PAIRS), tmp_path, *(f"layer{index}.mlp" for index in range(3)))
    config = json.loads((folder / "config.json").read_text())
    assert all(block["ffn"]["no_op"] for block in config["block_configs"]) and config["intermediate_size"] == 64


def test_readers_that_take_the_config_from_transformers_find_blocks_as_objects(tmp_path):
    folder = exported(cut_llm("llama", PAIRS), tmp_path, "layer1.attention")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert config.block_configs[1].attention.no_op and not config.block_configs[1].ffn.no_op
    assert config.block_configs[0].ffn.intermediate_size == 256 and config.rope_parameters["rope_theta"] == 10000.0
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"]
    assert again == json.loads((folder / "config.json").read_text())["block_configs"]
    assert "intermediate_size" not in again[0]["ffn"]  # some readers refuse what they don't know
    block = DeciLMConfig(hidden_size=32, num_attention_heads=8, block_configs=again).block_configs[0]
    assert block.attention == AttentionBlock(n_heads_in_group=2)
    assert block.ffn == FeedForwardBlock(ffn_mult=12.0, intermediate_size=256)


@pytest.mark.parametrize("hidden_size", [32, 576, 4096, 5120])
@pytest.mark.parametrize("channels", [256, 1536, 11008, 28672])
def test_every_rounding_of_the_multiple_gives_the_width_back(hidden_size, channels):
    multiple = deci._block(deci.KeptLayer(8, 4, channels, {}), hidden_size)["ffn"]["ffn_mult"]
    assert deci._width(multiple, hidden_size) == channels
    assert deci._width(round(multiple, 6), hidden_size) == channels  # as some readers do first


REFUSED = {
    "opt": (MEMBERS["opt"], [], "OPT has learned positions"),
    "qwen3": (MEMBERS["qwen3"], [], "Qwen3 normalises queries and keys"),
    "window": (MEMBERS["mistral, window"], [], "sliding window"),
    "activation": (("llama", PAIRS | {"hidden_act": "gelu"}), [], "its MLPs use 'gelu' instead of 'silu'"),
    "heads of another size": (("llama", SIZES | {"head_dim": 6}), [], "hidden_size / num_attention_heads wide"),
    "some heads": (("llama", PAIRS), ["layer1.attention.2"], "keeps 6 of 8 query heads of an attention"),
    "layer 0": (("llama", PAIRS), ["layer0.attention"], "the first layer .* has no attention; vLLM can't run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_decilm_can_not_hold_is_refused_and_nothing_is_written(case, tmp_path):
    member, dropped, message = REFUSED[case]
    with pytest.raises(ExportRefused, match=f"a DeciLM checkpoint can't hold this model: .*{message}"):
        exported(cut_llm(*member), tmp_path, *dropped)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_belong_to_the_config_are_found(tmp_path):
    llm = cut_llm("llama", PAIRS)
    pruned = PrunedModel.of(llm, PruningMask.all_kept(llm.shape).drop("layer1.mlp"))
    deci.write(pruned, tmp_path)
    assert deci.check(pruned, tmp_path).startswith("the rules of DeciLM's readers")
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file(state | {name: state[name] * 1.01}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportRefused, match="does not compute what the masked model does"):
        deci.check(pruned, tmp_path)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportRefused, match="does not hold what its config says"):
        deci.check(pruned, tmp_path)
