"""Models with ordered parts: the same function when dense, and masks that are exactly the smaller model."""

import pytest
import torch

from rap_env.components import ATTENTION
from rap_env.errors import CompensationFailed, InvalidMask, InvalidWorkload, UnknownName, UnsupportedArchitecture
from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.widths import prepare
from rap_env.widths.compensation import COMPENSATIONS
from rap_env.widths.elimination import OBS
from rap_env.widths.order import SCORES
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from rap_env.widths.statistics import input_statistics
from tests.llm import quantised_cases
from tests.llm.test_parts import GROUP, MEMBERS, TOKENS, cut_by_hand

WINDOWS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))


def build(member: str = "llama, 2 KV heads") -> SwitchableLLM:
    whole = build_random_llm(*MEMBERS[member])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in whole.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return SwitchableLLM(whole.model, whole.tokenizer, "cut", "group")


def some_widths(llm: SwitchableLLM) -> list[PruningMask]:
    generator = torch.Generator().manual_seed(2)
    numbers = [len(bits) for _site, bits in PruningMask.all_kept(llm.shape).kept_parts]
    rows = [[int(torch.randint(0, n + 1, (1,), generator=generator)) for n in numbers] for _ in range(6)]
    return [PruningMask.from_widths(llm.shape, row) for row in [numbers, *rows]]


@pytest.mark.parametrize("member", MEMBERS)
def test_ordered_parts_leave_the_dense_model_and_masks_are_the_model_cut_by_hand(member):
    llm = build(member)
    with torch.inference_mode():
        before = llm.model(TOKENS).logits
    digest = llm.digest
    prepare_widths(llm, WINDOWS)
    assert llm.digest != digest
    with torch.inference_mode():
        assert torch.allclose(llm.model(TOKENS).logits, before, atol=2e-5)
        for mask in some_widths(llm):
            with llm.pruned(mask):
                assert torch.allclose(llm.model(TOKENS).logits, cut_by_hand(llm, mask)(TOKENS).logits, atol=2e-5)


@pytest.mark.parametrize("member", MEMBERS)
def test_what_a_mask_keeps_are_views_in_one_piece_from_the_start_of_each_matrix(member):
    llm = build(member)
    prepare_widths(llm, WINDOWS)
    own = {parameter.data_ptr(): parameter for parameter in llm.model.parameters()}
    storages, n_narrower = {parameter.untyped_storage().data_ptr() for parameter in own.values()}, 0
    for mask in some_widths(llm):
        for site in kept_sites(mask):
            layer = llm.layer_of(site)
            weights = [p for module in layer.modules_of(site.kind) for p in module.parameters()]
            assert all(p.untyped_storage().data_ptr() in storages for p in weights)
            output = layer.output(site.kind).weight
            assert output.T.is_contiguous()
            assert all(p.is_contiguous() for p in weights if p is not output)
            n_narrower += sum(p.shape != own[p.data_ptr()].shape for p in weights if p.ndim == 2)
    assert n_narrower > 10


@pytest.mark.parametrize("score", SCORES)
def test_parts_stand_in_the_order_of_their_scores(score):
    llm = build()
    prepare_widths(llm, WINDOWS, WidthRecipe(score))
    scores = llm.preparation.scores[score]
    for site in llm.shape.sites:
        rows = [row for row in llm.shape.components if row.site == site]
        values = [scores[row.name] / row.weight_bytes for row in rows]
        assert values == sorted(values, reverse=True) and min(values) > 0.0
    assert llm.preparation.tokens == WINDOWS.numel()


@pytest.mark.parametrize("member", MEMBERS)
def test_elimination_leaves_the_dense_model_and_its_costs_add_up_to_what_a_site_adds(member):
    llm = build(member)
    with torch.inference_mode():
        before = llm.model(TOKENS).logits
    squares = {}
    for site, statistics in input_statistics(llm, WINDOWS, gram=True):
        weight, gram = llm.layer_of(site).output(site.kind).weight, statistics.gram
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        squares[site] = torch.einsum("hi,ij,hj->", weight, gram, weight).item()
    prepare_widths(llm, WINDOWS, WidthRecipe(OBS))
    with torch.inference_mode():
        assert torch.allclose(llm.model(TOKENS).logits, before, atol=2e-5)
    for site, square in squares.items():
        names = [row.name for row in llm.shape.components if row.site == site]
        assert sum(llm.preparation.scores[OBS][name] for name in names) == pytest.approx(square, rel=1e-3)


