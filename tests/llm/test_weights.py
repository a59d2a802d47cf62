"""The weight store: memory that comes back, the same bits afterwards, and nothing that runs on what is gone."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rap_env.components import Site
from rap_env.errors import UnsupportedArchitecture, WeightsReleased, WeightsUnavailable
from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.widths.prepare import prepare_widths
from tests.llm.test_parts import MEMBERS, TOKENS
from tests.llm.weights_cases import (
    LARGE,
    WINDOWS,
    build,
    check_memory,
    check_switching,
    every_other,
    everything,
    half,
    logits,
    own_cache,  # noqa: F401
    resident_bytes,
)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_a_model_computes_the_same_bits_from_its_store_and_after_each_switch(member, granularity):
    llm = build(member, granularity)
    if granularity == "group":
        prepare_widths(llm, WINDOWS)
    store = check_switching(llm, half(llm), every_other(llm))
    names = dict(llm.model.named_parameters())
    with safe_open(store.memory.path, "pt") as file:  # the file is an ordinary one
        for name in (name for name in file.keys() if not name.startswith("filled")):  # noqa: SIM118
            stored = file.get_tensor(name)
            assert torch.equal(stored.T if name.endswith(".T") else stored, names[name.removesuffix(".T")])


def test_parts_in_the_checkpoints_own_order_are_stored_by_columns_too():
    llm = build()
    plain, digest = logits(llm), llm.digest
    WeightStore(llm)
    assert llm.digest != digest and torch.allclose(logits(llm), plain, atol=2e-5)


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_what_is_released_leaves_the_process_and_comes_back(granularity, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    whole = build_random_llm("llama", LARGE)
    llm = SwitchableLLM(whole.model, whole.tokenizer, "large", granularity)
    check_memory(WeightStore(llm), llm, half(llm) if granularity == "group" else every_other(llm))


def test_reading_parts_brings_nothing_else_into_memory(monkeypatch):
    """Linux maps what lies around a page too: 64 KiB, or 2 MiB of a large folio."""
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 64)
    whole = build_random_llm("llama", LARGE)
    llm = SwitchableLLM(whole.model, whole.tokenizer, "large", "group")
    store = WeightStore(llm)
    widths = [(own.stop - own.start) // 2 for _site, own in llm.shape.components.sites]
    few, more = (PruningMask.from_widths(llm.shape, [width + more for width in widths]) for more in (0, 1))
    for _ in range(2):
        for mask in (everything(llm), few, more):
            store.switch(mask)
            logits(llm)
    store.switch(few)
    before = resident_bytes()
    store.prefetch(more).result()
    expected = more.weight_bytes - few.weight_bytes
    assert expected > 4e6 and abs(resident_bytes() - before - expected) < 0.1 * expected


def test_nothing_runs_on_what_is_released():
    llm = build()
    store, mask = WeightStore(llm), half(build())
    with pytest.raises(
        WeightsReleased, match=r"layer0\.attention\.1, layer0\.mlp\.\S+, layer0\.mlp\.\S+ and \d+ others"
    ):
        store.release(mask)  # the mask that is applied keeps everything
    store.switch(mask)
    everything = PruningMask.all_kept(llm.shape)
    hidden, context = llm.open_stream(TOKENS)
    for forbidden in (
        lambda: llm.apply(everything),
        lambda: list(llm.run_masks([everything], hidden, context)),
        lambda: llm.run([Site(0, "mlp")], hidden, context),
    ):
        with pytest.raises(WeightsReleased, match="are not in memory: restore them"):
            forbidden()
    assert llm.mask == mask
    store.restore(everything)
    llm.apply(everything)


def test_a_file_that_lost_something_is_told_and_what_is_in_memory_goes_on():
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    store.switch(mask)
    pruned = logits(llm)
    content = store.memory.path.read_bytes()
    store.memory.path.chmod(0o600)
    with store.memory.path.open("r+b") as file:
        file.truncate(len(content) - 4096)
    for restoring in (store.restore, store.switch, lambda mask: store.prefetch(mask).result()):
        with pytest.raises(WeightsUnavailable, match=r"expected .* bytes of weights in"):
            restoring(PruningMask.all_kept(llm.shape))
    assert store.resident == llm.mask == mask
    store.memory.path.write_bytes(content)
    store.switch(PruningMask.all_kept(llm.shape))
    store.switch(mask)
    assert torch.equal(logits(llm), pruned)


def test_a_file_that_is_gone_is_still_there_for_who_has_it_open():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.memory.path.unlink()
    store.switch(half(llm))
    store.prefetch(PruningMask.all_kept(llm.shape)).result()
    store.switch(PruningMask.all_kept(llm.shape))
    assert torch.equal(logits(llm), whole)


def test_switching_while_another_thread_generates_disturbs_nothing():
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    with llm.pruned(mask):
        pruned = logits(llm)
    whole, seen, done = logits(llm), [], threading.Event()

    def generate() -> None:
        while not done.is_set():
            seen.append(logits(llm))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(50):
            store.switch(mask)
            store.switch(PruningMask.all_kept(llm.shape))
    finally:
        done.set()
        thread.join()
    assert all(torch.isfinite(one).all() for one in seen)
    assert torch.equal(logits(llm), whole)
    store.switch(mask)
    assert torch.equal(logits(llm), pruned)


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_weights_of_types_that_no_file_holds_are_refused_and_nothing_is_written(granularity, tmp_path: Path):
    llm = build("llama, 2 KV heads", granularity)
    llm.layer_of(llm.shape.sites[-1]).output("mlp").double()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnsupportedArchitecture, match=r"expected weights of the types F32, .*; got .*down_proj"):
        WeightStore(llm)
    assert sorted(tmp_path.rglob("*")) == before and llm.store is None
