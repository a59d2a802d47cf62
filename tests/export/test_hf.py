"""Checkpoints for transformers: what is loaded computes what the masked model does, in every way of running it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rap_env.components import ATTENTION, MLP
from rap_env.export.hf import own_model
from rap_env.export.pruned import PrunedModel
from rap_env.export.save import export_pruned
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.export.cases import MEMBERS, SIZES, cut_llm, random_masks
from tests.llm.test_parts import cut_by_hand

TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def all_but(llm: SwitchableLLM, *names: str) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop(*names)


@pytest.mark.parametrize("member", MEMBERS)
def test_loaded_models_give_exactly_the_masked_logits_and_generate_the_same(member, tmp_path):
    llm = cut_llm(*MEMBERS[member])
    generate = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    of_its_own = 0
    for index, mask in enumerate(random_masks(llm, 6)):
        folder = export_pruned(llm, mask, "hf", tmp_path / str(index)).folder
        of_its_own += (folder / "modeling_rap_pruned.py").is_file()
        model = loaded(folder, trust_remote_code=True)
        with torch.inference_mode():
            with llm.pruned(mask):
                assert torch.equal(model(TOKENS).logits, llm.model(TOKENS).logits)
                expected = llm.model.generate(TOKENS, **generate)
            assert torch.equal(model.generate(TOKENS, **generate), expected)
            assert torch.allclose(model(TOKENS).logits, cut_by_hand(llm, mask)(TOKENS).logits, atol=2e-5)
    assert 4 <= of_its_own < 7


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_uses_a_cache_also_where_the_first_layer_has_no_attention(family, tmp_path):
    llm = cut_llm(*MEMBERS["llama, 2 KV heads" if family == "llama" else "opt"])
    mask = all_but(llm, "layer0.attention", "layer1.mlp")
    model = loaded(export_pruned(llm, mask, "hf", tmp_path / "out").folder, trust_remote_code=True)
    with torch.inference_mode():
        cache = model(TOKENS, use_cache=True).past_key_values
        held = [layer.keys.shape for layer in cache.layers if layer.keys is not None]
        assert len(held) == 2 and cache.get_seq_length() == 9
        step = torch.tensor([[5], [6]])
        cached = model(step, past_key_values=cache).logits[:, -1]
        assert torch.allclose(cached, model(torch.cat([TOKENS, step], 1)).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "opt"])
def test_a_model_without_any_attention_generates_without_a_cache(member, tmp_path):
    llm = cut_llm(*MEMBERS[member])
    mask = all_but(llm, *(f"layer{index}.{ATTENTION}" for index in range(3)))
    model = loaded(export_pruned(llm, mask, "hf", tmp_path / "out").folder, trust_remote_code=True)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    with llm.pruned(mask):
        assert torch.equal(model.generate(TOKENS, **options), llm.model.generate(TOKENS, **options))


@pytest.mark.parametrize("member", MEMBERS)
def test_fewer_whole_layers_are_an_ordinary_checkpoint(member, tmp_path):
    llm = cut_llm(*MEMBERS[member])
    mask = all_but(llm, "layer1.attention", "layer1.mlp")
    folder = export_pruned(llm, mask, "hf", tmp_path / "out").folder
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == llm.shape.model_type and config["num_hidden_layers"] == 2
    assert "auto_map" not in config and config["architectures"] == [type(llm.model).__name__]
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.equal(loaded(folder)(TOKENS).logits, llm.model(TOKENS).logits)


def test_equal_widths_are_an_ordinary_checkpoint_with_smaller_numbers(tmp_path):
    llm = cut_llm("llama", SIZES | {"num_key_value_heads": 4})
    names = [name for index in range(3) for name in (f"layer{index}.attention.1", f"layer{index}.attention.3")]
    mask = all_but(llm, *names, *(f"layer{index}.mlp.16:40" for index in range(3)))
    folder = export_pruned(llm, mask, "hf", tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 4)
    assert (config["intermediate_size"], config["num_hidden_layers"], config["model_type"]) == (40, 3, "llama")
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.equal(loaded(folder)(TOKENS).logits, llm.model(TOKENS).logits)


def test_equal_widths_that_a_config_can_not_say_get_a_model_file(tmp_path):
    llm = cut_llm("llama", SIZES | {"num_key_value_heads": 4})  # 6 heads do not divide 32, as Llama's config wants
    folder = export_pruned(llm, all_but(llm, *(f"layer{i}.attention.1" for i in range(3))), "hf", tmp_path / "a").folder
    assert json.loads((folder / "config.json").read_text())["layer_query_heads"] == [6, 6, 6]
    opt = cut_llm(*MEMBERS["opt"])  # whose heads are hidden size / heads wide
    names = [f"layer{index}.attention.{head}" for index in range(3) for head in range(4)]
    folder = export_pruned(opt, all_but(opt, *names), "hf", tmp_path / "b").folder
    assert json.loads((folder / "config.json").read_text())["layer_query_heads"] == [4, 4, 4]


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "qwen2", "opt without biases"])
@pytest.mark.parametrize("dropped", ["layer1", "layer1.attention"])
def test_biases_that_a_family_does_not_have_are_kept(member, dropped, tmp_path):
    whole = cut_llm(*MEMBERS[member])
    layers = whole.model.model.decoder.layers if member.startswith("opt") else whole.model.model.layers
    for path in ("fc2", "self_attn.out_proj") if member.startswith("opt") else ("mlp.down_proj", "self_attn.o_proj"):
        layers[2].get_submodule(path).bias = torch.nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)
    llm = SwitchableLLM(whole.model, whole.tokenizer, "compensated", "group")
    names = [f"{dropped}.attention", f"{dropped}.mlp"] if dropped == "layer1" else [dropped]
    mask = all_but(llm, *names)
    folder = export_pruned(llm, mask, "hf", tmp_path / "out").folder
    ordinary = member.startswith("llama") and dropped == "layer1"  # Llama's config knows biases of these matrices
    assert (folder / "modeling_rap_pruned.py").is_file() != ordinary
    if ordinary:
        config = AutoConfig.from_pretrained(folder)
        assert config.attention_bias and config.mlp_bias
    with torch.inference_mode(), llm.pruned(mask):
        logits = llm.model(TOKENS).logits
    with torch.inference_mode():
        assert torch.allclose(loaded(folder, trust_remote_code=True)(TOKENS).logits, logits, atol=1e-6)


def test_the_file_holds_the_kept_parts_only_and_tied_embeddings_once(tmp_path):
    llm = cut_llm("llama", SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True})
    mask = all_but(llm, "layer0.attention.1", "layer1.mlp", "layer2.mlp.0:16")
    folder = export_pruned(llm, mask, "hf", tmp_path / "out").folder
    # Rows and columns of the four matrices of an attention, half of them in layer 0; three for each MLP channel.
    attentions, mlps = 32 * (16 + 4 + 4 + 16) + 2 * 32 * (32 + 8 + 8 + 32), 3 * 32 * (64 + 48)
    with safe_open(folder / "model.safetensors", "pt") as file:
        n_weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it is no mapping
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert n_weights == 257 * 32 + attentions + mlps + 6 * 32  # with the embedding and 6 of 7 norms
    model = loaded(folder, trust_remote_code=True)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(("member", "key"), [("llama, biases", "hidden_act"), ("opt", "activation_function")])
def test_activations_with_weights_of_their_own_keep_them(member, key, tmp_path):
    family, sizes = MEMBERS[member]
    llm = cut_llm(family, sizes | {key: "prelu"})
    for name, parameter in llm.model.named_parameters():
        if "act" in name.rpartition(".")[0].rpartition(".")[2]:
            parameter.data.fill_(0.7)
    mask = all_but(llm, "layer1.mlp", "layer2.mlp.16:40")
    model = loaded(export_pruned(llm, mask, "hf", tmp_path / "out").folder, trust_remote_code=True)
    assert sum(bool((parameter == 0.7).all()) for parameter in model.parameters()) == 2
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.equal(model(TOKENS).logits, llm.model(TOKENS).logits)


def test_a_checkpoint_needs_nothing_of_this_package(tmp_path):
    llm = cut_llm(*MEMBERS["qwen3"])
    mask = all_but(llm, "layer0.attention", "layer2.mlp")
    folder = export_pruned(llm, mask, "hf", tmp_path / "out").folder
    script = (
        "import sys; sys.modules['rap_env'] = None; import torch; from transformers import AutoModelForCausalLM as M;"
        f"model = M.from_pretrained({str(folder)!r}, trust_remote_code=True);"
        "print(model(torch.tensor([[1, 2, 3]])).logits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    with torch.inference_mode(), llm.pruned(mask):
        expected = llm.model(torch.tensor([[1, 2, 3]])).logits.sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_transformers_does_not_load_a_model_file_unless_it_is_told_to(tmp_path):
    llm = cut_llm(*MEMBERS["llama, 2 KV heads"])
    folder = export_pruned(llm, all_but(llm, "layer1.mlp"), "hf", tmp_path / "out").folder
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_model_in_another_type_keeps_its_rotary_frequencies():
    llm = cut_llm(*MEMBERS["llama, 2 KV heads"], "bfloat16")
    model = own_model(PrunedModel.of(llm, llm.mask))
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    tokens = torch.arange(60)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, llm.model(tokens).logits)


def test_the_tokenizer_and_the_type_of_the_weights_stay(tmp_path):
    llm = cut_llm(*MEMBERS["llama, 2 KV heads"], "bfloat16")
    folder = export_pruned(llm, all_but(llm, f"layer1.{MLP}"), "hf", tmp_path / "out").folder
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == llm.tokenizer("a b").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    with torch.inference_mode(), llm.pruned(llm.mask.drop(f"layer1.{MLP}")):
        assert torch.equal(model(TOKENS).logits, llm.model(TOKENS).logits)