def test_elimination_is_recorded_beside_the_rules_and_only_where_it_is_asked_for():
    plain, llm = build(), build()
    prepare_widths(plain, WINDOWS)
    prepare_widths(llm, WINDOWS, WidthRecipe(OBS, "ridge", 0.1))
    assert [*plain.preparation.scores] == [*SCORES] and [*llm.preparation.scores] == [*SCORES, OBS]
    assert llm.preparation.order != plain.preparation.order
    again = build()
    prepare_widths(again, WINDOWS, WidthRecipe(OBS))
    assert again.preparation.order == llm.preparation.order


def test_statistics_are_those_of_what_upstream_computes():
    llm = build("opt")
    seen = {}
    for site in llm.shape.sites:
        output = llm.layer_of(site).output(site.kind)
        output.register_forward_pre_hook(lambda _module, inputs, site=site: seen.__setitem__(site, inputs[0]))
    with torch.inference_mode():
        llm.model(WINDOWS)
    upstream = {site: inputs.reshape(*WINDOWS.shape, -1).double() for site, inputs in seen.items()}
    for site, statistics in input_statistics(llm, WINDOWS, gram=True):
        inputs, flat = upstream[site], upstream[site].flatten(0, 1)
        assert torch.allclose(statistics.mean.double(), flat.mean(0), atol=1e-5)
        assert torch.allclose(statistics.second_moment.double(), flat.square().mean(0), atol=1e-5)
        assert torch.allclose(statistics.variance.double(), flat.var(0, correction=0), atol=1e-5)
        assert torch.allclose(statistics.window_norm.double(), inputs.norm(dim=1).mean(0), atol=1e-5)
        assert torch.allclose(statistics.gram.double(), flat.T @ flat / len(flat), atol=1e-5)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_refits_stand_in_for_output_matrices_and_cost_what_they_weigh(compensation):
    plain, llm = build(), build()
    prepare_widths(plain, WINDOWS)
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation=compensation))
    assert llm.digest != plain.digest
    assert llm.shape.components == plain.shape.components
    numbers = [len(bits) for _site, bits in PruningMask.all_kept(llm.shape).kept_parts]
    widths = [max(1, number - 1) for number in numbers]
    mask = PruningMask.from_widths(llm.shape, widths)
    hand = cut_by_hand(llm, mask)
    for layer, site in zip([layer for layer in hand.model.layers for _ in range(2)], llm.shape.sites, strict=True):
        kept = next(one for one in kept_sites(mask) if (one.layer, one.kind) == (site.layer, site.kind))
        weight, bias = llm.refits.of(kept)
        output = layer.self_attn.o_proj if site.kind == ATTENTION else layer.mlp.down_proj
        output.weight.data[:, : weight.shape[1]] = weight
        if bias is not None:
            output.bias.data = bias
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.allclose(llm.model(TOKENS).logits, hand(TOKENS).logits, atol=2e-5)
    assert llm.shape.weight_bytes == sum(parameter.nbytes for parameter in llm.model.parameters())
    tensors = {
        id(p): p for site in kept_sites(mask) for m in llm.layer_of(site).modules_of(site.kind) for p in m.parameters()
    }
    needed = footprint(llm.shape, mask, Workload(1, 1)).weights_bytes
    always = llm.shape.fixed_bytes - sum(
        p.nbytes for site in llm.shape.sites if (p := llm.layer_of(site).output(site.kind).bias) is not None
    )
    assert needed == always + sum(tensor.nbytes for tensor in tensors.values())


def test_refits_bring_outputs_nearer_to_the_dense_ones():
    errors = {}
    for compensation in ("none", "procrustes", "ridge"):
        llm = build("llama, as many KV heads")
        windows = torch.randint(0, 256, (64, 24), generator=torch.Generator().manual_seed(5))
        prepare_widths(
            llm, windows, WidthRecipe(compensation=compensation, ridge=0.01 if compensation == "ridge" else None)
        )
        numbers = [len(bits) for _site, bits in PruningMask.all_kept(llm.shape).kept_parts]
        mask = PruningMask.from_widths(llm.shape, [numbers[0] - 3, *numbers[1:]])
        with torch.inference_mode():
            hidden, context = llm.open_stream(windows)
            dense = llm.run(llm.shape.sites[:1], hidden, context)
            errors[compensation] = (llm.run(kept_sites(mask)[:1], hidden, context) - dense).square().mean().item()
    assert errors["ridge"] < errors["procrustes"] < errors["none"]


def test_what_was_measured_is_kept_and_the_same_model_is_not_measured_again(monkeypatch):
    first, second = build(), build()
    prepare_widths(first, WINDOWS, WidthRecipe("flap", "ridge"))
    monkeypatch.setattr(prepare, "input_statistics", None)
    prepare_widths(second, WINDOWS, WidthRecipe("flap", "ridge"))
    assert first.digest == second.digest and first.preparation == second.preparation
    assert repr(WidthRecipe("flap", "ridge", 1)) == repr(WidthRecipe("flap", "ridge", 1.0))
    mask = some_widths(first)[1]
    with torch.inference_mode(), first.pruned(mask), second.pruned(mask):
        assert torch.equal(first.model(TOKENS).logits, second.model(TOKENS).logits)


