"""A model is exactly what its files hold: where files and config disagree, loading says so in one line."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from rap_env.errors import ModelUnavailable, UnsupportedArchitecture
from rap_env.llm import loading
from rap_env.llm.checkpoint import weights_in
from rap_env.llm.loading import build_random_llm, build_tiny_llm, load_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from tests.llm.checkpoint_cases import SIZES, edit_config, edit_weights, refusal


def test_weights_that_are_missing_are_never_made_up(save):
    folder = save()
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "its files lack 1 weights, first 'model.layers.1.mlp.up_proj.weight'" in refusal(folder)


def test_weights_that_the_config_has_no_place_for_are_not_dropped(save):
    folder = save()
    edit_config(folder, num_hidden_layers=3)  # the files hold 4
    expected = "hold 9 weights that its config has no place for, first 'model.layers.3.input_layernorm.weight'"
    assert expected in refusal(folder)


def test_a_config_of_more_layers_than_the_files_hold_is_refused(save):
    folder = save()
    edit_config(folder, num_hidden_layers=5)
    assert "lack 9 weights, first 'model.layers.4.input_layernorm.weight'" in refusal(folder)


@pytest.mark.parametrize(("option", "n_biases"), [("attention_bias", 16), ("mlp_bias", 12)])
def test_biases_that_files_or_config_alone_have_are_refused(save, option, n_biases):
    folder = save(**{option: True})
    assert load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES | {option: True}).digest
    edit_config(folder, **{option: False})
    assert f"hold {n_biases} weights that its config has no place for, first 'model.layers.0" in refusal(folder)
    shutil.rmtree(folder)
    folder = save(**{option: False})
    edit_config(folder, **{option: True})
    assert f"lack {n_biases} weights, first 'model.layers.0" in refusal(folder)


def test_a_layer_of_other_sizes_is_refused_with_both_sizes(save):
    folder = save()

    def narrow(weights: dict) -> None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.layers.1.mlp.{name}.weight"
            weights[key] = weights[key][:, :48] if name == "down_proj" else weights[key][:48]

    edit_weights(folder, narrow)
    expected = "3 weights in its files have other sizes than by its config, first 'model.layers.1.mlp.down_proj.weight'"
    assert f"{expected} with [32, 48] for [32, 64]; all layers have to be alike" in refusal(folder)


@pytest.mark.parametrize(("wrong", "first"), [(4, "[16, 32] for [32, 32]"), (1, "[16, 32] for [8, 32]")])
def test_a_wrong_number_of_kv_heads_is_refused(save, wrong, first):
    folder = save()
    edit_config(folder, num_key_value_heads=wrong)
    message = refusal(folder)
    assert "8 weights in its files have other sizes" in message
    assert f"'model.layers.0.self_attn.k_proj.weight' with {first}" in message


def test_a_tied_config_with_another_head_in_the_files_is_counted_as_it_was_loaded(save):
    folder = save(tie_word_embeddings=True)
    tied = load_llm(str(folder), dtype="float32")
    head = torch.randn(257, 32, generator=torch.Generator().manual_seed(1))
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))
    llm = load_llm(str(folder), dtype="float32")
    assert torch.equal(llm.model.lm_head.weight, head)
    weights_bytes = footprint(llm.shape, PruningMask.all_kept(llm.shape), Workload(1, 1)).weights_bytes
    assert weights_bytes == sum(p.nbytes for p in llm.model.parameters()) == 181_504 + 4 * 257 * 32 == 214_400
    assert tied.shape.weight_bytes == 181_504 and tied.shape != llm.shape


def test_a_tied_head_that_the_files_repeat_is_counted_once(save):
    folder = save(tie_word_embeddings=True)
    edit_weights(
        folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    assert load_llm(str(folder), dtype="float32").shape.weight_bytes == 181_504


def test_frequencies_that_old_checkpoints_hold_are_no_weights(save):
    folder = save()
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES).digest


def test_a_missing_shard_is_named(save):
    folder = save(max_shard_size="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES).digest
    shards[1].unlink()
    expected = f"1 of the {len(shards)} shards in model.safetensors.index.json are missing, first {shards[1].name!r}"
    assert expected in refusal(folder)


def test_shards_without_their_index_are_refused(save):
    folder = save(max_shard_size="40KB")
    (folder / "model.safetensors.index.json").unlink()
    assert "expected model.safetensors, model.safetensors.index.json with its shards, or" in refusal(folder)
    assert "model-00001-of-" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_an_index_that_can_not_be_read_is_refused(save, text):
    folder = save(max_shard_size="40KB")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json does not say which shard holds which weight" in refusal(folder)


def test_a_whole_file_is_enough_beside_an_index_without_its_shards(save):
    folder = save()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    assert load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES).digest


def test_a_shard_that_a_hub_repository_lacks_is_named(monkeypatch):
    def download(*_args, **_kwargs):
        raise OSError("a/b does not appear to have a file named model-00002-of-00003.safetensors. Checkout ...")

    monkeypatch.setattr(loading, "_check_hub", lambda *_: None)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", download)
    with pytest.raises(ModelUnavailable, match=r"can't load 'a/b': .* a file named model-00002-of-00003\.safetensors"):
        load_llm("a/b")


def test_an_adapter_is_refused_with_or_without_a_model_beside_it(save, tmp_path):
    folder = save()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "found an adapter (adapter_config.json): merge it into its base model" in refusal(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    assert "found an adapter (adapter_config.json): merge it into its base model" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes", "unheard-of"])
def test_quantised_weights_are_refused_before_they_are_read(save, monkeypatch, method):
    folder = save()
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read weights"))
    assert "got quantised ones (quantization_config)" in refusal(folder, UnsupportedArchitecture)


def test_members_of_a_family_that_can_not_be_run_are_refused_before_their_weights_are_read(save, monkeypatch):
    folder = save()
    edit_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read weights"))
    assert "got rope_type 'dynamic'" in refusal(folder, UnsupportedArchitecture)


def test_a_model_type_that_was_edited_to_a_known_one_is_refused(save):
    folder = save()
    edit_config(folder, architectures=["SmolLM3ForCausalLM"])
    assert "its config names the architecture SmolLM3ForCausalLM, but the model_type of Llama" in refusal(folder)
    for fine in (["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"], None):
        edit_config(folder, architectures=fine)
        assert load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES).digest


def write_gguf(llm, path: Path) -> None:
    """Writes a Llama with a byte-level tokenizer as float32 GGUF, whose rotary channels are interleaved."""
    config, writer = llm.model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(257)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(llm.tokenizer.get_vocab(), key=llm.tokenizer.get_vocab().get))
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_scores([0.0] * 257)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(256)
    names, heads = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4), {"q_proj": 4, "k_proj": 2}
    for name, tensor in llm.model.state_dict().items():
        weight, n_heads = tensor.numpy(), heads.get(name.split(".")[-2])
        if n_heads:
            weight = weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_is_loaded_as_the_plain_model_that_it_holds(tmp_path):
    built = build_tiny_llm()
    digests = []
    for name in ("a.gguf", "b.gguf"):
        folder = tmp_path / name.removesuffix(".gguf")
        folder.mkdir()
        write_gguf(built, folder / name)
        assert weights_in(folder) == {"gguf_file": name}
        llm = load_llm(str(folder), dtype="float32")
        digests.append(llm.digest)
    assert torch.equal(llm.model(torch.arange(20)[None]).logits, built.model(torch.arange(20)[None]).logits)
    assert llm.shape == built.shape and llm.tokenizer.encode("prune") == built.tokenizer.encode("prune")
    assert digests[0] == digests[1], "the file's name is not part of what it computes"
