"""The weight store over INT8 and INT4 weights: the same bits after switching, and what of them leaves memory."""

import weakref

import pytest
import torch
from safetensors import safe_open

from rap_env.llm import parts
from rap_env.llm.formats import quantise
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.widths.prepare import prepare_widths
from tests.llm.quantised_cases import MEMBERS, build
from tests.llm.weights_cases import (
    LARGE,
    WINDOWS,
    check_memory,
    check_switching,
    every_other,
    everything,
    half,
    less,
    own_cache,  # noqa: F401
    switching_leaks_nothing,
)

FORMATS = {
    "int8": "int8",
    "int4": "int4",
    "int4g32": "int4g32",
    "mixed": {"layer0.mlp": "int4", "layer1.attention": "full", "layer1.mlp": "int4g32"},
}


@pytest.fixture(autouse=True)
def parts_of_64(own_cache, monkeypatch):  # noqa: F811
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)  # INT4 wants parts in multiples of it


def large(weights: str, granularity: str = "group", n_layers: int = 24) -> SwitchableLLM:
    sizes = LARGE | {"num_hidden_layers": n_layers}
    whole = build_random_llm("llama", sizes, dtype="bfloat16")
    return SwitchableLLM(quantise(whole.model, weights), whole.tokenizer, "large", granularity)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_a_quantised_model_computes_the_same_bits_after_each_switch(member, weights, granularity):
    llm = build(member, FORMATS[weights], granularity=granularity)
    if weights == "mixed" and granularity == "group":
        WeightStore(llm)  # its matrices in floating point lie by columns from now on
    store = check_switching(llm, half(llm), every_other(llm))
    names = dict(llm.model.named_parameters())
    with safe_open(store.memory.path, "pt") as file:  # the file is an ordinary one
        for name in (name for name in file.keys() if not name.startswith("filled")):  # noqa: SIM118
            tensor, own = file.get_tensor(name), names[name.removesuffix(".T")]
            assert tensor.dtype == own.dtype and torch.equal(tensor.T if name.endswith(".T") else tensor, own)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_kernels_of_few_rows_and_tiles_of_many_find_the_same_weights(weights, monkeypatch):
    monkeypatch.setattr("tests.llm.weights_cases.TOKENS", WINDOWS.repeat(2, 1))  # 96 rows
    check_switching(llm := build("llama", weights, dtype="bfloat16"), half(llm))


def test_parts_in_an_order_and_then_quantised_switch_too():
    llm = build("llama")
    prepare_widths(llm, WINDOWS)
    llm.quantise("int8", kv_cache="int8")
    check_switching(llm, half(llm))


@pytest.mark.parametrize(("weights", "granularity"), [("int8", "group"), ("int8", "block"), ("int4g32", "block")])
def test_what_is_released_leaves_the_process_and_comes_back(weights, granularity):
    llm = large(weights, granularity)
    check_memory(WeightStore(llm), llm, half(llm))


def test_int4_parts_leave_but_for_the_edges_of_pages():
    llm = large("int4", n_layers=2)
    store, mask = WeightStore(llm), half(llm)
    dropped = sum(component.weight_bytes for component in mask.dropped)
    assert 0.97 * dropped <= store.freed_bytes(mask) <= dropped
    assert store.freed_bytes(everything(llm)) == 0


def test_layers_of_the_mask_before_are_gone_after_a_switch():
    llm = large("int8", n_layers=2)
    store = WeightStore(llm)
    store.switch(half(llm))
    before = [weakref.ref(layer.module) for layer in llm._narrowed.values()]
    assert before and all(one() is not None for one in before)
    store.switch(less(llm))
    assert all(one() is None for one in before)


def test_a_thousand_switches_with_copies_leak_nothing():
    llm = build("llama", "int8")
    switching_leaks_nothing(WeightStore(llm), half(llm), less(llm))
