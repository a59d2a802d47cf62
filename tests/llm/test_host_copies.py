"""The way of a GPU, on a CPU and without pinned memory: tensors leave as a whole and come back from copies."""

import gc

import pytest
import torch

from rap_env.errors import WeightsReleased, WeightsUnavailable
from rap_env.llm import host_copies, parts, weights
from rap_env.llm.host_copies import HostCopies
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import kept_sites
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from tests.llm.quantised_cases import build as build_quantised
from tests.llm.weights_cases import (
    WINDOWS,
    build,
    check_switching,
    every_other,
    everything,
    half,
    logits,
    own_cache,  # noqa: F401
    pruned_logits,
)


@pytest.fixture(autouse=True)
def copies(own_cache, monkeypatch):  # noqa: F811
    monkeypatch.setattr(weights, "_memory_for", lambda _llm, _folder: HostCopies("cpu"))


def parameters_bytes(llm: SwitchableLLM) -> int:
    """Bytes of all distinct tensors that the model's own modules hold."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in llm.model.parameters()}
    return sum(storages.values())


def narrow_bytes(llm: SwitchableLLM) -> int:
    """Bytes of what the applied mask's sites run with, beside the model's own tensors."""
    own = {one.untyped_storage().data_ptr() for one in llm.model.parameters()}
    layers = [getattr(layer.module.__dict__.get("forward"), "args", ([],))[0] for layer in llm._layers]
    found = {}
    for step, _kind in (step for steps in layers for step in steps):
        for one in step.module.parameters():
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(n_bytes for pointer, n_bytes in found.items() if pointer not in own)


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "llama, biases", "qwen3", "opt"])
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_a_model_computes_the_same_bits_after_each_switch(member, granularity):
    llm = build(member, granularity)
    if granularity == "group":
        prepare_widths(llm, WINDOWS)
    check_switching(llm, half(llm), every_other(llm))


@pytest.mark.parametrize("granularity", ["group", "block"])
@pytest.mark.parametrize("format_of", ["int8", "int4"])
def test_a_quantised_model_does_too(format_of, granularity, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    llm = build_quantised("llama, tied, biases", format_of, granularity=granularity)
    check_switching(llm, half(llm), every_other(llm))


def test_refits_stand_in_for_matrices_that_are_not_there():
    llm = build("opt")
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    check_switching(llm, half(llm))


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_what_is_dropped_is_freed_to_the_last_byte(granularity):
    llm = build("llama, 2 KV heads", granularity)
    store, mask, whole = WeightStore(llm), half(llm), parameters_bytes(llm)
    dropped = sum(component.weight_bytes for component in mask.dropped)
    assert store.freed_bytes(mask) == dropped
    for _ in range(2):
        store.switch(mask)
        assert parameters_bytes(llm) + narrow_bytes(llm) == whole - dropped
        store.switch(everything(llm))
        assert parameters_bytes(llm) == whole and narrow_bytes(llm) == 0


def test_nothing_computes_with_what_is_not_there():
    llm = build()
    store = WeightStore(llm)
    store.switch(half(llm))
    for site in llm.shape.sites:
        with pytest.raises(WeightsReleased):
            llm.layer_of(site)
    layer, hidden = llm._layers[0], torch.zeros(1, 3, llm.shape.hidden_size)
    with pytest.raises(RuntimeError):  # a forward that began before: no wrong numbers
        layer.run("mlp", hidden, {})


def test_prefetched_tensors_are_there_before_they_may_be_used():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.switch(half(llm))
    store.prefetch(everything(llm)).result()
    there = {name: one.data_ptr() for name, one in llm.model.named_parameters()}
    assert all(there.values()) and llm.resident == half(llm)
    store.switch(everything(llm))
    assert {name: one.data_ptr() for name, one in llm.model.named_parameters()} == there
    assert torch.equal(logits(llm), whole)


def test_sites_of_other_masks_are_cut_from_the_copies():
    llm = build()
    mask = half(llm)
    expected = pruned_logits(llm, mask)
    store, hidden_and_context = WeightStore(llm), llm.open_stream(torch.arange(18).view(2, 9))
    dense = llm.run(kept_sites(mask), *hidden_and_context)
    store.switch(mask)
    assert torch.equal(llm.run(kept_sites(mask), *hidden_and_context), dense)
    assert torch.equal(logits(llm), expected)


def test_a_device_without_room_is_told_and_what_is_there_goes_on(monkeypatch):
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    store.switch(mask)
    pruned, n_bytes = logits(llm), parameters_bytes(llm)
    calls, empty = [], torch.empty

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return empty(*arguments, **options)

    monkeypatch.setattr(host_copies.torch, "empty", full)
    with pytest.raises(WeightsUnavailable, match=r"cpu has no room for model\.layers\.0\..*: full"):
        store.switch(everything(llm))
    gc.collect()
    assert llm.mask == llm.resident == mask and parameters_bytes(llm) == n_bytes
    assert torch.equal(logits(llm), pruned)
    store.switch(everything(llm))


def test_a_model_that_is_changed_has_all_its_tensors_again():
    llm = build()
    store, whole, n_bytes = WeightStore(llm), logits(llm), parameters_bytes(llm)
    store.switch(half(llm))
    llm.weights_changed()
    assert llm.store is None and parameters_bytes(llm) == n_bytes and torch.equal(logits(llm), whole)
