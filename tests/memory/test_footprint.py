"""Predicted bytes follow RAP's published figures, the formulas by hand, and real tensors to the byte."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig

from rap_env.components import Component, Site
from rap_env.errors import InfeasibleBudget, InvalidMask, InvalidWorkload
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import (
    Footprint,
    bytes_by_name,
    check_feasible,
    component_bytes,
    dense_bytes,
    footprint,
    smallest_bytes,
)
from rap_env.memory.workload import Workload

# RAP (arXiv 2505.17138): peak GB of Llama-2-7B at 8 x 2048 tokens, and the attentions and MLPs its masks drop.
PUBLISHED = {
    "dense": (22.07, [], []),
    "80%": (17.36, [18, 19, 21, 23, 24, 25, 27, 28, 30], [13, 22, 24, 27]),
    "60%": (
        13.05,
        [8, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 25, 27, 28, 30],
        [7, 8, 9, 12, 13, 18, 20, 22, 24, 26, 27],
    ),
}


@pytest.fixture(scope="module")
def llama2() -> ModelShape:
    return ModelShape.from_config(LlamaConfig())


@pytest.fixture(scope="module")
def llama3() -> ModelShape:
    return ModelShape.from_config(
        LlamaConfig(
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
    )


def test_sizes_of_llama2_are_counted_from_its_config_alone(llama2):
    assert [c.weight_bytes for c in llama2.components] == [2 * 4 * 4096**2, 2 * 3 * 4096 * 11008] * 32
    assert [c.kv_bytes_per_token for c in llama2.components] == [2 * 2 * 4096, 0] * 32
    # The embedding and the head, two norms a layer and the last.
    assert llama2.fixed_bytes == 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert llama2.weight_bytes == 2 * 6_738_415_616


@pytest.mark.parametrize("setting", PUBLISHED)
def test_published_peaks_of_llama2_are_met_to_two_decimals(llama2, setting):
    gigabytes, attentions, mlps = PUBLISHED[setting]
    names = [f"layer{i}.attention" for i in attentions] + [f"layer{i}.mlp" for i in mlps]
    mask = PruningMask.all_kept(llama2).drop(*names)
    assert round(footprint(llama2, mask, Workload(8, 2048)).peak_bytes / 1e9, 2) == gigabytes


@pytest.mark.parametrize(("name", "batch_size", "prompt_tokens"), [("llama2", 4, 2080), ("llama3", 8, 8192)])
def test_attention_and_mlp_free_equal_bytes_at_the_flip_point(request, name, batch_size, prompt_tokens):
    shape = request.getfixturevalue(name)
    assert batch_size * prompt_tokens == {"llama2": 8_320, "llama3": 65_536}[name]
    shape = dataclasses.replace(shape, context_tokens=10_000)  # so that one token more stays within it
    attention, mlp = component_bytes(shape, Workload(batch_size, prompt_tokens))[:2]
    assert attention == mlp
    assert component_bytes(shape, Workload(batch_size, prompt_tokens + 1))[0] > mlp
    assert component_bytes(shape, Workload(batch_size, prompt_tokens - 1))[0] < mlp


def test_every_part_of_a_tiny_model_by_hand(tiny_llm):
    # 4 bytes; hidden 32, queries 32, keys and values 16 each, MLP 64, vocabulary 257.
    shape, workload = tiny_llm.shape, Workload(2, 5, 3)
    dense = PruningMask.all_kept(shape)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    mlp = 3 * 32 * 64
    fixed = 2 * 257 * 32 + 9 * 32
    kv_cache = 2 * 16 * 2 * (5 + 3)  # numbers of one attention
    logits = 4 * 2 * 257
    assert footprint(shape, dense, workload) == Footprint(
        weights_bytes=4 * (fixed + 4 * attention + 4 * mlp),
        kv_cache_bytes=4 * 4 * kv_cache,
        activation_bytes=4 * 2 * 5 * (4 * 32 + 3 * 64) + logits,  # an MLP is the widest
    )
    no_mlps = dense.drop(*(f"layer{i}.mlp" for i in range(4)), "layer2.attention")
    assert footprint(shape, no_mlps, workload) == Footprint(
        weights_bytes=4 * (fixed + 3 * attention),
        kv_cache_bytes=4 * 3 * kv_cache,
        activation_bytes=4 * 2 * 5 * (4 * 32 + 2 * 32 + 2 * 16) + logits,
    )
    nothing = PruningMask.from_bits(shape, [0] * 8)
    assert footprint(shape, nothing, workload) == Footprint(4 * fixed, 0, 4 * 2 * 5 * 4 * 32 + logits)
    assert component_bytes(shape, workload) == (4 * attention + 4 * kv_cache, 4 * mlp) * 4
    assert list(bytes_by_name(shape, workload).items())[1] == ("layer0.mlp", 4 * mlp)


def test_the_peak_is_weights_and_kv_cache_and_the_total_adds_activations():
    needed = Footprint(weights_bytes=100, kv_cache_bytes=20, activation_bytes=3)
    assert (needed.peak_bytes, needed.total_bytes) == (120, 123)
    assert needed.as_dict() == {
        "weights_bytes": 100,
        "kv_cache_bytes": 20,
        "activation_bytes": 3,
        "peak_bytes": 120,
    }


def test_what_components_free_adds_up_to_the_footprint_of_every_mask(tiny_llm):
    shape, workload = tiny_llm.shape, Workload(3, 100, 20)
    freed = component_bytes(shape, workload)
    for number in range(2**8):
        mask = PruningMask.from_bits(shape, [number >> bit & 1 for bit in range(8)])
        dropped = sum(size for size, bit in zip(freed, mask.keep, strict=True) if not bit)
        assert footprint(shape, mask, workload).peak_bytes == dense_bytes(shape, workload) - dropped
    assert smallest_bytes(shape, workload) == dense_bytes(shape, workload) - sum(freed)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2), (None, 2)])
def test_weights_are_counted_in_the_given_type_or_two_bytes(dtype, size):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10)
    assert ModelShape.from_config(config, dtype).bytes_per_parameter == size


def test_a_config_that_names_its_type_is_counted_in_it():
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10, dtype="float32")
    assert ModelShape.from_config(config).bytes_per_parameter == 4


def real_bytes(llm, mask: PruningMask, workload: Workload) -> tuple[int, int]:
    """Bytes of the model's parameters without the dropped ones, and of the KV cache after serving a workload."""
    dropped = {id(p) for component in mask.dropped for p in llm.parameters_of(component.site)}
    weights = sum(p.nbytes for p in llm.model.parameters() if id(p) not in dropped)
    prompt = torch.ones(workload.batch_size, workload.prompt_tokens, dtype=torch.long)
    with llm.pruned(mask), torch.inference_mode():
        cache = llm.model(prompt).past_key_values
        for _ in range(workload.generated_tokens):
            cache = llm.model(prompt[:, :1], past_key_values=cache).past_key_values
    layers = [layer for layer in cache.layers if layer.is_initialized] if cache is not None else []
    return weights, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("dropped", [[], ["layer0.attention", "layer1.mlp"], [f"layer{i}.attention" for i in range(4)]])