def test_a_mask_that_keeps_other_parts_has_no_refit():
    llm = build()
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="ridge"))
    mask = PruningMask.all_kept(llm.shape).drop(f"layer1.mlp.0:16@{llm.preparation.order}")
    with pytest.raises(CompensationFailed, match=r"keep the first parts of each site; layer1\.mlp keeps others"):
        llm.apply(mask)


@pytest.mark.parametrize(
    ("recipe", "windows", "error", "message"),
    [
        ({"score": "magnitude"}, WINDOWS, UnknownName, "magnitude"),
        ({"compensation": "lora"}, WINDOWS, UnknownName, "lora"),
        ({"compensation": "bias", "ridge": 0.1}, WINDOWS, CompensationFailed, "got 0.1 with 'bias'"),
        ({"compensation": "ridge", "ridge": -1.0}, WINDOWS, CompensationFailed, "a ridge of at least 0"),
        ({"compensation": "ridge"}, WINDOWS[:3], CompensationFailed, "at least 4 windows to choose a ridge on; got 3"),
        ({"compensation": "ridge", "ridge": 0.0}, WINDOWS[:1], CompensationFailed, "are singular"),
        ({}, WINDOWS[:0], InvalidWorkload, "at least 1 window"),
    ],
)
def test_what_can_not_be_prepared_is_refused_and_the_model_stays(recipe, windows, error, message):
    llm = build()
    digest = llm.digest
    with pytest.raises(error, match=message):
        prepare_widths(llm, windows, WidthRecipe(**recipe))
    assert llm.digest == digest and llm.refits is None


def test_whole_sites_have_no_parts_to_order():
    with pytest.raises(InvalidMask, match="expected a model of the granularity 'group'"):
        prepare_widths(build_tiny_llm(), WINDOWS)


@pytest.mark.parametrize("weights", ["int8", "int4", {"layer0.mlp": "int4", "layer1.attention": "int4g32"}], ids=str)
@pytest.mark.parametrize("member", ["llama", "opt"])
def test_refits_take_the_number_format_of_the_matrices_that_they_stand_in_for(member, weights, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    llm = quantised_cases.build(member)
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="ridge", ridge=0.1))
    digest = llm.digest
    llm.quantise(weights)
    assert llm.digest != digest
    numbers = [len(bits) for _site, bits in PruningMask.all_kept(llm.shape).kept_parts]
    mask = PruningMask.from_widths(llm.shape, [number - 1 for number in numbers])
    tensors = {}
    for site in kept_sites(mask):
        layer = llm.layer_of(site)
        output, (refit, _) = layer.output(site.kind), llm.refits.of(site)
        expected = quantised_cases.numbers_of(output.requantised(refit, None))
        assert torch.equal(quantised_cases.numbers_of(output), expected)
        assert (quantised_cases.numbers_of(output) - refit.double()).abs().max() < 0.15 * refit.abs().max()
        tensors |= {id(p): p for module in layer.modules_of(site.kind) for p in module.parameters()}
    outside = sum(p.nbytes for p in llm.model.parameters()) - sum(
        p.nbytes for site in llm.shape.sites for p in llm.parameters_of(site)
    )
    needed = footprint(llm.shape, mask, Workload(1, 1)).weights_bytes
    assert needed == outside + sum(tensor.nbytes for tensor in tensors.values())
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.isfinite(llm.model(TOKENS).logits).all()


def test_quantised_weights_can_not_be_ordered_any_more(monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    llm = quantised_cases.build("llama", "int8")
    with pytest.raises(UnsupportedArchitecture, match="quantise them afterwards"):
        prepare_widths(llm, WINDOWS)


def test_a_mask_over_parts_in_another_order_is_refused():
    plain, by_wanda, by_norm = build(), build(), build()
    prepare_widths(by_wanda, WINDOWS)
    prepare_widths(by_norm, WINDOWS, WidthRecipe("2ssp", "ridge"))
    mask = PruningMask.from_widths(by_wanda.shape, [1, 2] * 3)
    for other in (plain, by_norm):
        with pytest.raises(InvalidMask, match="expected a mask over the"):
            other.apply(mask)
        with pytest.raises(UnknownName, match="@"):
            PruningMask.from_json(other.shape, mask.to_json())
    again = build()
    prepare_widths(again, WINDOWS, WidthRecipe(compensation="bias"))
    again.apply(PruningMask.from_json(again.shape, mask.to_json()))
    assert again.mask.widths == mask.widths, "compensation leaves the order as it is"
