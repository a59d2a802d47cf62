"""A quantised model is, under every mask, the plain one with the weights that its numbers stand for, byte by byte."""

import gc
import weakref

import pytest
import torch
from torch import nn

from rap_env.components import ATTENTION, MLP, Site
from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.evaluation.perplexity import token_losses
from rap_env.llm import quantised
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.formats import quantise
from rap_env.llm.loading import build_random_llm, build_tiny_llm, load_llm
from rap_env.llm.shape import ModelShape
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from tests.llm.quantised_cases import MEMBERS, SIZES, TOKENS, build, dequantised, masks_over

WEIGHTS, GRANULARITIES = ("int8", "int4"), ("block", "group")
CASES = [("llama", "int4g32", "block"), ("llama", "int4g32", "group")]
CASES += [(member, weights, granularity) for member in MEMBERS for weights in WEIGHTS for granularity in GRANULARITIES]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def pair(request) -> tuple[SwitchableLLM, SwitchableLLM]:
    """A quantised model and the plain one that it stands for."""
    member, weights, granularity = request.param
    llm = build(member, weights, granularity=granularity)
    return llm, dequantised(llm, granularity)


@pytest.mark.parametrize("kernel_rows", [0, 24], ids=["dequantised", "kernels"])  # there are 18 rows
def test_masked_logits_are_those_of_the_dequantised_model(pair, kernel_rows, monkeypatch):
    llm, plain = pair
    monkeypatch.setattr(quantised, "KERNEL_ROWS", kernel_rows)
    for mask in masks_over(llm):
        by_name = PruningMask.all_kept(plain.shape).drop(*mask.dropped)
        with torch.inference_mode(), llm.pruned(mask), plain.pruned(by_name):
            expected = plain.model(TOKENS).logits
            torch.testing.assert_close(llm.model(TOKENS).logits, expected, rtol=0, atol=1e-4)
            stream = next(llm.run_masks([mask], *llm.open_stream(TOKENS)))[1]
            torch.testing.assert_close(llm.logits(stream), expected, rtol=0, atol=1e-4)
            assert (expected - plain.model(TOKENS.flip(1)).logits).abs().max() > 0.01


def test_cached_generation_is_that_of_the_dequantised_model(pair):
    llm, plain = pair
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    for mask in masks_over(llm, 3):
        if any(site.kind == ATTENTION for site in kept_sites(mask)):
            by_name = PruningMask.all_kept(plain.shape).drop(*mask.dropped)
            with torch.inference_mode(), llm.pruned(mask), plain.pruned(by_name):
                inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
                assert torch.equal(llm.model.generate(**inputs, **options), plain.model.generate(**inputs, **options))


def test_masks_run_together_give_exactly_what_each_gives_alone(pair):
    llm, _plain = pair
    with torch.inference_mode():
        opened = llm.open_stream(TOKENS.repeat(1, 3))  # 54 rows
        for mask, stream in llm.run_masks(list(masks_over(llm)), *opened):
            assert torch.equal(stream, next(llm.run_masks([mask], *opened))[1])