def test_predictions_equal_real_tensors_in_every_family(family, dropped):
    llm, workload = build_tiny_llm(family), Workload(2, 5, 2)
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    needed = footprint(llm.shape, mask, workload)
    assert (needed.weights_bytes, needed.kv_cache_bytes) == real_bytes(llm, mask, workload)


WINDOWED = [
    ("mistral", {"sliding_window": 64}),
    ("mistral", {"sliding_window": 2}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("family", "window"), WINDOWED, ids=str)
@pytest.mark.parametrize("generated_tokens", [0, 1, 3])
def test_the_kv_cache_of_a_sliding_window_equals_the_one_that_transformers_makes(family, window, generated_tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    llm = build_random_llm(family, {**sizes, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 257, **window})
    dense, width = PruningMask.all_kept(llm.shape), window["sliding_window"]
    for prompt_tokens in sorted({1, max(1, width - 2), max(1, width - 1), width, width + 1, 100}):
        workload = Workload(2, prompt_tokens, generated_tokens)
        predicted = footprint(llm.shape, dense, workload).kv_cache_bytes
        assert predicted == real_bytes(llm, dense, workload)[1], str(workload)


def test_a_window_of_64_keeps_63_of_512_tokens():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    llm = build_random_llm("mistral", {**sizes, "head_dim": 8, "vocab_size": 257, "sliding_window": 64})
    workload = Workload(2, 512)
    assert workload.cached_tokens(llm.shape.attention_window) == 2 * 63
    needed = footprint(llm.shape, PruningMask.all_kept(llm.shape), workload)
    assert needed.kv_cache_bytes == 4 * 2 * 63 * 2 * 16 * 4 == 64_512  # layers, sequences, tokens, keys + values, bytes
    assert component_bytes(llm.shape, workload)[0] == llm.shape.components[0].weight_bytes + 64_512 // 4


def test_windows_that_no_layer_uses_are_passed_over():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    unused = [{"use_sliding_window": False}, {"use_sliding_window": True, "max_window_layers": 2}]
    for options in unused:  # in the second, layers from 2 on would slide, and there are 2
        llm = build_random_llm("qwen2", {**sizes, "vocab_size": 257, "sliding_window": 4, **options})
        mask, workload = PruningMask.all_kept(llm.shape), Workload(1, 9, 2)
        assert footprint(llm.shape, mask, workload).kv_cache_bytes == real_bytes(llm, mask, workload)[1] > 0
        assert llm.shape.attention_window is None


def test_parts_of_sites_are_rows_like_any_other(tiny_llm):
    attention, mlp = Site(0, "attention"), Site(0, "mlp")
    rows = tuple(Component(f"layer0.attention.{part}", attention, part, 1000, 16) for part in range(2))
    rows += tuple(Component(f"layer0.mlp.{part}", mlp, part, 300 + part, 0) for part in range(3))
    shape = dataclasses.replace(tiny_llm.shape, components=rows, fixed_bytes=50_000)
    mask, workload = PruningMask.all_kept(shape).drop("layer0.attention.0", "layer0.mlp.2"), Workload(2, 10)
    needed = footprint(shape, mask, workload)
    assert (needed.weights_bytes, needed.kv_cache_bytes) == (50_000 + 1000 + 300 + 301, 16 * 20)
    assert component_bytes(shape, workload) == (1320, 1320, 300, 301, 302)
    assert dense_bytes(shape, workload) - smallest_bytes(shape, workload) == 1320 + 1320 + 300 + 301 + 302


@pytest.mark.llm
@pytest.mark.parametrize("workload", [Workload(1, 7), Workload(3, 16, 2)], ids=str)
@pytest.mark.parametrize("every", [31, 7, 2, 1])
def test_predictions_equal_real_tensors_of_the_embedded_model(embedded_llm, workload, every):
    shape = embedded_llm.shape
    mask = PruningMask.all_kept(shape).drop(*shape.components[::every])
    needed = footprint(shape, mask, workload)
    assert (needed.weights_bytes, needed.kv_cache_bytes) == real_bytes(embedded_llm, mask, workload)


@pytest.mark.llm
def test_the_embedded_model_flips_above_4600_tokens(embedded_llm):
    # Attention 576 * (576 + 192) * 2 = 884,736 and MLP 3 * 576 * 1536 = 2,654,208 parameters, 192 KV channels.
    assert (2_654_208 - 884_736) / (2 * 192) == 4_608
    attention, mlp = component_bytes(embedded_llm.shape, Workload(2, 2304))[:2]
    assert attention == mlp == 2 * 2_654_208
    assert embedded_llm.shape.weight_bytes == sum(p.nbytes for p in embedded_llm.model.parameters()) == 2 * 134_515_008
    for row in embedded_llm.shape.components:
        assert row.weight_bytes == sum(p.nbytes for p in embedded_llm.parameters_of(row.site))
        assert row.kv_bytes_per_token == (2 * 2 * 192 if row.site.kind == "attention" else 0)


def test_a_workload_beyond_the_context_is_refused(llama2):
    dense = PruningMask.all_kept(llama2)
    assert footprint(llama2, dense, Workload(1, 2000, 48)).peak_bytes > 0
    with pytest.raises(InvalidWorkload, match="needs 2,049 tokens a sequence; the model's context is 2,048"):
        footprint(llama2, dense, Workload(1, 2000, 49))


def test_a_mask_of_another_model_is_refused(llama2, tiny_llm):
    with pytest.raises(InvalidMask, match="expected a mask over this model's 64 components; got 8"):
        footprint(llama2, PruningMask.all_kept(tiny_llm.shape), Workload(1, 1))


def test_an_infeasible_budget_names_the_smallest_feasible_bytes(tiny_llm):
    shape, workload, smallest = tiny_llm.shape, Workload(2, 10), 4 * (2 * 257 * 32 + 9 * 32)
    check_feasible(shape, workload, smallest)
    with pytest.raises(InfeasibleBudget, match=r"no pruning mask fits 66,943 bytes .* needs 66,944 bytes") as refusal:
        check_feasible(shape, workload, smallest - 1)
    assert refusal.value.smallest_bytes == smallest == 66_944
    with pytest.raises(InfeasibleBudget):
        check_feasible(shape, workload, float("nan"))
