"""What loads is what is on disk: shards agree with their index, sizes and types with the config, or it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rap_env.errors import ModelUnavailable
from rap_env.llm import loading
from rap_env.llm.loading import build_random_llm, load_llm
from tests.llm.checkpoint_cases import (
    EMBEDDING,
    HEAD,
    INDEX,
    KEY,
    OPT_SIZES,
    QUERY,
    SIZES,
    edit_config,
    edit_index,
    edit_weights,
    refusal,
)


def longer(name: str) -> Callable[[dict], None]:
    """Gives a matrix three rows more."""
    return lambda weights: weights.update({name: torch.cat([weights[name], weights[name][:3]])})


@pytest.fixture
def unread(monkeypatch) -> None:
    """Fails the test where more is read than the config and what files say in front of their weights."""
    for costly in (loading.AutoTokenizer, loading.AutoModelForCausalLM):
        monkeypatch.setattr(costly, "from_pretrained", lambda *_, **__: pytest.fail("read weights"))


@pytest.mark.parametrize(
    ("changes", "n_weights", "first"),
    [
        ({"num_attention_heads": 8}, 8, "'model.layers.0.self_attn.o_proj.weight' with [32, 32] for [32, 64]"),
        ({"head_dim": 16}, 16, "'model.layers.0.self_attn.k_proj.weight' with [16, 32] for [32, 32]"),
        ({"intermediate_size": 48}, 12, "'model.layers.0.mlp.down_proj.weight' with [32, 64] for [32, 48]"),
        ({"vocab_size": 300}, 2, "'lm_head.weight' with [257, 32] for [300, 32]"),
        ({"hidden_size": 16}, 39, "'lm_head.weight' with [257, 32] for [257, 16]"),
    ],
)
def test_sizes_that_config_and_files_give_differently_are_refused_before_weights_are_read(
    save, unread, changes, n_weights, first
):
    folder = save()
    edit_config(folder, **changes)
    expected = f"{n_weights} weights in its files have other sizes than by its config, first {first}"
    assert expected in refusal(folder)


@pytest.mark.parametrize(("name", "tied"), [(EMBEDDING, False), (HEAD, False), (EMBEDDING, True), (HEAD, True)])
def test_a_longer_embedding_or_head_alone_is_refused_also_where_the_config_ties_them(save, unread, name, tied):
    folder = save(tie_word_embeddings=tied)
    edit_weights(folder, lambda weights: weights.setdefault(HEAD, weights[EMBEDDING].clone()))
    edit_weights(folder, longer(name))
    assert f"1 weights in its files have other sizes than by its config, first {name!r} with [260, 32]" in refusal(
        folder
    )


def test_an_untied_config_needs_a_head_and_a_tied_one_takes_its_embedding_from_a_head_alone(save):
    folder = save()
    edit_weights(folder, lambda weights: weights.pop(HEAD))
    assert "its files lack 1 weights, first 'lm_head.weight'" in refusal(folder)
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.update({HEAD: weights.pop(EMBEDDING)}))
    model = load_llm(str(folder), dtype="float32").model
    assert torch.equal(
        model.model.embed_tokens.weight, build_random_llm("llama", SIZES).model.model.embed_tokens.weight
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("built", "read", "message"),
    [
        ({}, {"enable_bias": False}, "hold 12 weights that its config has no place for"),
        ({"enable_bias": False}, {"enable_bias": True}, "lack 12 weights"),
        ({}, {"layer_norm_elementwise_affine": False}, "hold 10 weights that its config has no place for"),
        ({"layer_norm_elementwise_affine": False}, {"layer_norm_elementwise_affine": True}, "lack 10 weights"),
        ({}, {"tie_word_embeddings": False}, "lack 1 weights, first 'lm_head.weight'"),
        ({}, {"max_position_embeddings": 128}, "'model.decoder.embed_positions.weight' with [66, 32] for [130, 32]"),
        ({}, {"num_hidden_layers": 1}, "hold 16 weights that its config has no place for"),
    ],
)
def test_an_opt_whose_files_and_config_disagree_is_refused(save, built, read, message):
    folder = save("opt", **built)
    assert load_llm(str(folder), dtype="float32").digest == build_random_llm("opt", OPT_SIZES | built).digest
    edit_config(folder, **read)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("family", "lost", "n_weights"),
    [("qwen3", "_norm.weight", 8), ("qwen2", "_proj.bias", 12), ("llama", "norm.weight", 9)],
)
def test_norms_and_biases_that_a_family_always_has_are_never_made_up(save, family, lost, n_weights):
    folder = save(family)

    def lose(weights: dict) -> None:
        for name in [name for name in weights if name.endswith(lost)]:
            del weights[name]

    edit_weights(folder, lose)
    assert f"its files lack {n_weights} weights, first 'model.layers.0." in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "said"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32"), (torch.bool, "BOOL")]
)
def test_whole_numbers_are_not_taken_for_weights(save, unread, kind, said):
    folder = save()
    edit_weights(folder, lambda weights: weights.update({QUERY: (100 * weights[QUERY]).to(kind)}))
    assert f"{QUERY!r} in model.safetensors is of type {said}; quantised weights are not loaded" in refusal(folder)


def test_quantised_weights_with_their_scales_are_refused_whatever_the_config_says(save):
    folder, scale = save(), QUERY + "_scale"
    edit_weights(folder, lambda w: w.update({QUERY: w[QUERY].to(torch.float8_e4m3fn), scale: torch.ones(1)}))
    assert f"hold 1 weights that its config has no place for, first {scale!r}" in refusal(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_any_float_type_are_cast_to_the_type_asked_for(save, kind):
    folder, expected = save(dtype="bfloat16"), build_random_llm("llama", SIZES).model.state_dict()
    edit_weights(folder, lambda weights: weights.update({name: tensor.to(kind) for name, tensor in weights.items()}))
    loaded = load_llm(str(folder), dtype="float32").model.state_dict()
    assert all(torch.equal(loaded[name], tensor.to(kind).float()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(float("nan"), "float32"), (float("inf"), "bfloat16"), (float("-inf"), "float16"), (1e6, "float16")],
)
def test_numbers_that_are_not_finite_in_the_type_asked_for_are_refused(save, number, dtype):
    folder = save()
    edit_weights(folder, lambda weights: weights[QUERY].view(-1)[5].fill_(number))
    with pytest.raises(
        ModelUnavailable, match=rf"1 weights are not finite in torch\.{dtype}, first '{QUERY}': choose a"
    ):
        load_llm(str(folder), dtype=dtype)


def test_an_adapter_is_refused_by_its_weights_too(save):
    folder = save()
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    assert "found an adapter (adapter_model.safetensors): merge it into its base model" in refusal(folder)


def test_weights_of_an_adapter_that_was_not_merged_are_refused(save):
    folder, name = save(), QUERY.replace(".weight", ".lora_A.weight")
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(2, 32)}))
    assert f"hold 1 weights that its config has no place for, first {name!r}" in refusal(folder)


def test_files_in_other_formats_beside_safetensors_are_passed_over(save):
    folder = save()
    for name in ("model.gguf", "pytorch_model.bin", "consolidated.safetensors", "quantize_config.json"):
        (folder / name).write_bytes(b"")
    assert load_llm(str(folder), dtype="float32").digest == build_random_llm("llama", SIZES).digest


def test_two_sets_of_weights_are_refused(save):
    folder = save(max_shard_size="40KB")
    shutil.copy(folder / "model-00001-of-00006.safetensors", folder / "model.safetensors")
    expected = "expected one set of weights; found model.safetensors and model-00001-of-00006.safetensors: keep one"
    assert expected in refusal(folder)


def shard_of(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_an_index_that_says_otherwise_than_its_shards_is_refused_before_weights_are_read(save, unread):
    folder = save(max_shard_size="40KB")
    here, there = shard_of(folder, QUERY), shard_of(folder, KEY)
    assert here != there
    edit_index(folder, lambda weights: weights.pop(QUERY))
    assert f"{here} holds {QUERY!r}, which {INDEX} places in no shard: write the index anew" in refusal(folder)
    edit_index(folder, lambda weights: weights.update({QUERY: there}))
    assert f"{here} holds {QUERY!r}, which {INDEX} places in {there}" in refusal(folder)
    edit_index(folder, lambda weights: weights.update({QUERY: here, "more": there}))
    assert f"{INDEX} places 'more' in {there}, which does not hold it" in refusal(folder)


def test_a_weight_in_two_shards_is_refused(save, unread):
    folder = save(max_shard_size="40KB")
    here, there = shard_of(folder, QUERY), shard_of(folder, KEY)
    edit_weights(folder, lambda weights: weights.update({QUERY: torch.ones(32, 32)}), there)
    assert f"{there} holds {QUERY!r}, which {INDEX} places in {here}" in refusal(folder)


def test_a_shard_that_the_index_does_not_name_is_refused(save, unread):
    folder = save(max_shard_size="40KB")
    shutil.copy(folder / shard_of(folder, QUERY), folder / "model-00007-of-00007.safetensors")
    assert f"found model-00007-of-00007.safetensors, which {INDEX} does not name: index it" in refusal(folder)


@pytest.mark.parametrize("cut", [1, 100, 8000])
def test_a_shard_that_is_cut_off_is_named(save, unread, cut):
    folder = save(max_shard_size="40KB")
    path = folder / shard_of(folder, QUERY)
    path.write_bytes(path.read_bytes()[:-cut])
    assert f"{path.name}: " in refusal(folder) and "fetch the file again" in refusal(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": 1}, "metadata": {}}'])
def test_an_index_of_nothing_is_refused(save, text):
    folder = save(max_shard_size="40KB")
    (folder / INDEX).write_text(text)
    assert f"{INDEX} does not say which shard holds which weight" in refusal(folder)


def test_heads_that_give_the_same_sizes_are_the_configs(save):
    folder = save()
    edit_config(folder, num_attention_heads=8, num_key_value_heads=4, head_dim=4)  # nothing in the files says otherwise
    llm, expected = load_llm(str(folder), dtype="float32"), build_random_llm("llama", SIZES).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in llm.model.state_dict().items())
    assert llm.model.model.layers[0].self_attn.head_dim == 4


def test_a_cache_that_takes_other_bytes_than_those_counted_is_refused(save):
    folder = save()
    (folder / "generation_config.json").write_text('{"cache_implementation": "static"}')
    assert "its generation_config.json asks for a static cache, which takes other bytes: remove" in refusal(folder)
