"""Each site can have a number format of its own: bytes, masks and digests are those of the real tensors."""

import pytest
import torch

from rap_env.components import Site
from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.llm.formats import quantise
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from tests.llm.quantised_cases import MEMBERS, TOKENS, build, dequantised, masks_over

MIXED = {"layer0.mlp": "int4", "layer1.attention": "int4g32", "layer1.mlp": "full"}  # and layer 0's attention in INT8


@pytest.mark.parametrize("weights", ["int8", "int4", "int4g32"])
def test_a_mapping_with_one_format_is_that_format_bit_by_bit(weights):
    sites = [site.name for site in build("llama").shape.sites]
    mapped, plain = build("llama", dict.fromkeys(sites, weights)), build("llama", weights)
    assert mapped.digest == plain.digest and mapped.shape == plain.shape
    with torch.inference_mode():
        assert torch.equal(mapped.model(TOKENS).logits, plain.model(TOKENS).logits)


@pytest.mark.parametrize("granularity", ["block", "group"])
@pytest.mark.parametrize("member", MEMBERS)
def test_rows_count_the_tensors_of_each_sites_own_format(member, granularity):
    llm = build(member, MIXED, granularity=granularity)
    tensors = {t.data_ptr(): t.nbytes for t in llm.model.state_dict().values()}  # of a tied head once
    assert llm.shape.weight_bytes == sum(tensors.values())
    for site in llm.shape.sites:
        alike = build(member, MIXED.get(site.name, "int8"), granularity=granularity)
        own = [row for row in llm.shape.components if row.site == site]
        assert own == [row for row in alike.shape.components if row.site == site]
        if granularity == "block":
            assert own[0].weight_bytes == sum(p.nbytes for p in llm.parameters_of(site))
    assert ModelShape.from_config(llm.model.config, torch.float32, granularity, MIXED) == llm.shape


@pytest.mark.parametrize("member", MEMBERS)
def test_masked_logits_are_those_of_the_dequantised_model(member):
    llm = build(member, MIXED)
    plain = dequantised(llm, "group")
    for mask in masks_over(llm):
        by_name = PruningMask.all_kept(plain.shape).drop(*mask.dropped)
        with torch.inference_mode(), llm.pruned(mask), plain.pruned(by_name):
            torch.testing.assert_close(llm.model(TOKENS).logits, plain.model(TOKENS).logits, rtol=0, atol=1e-4)


def test_sites_that_are_not_named_are_int8_as_embedding_and_head():
    llm, int8, int4 = build("llama", {"layer1.mlp": "int4"}), build("llama", "int8"), build("llama", "int4")
    named = Site(1, "mlp").name
    for name, tensor in llm.model.state_dict().items():
        other = int4 if name.startswith("model.layers.1.mlp") else int8
        assert torch.equal(tensor, other.model.state_dict()[name]), (name, named)
    assert build("llama", {}).digest == int8.digest != llm.digest


def test_unknown_sites_and_formats_are_refused_with_what_is_known():
    with pytest.raises(UnknownName, match=r"unknown site 'layer2.mlp'; did you mean layer1.mlp or layer0.mlp"):
        build("llama", {"layer2.mlp": "int4"})
    with pytest.raises(UnknownName, match=r"unknown site 'all'; known: layer0.attention, layer0.mlp, "):
        build("llama", {"all": "int4"})
    with pytest.raises(UnknownName, match=r"unknown format of weights 'int3'; did you mean"):
        load_llm("no such model", weights={"layer0.mlp": "int3"})


def test_int4_of_one_site_whose_sizes_do_not_allow_it_changes_nothing():
    tiny = build_tiny_llm()
    before = tiny.digest
    with pytest.raises(UnsupportedArchitecture, match=r"int4 weights; layer3.mlp.gate_proj has 32 inputs"):
        quantise(tiny.model, {"layer3.mlp": "int4"})
    tiny.weights_changed()
    assert tiny.digest == before
