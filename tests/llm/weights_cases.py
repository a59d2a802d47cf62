"""What the tests of the weight store share: models, masks, and a process's memory."""

import gc

import psutil
import pytest
import torch

from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from tests.llm.test_parts import GROUP, MEMBERS, TOKENS

WINDOWS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(4))
LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))


def build(member: str = "llama, 2 KV heads", granularity: str = "group") -> SwitchableLLM:
    whole = build_random_llm(*MEMBERS[member])
    return SwitchableLLM(whole.model, whole.tokenizer, "stored", granularity)


def logits(llm: SwitchableLLM) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model(TOKENS).logits


def pruned_logits(llm: SwitchableLLM, mask: PruningMask) -> torch.Tensor:
    with llm.pruned(mask):
        return logits(llm)


def everything(llm: SwitchableLLM) -> PruningMask:
    return PruningMask.all_kept(llm.shape)


def half(llm: SwitchableLLM) -> PruningMask:
    """The first half of every site's parts; of whole sites none."""
    return PruningMask.from_widths(
        llm.shape, [(own.stop - own.start) // 2 for _site, own in llm.shape.components.sites]
    )


def less(llm: SwitchableLLM) -> PruningMask:
    """One part of every site; a mask that follows another one without the whole model in between."""
    return PruningMask.from_widths(
        llm.shape, [1 if own.stop - own.start > 1 else 0 for _site, own in llm.shape.components.sites]
    )


def every_other(llm: SwitchableLLM) -> PruningMask:
    """Parts that don't lie side by side."""
    return PruningMask.from_bits(llm.shape, [number % 2 == 1 for number in range(len(llm.shape.components))])


def check_switching(llm: SwitchableLLM, *masks: PruningMask) -> WeightStore:
    """Makes a store, and sees the same bits after each switch as without it."""
    whole, expected = logits(llm), [pruned_logits(llm, mask) for mask in masks]
    digest = llm.digest
    store = WeightStore(llm)
    assert llm.digest == digest
    for _ in range(2):
        assert torch.equal(logits(llm), whole)
        for mask, pruned in zip(masks, expected, strict=True):
            store.switch(mask)
            assert llm.resident == store.resident == llm.mask == mask and torch.equal(logits(llm), pruned)
        store.switch(everything(llm))
    return store


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def check_memory(store: WeightStore, llm: SwitchableLLM, mask: PruningMask, least: float = 0.98) -> None:
    """What a switch frees is what `freed_bytes` says, and nearly all that the dropped components weigh."""
    freed, dropped = store.freed_bytes(mask), sum(component.weight_bytes for component in mask.dropped)
    assert least * dropped <= freed <= dropped and dropped > 24e6  # the process's own noise is small beside it
    for _ in range(2):
        for to in (everything(llm), mask):
            store.switch(to)
            logits(llm)
    store.switch(everything(llm))
    before = resident_bytes()
    store.switch(mask)
    logits(llm)
    assert abs(before - resident_bytes() - freed) < 0.03 * freed
    store.switch(everything(llm))
    assert abs(before - resident_bytes()) < 0.03 * freed


def switching_leaks_nothing(store: WeightStore, *masks: PruningMask, rounds: int = 500) -> None:
    """Switches to and fro, and finds as much memory and as many files, threads and mappings as after the first few."""

    def used() -> tuple[int, ...]:
        process = psutil.Process()
        return process.num_fds(), process.num_threads(), len(process.memory_maps(grouped=False))

    def switch_all(n: int) -> None:
        for _ in range(n):
            for mask in masks:
                store.switch(mask)

    switch_all(20)
    gc.collect()  # what earlier tests left is not to go meanwhile
    before, memory = used(), resident_bytes()
    switch_all(rounds)
    assert resident_bytes() - memory < 4e6
    files, threads, mappings = (now - then for now, then in zip(used(), before, strict=True))
    assert files == 0 and threads <= 0 and mappings < 200  # of a leak there would be two thousand
