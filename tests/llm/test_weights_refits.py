"""The weight store over a model with refits: their matrices stand in for output matrices, which leave then."""

import pytest
import torch

from rap_env.errors import CompensationFailed
from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from tests.llm.quantised_cases import build as build_for_int4
from tests.llm.weights_cases import (
    LARGE,
    WINDOWS,
    build,
    check_memory,
    check_switching,
    every_other,
    everything,
    half,
    less,
    logits,
    own_cache,  # noqa: F401
    switching_leaks_nothing,
)


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "llama, biases", "qwen3", "opt"])
@pytest.mark.parametrize("compensation", ["bias", "ridge"])
def test_a_model_with_refits_computes_the_same_bits_after_each_switch(member, compensation):
    llm = build(member)
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation=compensation))
    check_switching(llm, half(llm))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_refits_of_quantised_models_switch_too(weights, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    llm = build_for_int4("llama, tied, biases")
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    llm.quantise(weights)
    check_switching(llm, half(llm))


def test_output_matrices_that_a_refit_stands_in_for_leave_the_process(monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 256)  # few widths, so that few refits are written
    whole = build_random_llm("llama", LARGE)
    llm = SwitchableLLM(whole.model, whole.tokenizer, "large", "group")
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    check_memory(WeightStore(llm), llm, half(llm))


def test_no_page_of_an_output_matrix_is_read_for_a_refit():
    llm = build()
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    store, read = WeightStore(llm), []
    outputs = {id(llm.layer_of(site).output(site.kind).weight) for site in llm.shape.sites}
    reading = store.memory.read
    store.memory.read = lambda pieces: (read.extend(pieces), reading(pieces))
    store.switch(half(llm))
    store.release(half(llm))
    store.switch(half(llm))
    assert not outputs & {id(one.parameter) for one, _span in read}
    store.switch(everything(llm))
    assert outputs <= {id(one.parameter) for one, _span in read}


@pytest.mark.parametrize("stored", [False, True])
def test_a_mask_that_refits_refuse_changes_nothing(stored):
    llm = build("llama, as many KV heads")
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    if stored:
        WeightStore(llm).switch(half(llm))
    llm.apply(half(llm))
    pruned, resident = logits(llm), llm.resident
    refused = every_other(llm).restore(*[component for component in llm.shape.components if component.site.layer == 0])
    switch = llm.store.switch if stored else llm.apply
    with pytest.raises(CompensationFailed, match="keep the first parts of each site; layer1"):
        switch(refused)
    assert llm.mask == half(llm) and llm.resident == resident and torch.equal(logits(llm), pruned)


def test_a_thousand_switches_with_refits_leak_nothing():
    llm = build()
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    switching_leaks_nothing(WeightStore(llm), half(llm), less(llm))