def test_losses_by_tiles_of_the_head_are_those_of_its_logits(pair):
    llm, _plain = pair
    with torch.inference_mode():
        hidden = next(llm.run_masks([PruningMask.all_kept(llm.shape)], *llm.open_stream(TOKENS)))[1]
        logprobs = llm.logits(hidden)[:, :-1].double().log_softmax(-1)
        expected = -logprobs.gather(-1, TOKENS[:, 1:, None])[..., 0]
        torch.testing.assert_close(token_losses(llm, hidden, TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("member", "weights", "granularity"), CASES)
def test_rows_count_every_tensor_once_and_are_those_of_the_config(member, weights, granularity):
    llm = build(member, weights, granularity=granularity)
    tensors = {t.data_ptr(): t.nbytes for t in llm.model.state_dict().values()}  # of a tied head once
    assert llm.shape.weight_bytes == sum(tensors.values())
    for site in llm.shape.sites:
        rows = [row for row in llm.shape.components if row.site == site]
        parameters = [p for p in llm.parameters_of(site) if p.ndim > 1]
        if len(rows) == 1:
            assert rows[0].weight_bytes == sum(p.nbytes for p in llm.parameters_of(site))
        else:  # INT4 scales [groups, outputs, 2] lie along the channels too; the others of outputs stay
            matrices = sum(p.nbytes for p in parameters)
            assert matrices <= sum(row.weight_bytes for row in rows) <= sum(p.nbytes for p in llm.parameters_of(site))
            assert len({row.weight_bytes for row in rows}) == 1
    assert ModelShape.from_config(llm.model.config, torch.float32, granularity, weights) == llm.shape
    work = Workload(2, 9)
    for mask in masks_over(llm, 3):
        with torch.inference_mode(), llm.pruned(mask):
            if any(site.kind == ATTENTION for site in kept_sites(mask)):
                cache = llm.model(TOKENS, use_cache=True).past_key_values
                n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
                assert n_bytes == footprint(llm.shape, mask, work).kv_cache_bytes


def test_bytes_of_a_layer_by_hand():
    # Queries and output 256 x 128, keys and values 128 x 128; an MLP of 3 x 128 x 192; scales of 2 bytes.
    attention, mlp = 2 * 256 * 128 + 2 * 128 * 128, 3 * 128 * 192
    int8, int4 = (build("llama", weights, granularity="block", dtype="bfloat16").shape for weights in WEIGHTS)
    assert [row.weight_bytes for row in int8.components[:2]] == [
        attention + 2 * (256 + 128 + 128 + 128),
        mlp + 2 * (192 + 192 + 128),
    ]
    assert [row.weight_bytes for row in int4.components[:2]] == [
        attention // 2 + attention // 64 * 4,
        mlp // 2 + mlp // 64 * 4,
    ]
    norms = 5 * 128 * 2
    assert int8.fixed_bytes == int4.fixed_bytes == 2 * (257 * 128 + 257 * 2) + norms  # embedding and untied head
    tied = build("qwen3, tied", "int8", granularity="block", dtype="bfloat16").shape
    assert tied.fixed_bytes == 257 * 128 + 257 * 2 + norms
    assert int8.bytes_per_parameter == int4.bytes_per_parameter == 2  # of activations
    group = build("llama", "int4", dtype="bfloat16").shape
    down, inner = 128 * 64 // 2 + 128 * 4, 2 * (64 * 128 // 2 + 64 * 2 * 4)
    assert {row.weight_bytes for row in group.components if row.site.kind == MLP} == {down + inner}
    finer = build("llama", "int4g32", granularity="block", dtype="bfloat16").shape
    assert finer.components[1].weight_bytes == mlp // 2 + mlp // 32 * 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_parts_side_by_side_are_views_until_a_kernel_wants_their_columns(weights):
    llm = build("llama", weights)
    own = {p.untyped_storage().data_ptr() for p in llm.model.parameters()}
    rows = [row for row in llm.shape.components if row.site == Site(1, MLP)]
    (site,) = (s for s in kept_sites(PruningMask.all_kept(llm.shape).drop(rows[2])) if s.parts is not None)
    layer = llm.layer_of(site)
    parameters = [p for module in layer.modules_of(MLP) for p in module.parameters()]
    assert all(p.untyped_storage().data_ptr() in own for p in parameters)
    down = layer.module.mlp.down_proj
    whole = llm.model.model.layers[1].mlp.down_proj
    assert (down.in_features, whole.in_features, down.out_features) == (128, 192, 128)
    before = down.weight.clone()
    with torch.inference_mode():
        down(torch.ones(30, 128))
        assert down.weight.untyped_storage().data_ptr() in own
        down(torch.ones(1, 128))
    assert down.weight.is_contiguous() and torch.equal(down.weight, before)
    assert whole.weight.untyped_storage().data_ptr() in own and whole.in_features == 192


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_weights_that_were_loaded_are_released(weights):
    llm = build_random_llm(*MEMBERS["llama"])
    old = [weakref.ref(p) for name, p in llm.model.named_parameters() if p.ndim > 1]
    model = quantise(llm.model, weights)
    del llm
    gc.collect()
    assert not any(reference() is not None for reference in old)
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in model.modules())


def test_digests_tell_formats_apart():
    llms = [build("llama", *formats) for formats in (("full",), ("int8",), ("int4",), ("int4g32",), ("full", "int8"))]
    assert len({llm.digest for llm in llms}) == 5
    assert build("llama").digest == llms[0].digest


def test_int4_of_sizes_that_its_groups_do_not_divide_is_refused_before_anything_is_changed():
    tiny = build_tiny_llm()
    with pytest.raises(
        UnsupportedArchitecture,
        match=r"inputs in multiples of 64 and outputs in multiples of 64 .*; layer0.self_attn.q_proj has 32 inputs",
    ):
        quantise(tiny.model, "int4")
    assert isinstance(tiny.model.model.layers[0].mlp.down_proj, nn.Linear)
    with pytest.raises(UnsupportedArchitecture, match="int4"):
        load_llm("tiny", weights="int4")


def test_int4_parts_that_its_groups_do_not_divide_are_refused_and_whole_sites_are_not():
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    model = quantise(build_random_llm("llama", SIZES | heads).model, "int4")
    SwitchableLLM(model, None, "blocks")
    with pytest.raises(UnsupportedArchitecture, match=r"parts in multiples of 64 channels .* got channels 0 to 32"):
        SwitchableLLM(model, None, "groups", "group")
    with pytest.raises(UnsupportedArchitecture, match=r"parts in multiples of 64 channels"):  # of outputs, still
        ModelShape.from_config(model.config, granularity="group", weights="int4g32")


def test_a_quantised_model_is_not_quantised_again():
    with pytest.raises(UnsupportedArchitecture, match="expected weights as they were loaded to make int4"):
        quantise(build("llama", "int8").model, "int4")


def test_unknown_formats_are_refused_before_a_model_is_looked_for():
    with pytest.raises(UnknownName, match=r"unknown format of weights 'int3'; did you mean"):
        load_llm("no such model", weights="int3")
    with pytest.raises(UnknownName, match="unknown format of the KV cache 'int4'"):
        load_llm("no such model", kv_cache="int4")


def test_a_tiny_model_is_loaded_in_int8():
    llm = load_llm("tiny", dtype="float32", weights="int8", kv_cache="int8", granularity="group")
    assert llm.shape.weight_bytes < 0.4 * build_tiny_llm().shape.weight_bytes and llm.dtype == torch.float32


def test_every_family_is_among_the_members():
    assert {family for family, _ in MEMBERS.values()} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.llm
@pytest.mark.parametrize(("weights", "n_bytes"), [("int8", 134_959_488), ("int4", 88_199_808)])
def test_the_embedded_model_takes_half_and_a_third_of_its_bytes(embedded_folder, weights, n_bytes):
    llm = load_llm(device="cpu", weights=weights)
    assert llm.shape.weight_bytes == sum(p.nbytes for p in llm.model.parameters()) == n_bytes
    assert ModelShape.from_config(llm.model.config, torch.bfloat16, "block", weights) == llm.shape
