"""A weight store for a long time and among threads: nothing leaks, and nothing wrong is computed."""

import gc
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rap_env.errors import WeightsReleased
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask, kept_sites
from tests.llm.test_parts import TOKENS
from tests.llm.weights_cases import (
    build,
    everything,
    half,
    less,
    logits,
    own_cache,  # noqa: F401
    pruned_logits,
    switching_leaks_nothing,
)


def test_a_prefetch_that_fails_leaves_the_reading_to_the_restore(monkeypatch):
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.switch(half(llm))
    reading = store.memory.read

    def read(pieces) -> None:
        if threading.current_thread().name.startswith("weights"):
            raise SystemExit("the thread is told to end")
        reading(pieces)

    monkeypatch.setattr(store.memory, "read", read)
    with pytest.raises(SystemExit):
        store.prefetch(everything(llm)).result()
    store.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_a_restore_needs_no_thread():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.switch(half(llm))
    store._reader.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        store.prefetch(everything(llm))
    store.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_a_restore_while_the_same_is_prefetched_reads_the_same():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    for _ in range(50):
        store.switch(half(llm))
        begun = store.prefetch(everything(llm))
        store.switch(everything(llm))
        begun.result()
    assert torch.equal(logits(llm), whole)


def test_a_thousand_switches_leak_nothing():
    llm = build()
    switching_leaks_nothing(WeightStore(llm), half(llm), less(llm))


def test_stores_that_are_gone_leave_neither_files_nor_mappings_behind():
    llm = build()
    WeightStore(llm).switch(half(llm))

    def used() -> tuple[int, int]:
        gc.collect()
        return psutil.Process().num_fds(), Path("/proc/self/maps").read_text().count("/weights/")

    before = used()
    for _ in range(20):
        WeightStore(llm).switch(half(llm))
    files, mappings = (now - then for now, then in zip(used(), before, strict=True))
    assert files <= 2 and mappings <= before[1]  # of the last one


def test_what_the_applied_mask_needs_is_not_released():
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    store.switch(mask)
    pruned = logits(llm)
    with pytest.raises(WeightsReleased, match=r"layer0\.attention\.0"):
        store.release(mask.drop(mask.kept[0]))
    assert store.resident == mask and torch.equal(logits(llm), pruned)


class Repeating(threading.Thread):
    """Calls a function again and again until it is ended; what it raised is raised then."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function, self._ended, self._raised = function, threading.Event(), None
        self.calls = 0
        self.start()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                self._function()
                self.calls += 1
        except BaseException as error:
            self._raised = error

    def end(self) -> None:
        self._ended.set()
        self.join(60)
        assert not self.is_alive()
        if self._raised is not None:
            raise self._raised


def test_generating_evaluating_and_switching_at_once_computes_nothing_wrong():
    llm = build()
    small, large = masks = masks_of_other_mlps(llm)
    both = PruningMask(small.components, tuple(a and b for a, b in zip(small.keep, large.keep, strict=True)))
    allowed = [pruned_logits(llm, mask) for mask in mixtures(llm, masks)]
    with torch.inference_mode():
        stream = llm.open_stream(TOKENS)
        evaluated = llm.run(kept_sites(both), *stream)
    store = WeightStore(llm)
    with torch.inference_mode():
        evaluated_by_columns = llm.run(kept_sites(both), *stream)
    assert torch.allclose(evaluated, evaluated_by_columns, atol=1e-4)
    store.switch(small)

    def generate() -> None:
        found = logits(llm)  # a forward that a switch meets has layers of both masks
        assert any(torch.allclose(found, expected, atol=1e-4) for expected in allowed)
        with torch.inference_mode():
            generated = llm.model.generate(TOKENS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert generated.shape == (2, 8)

    def evaluate() -> None:
        with torch.inference_mode():
            ((_mask, found),) = llm.run_masks([both], *stream)
        assert torch.equal(found, evaluated_by_columns)

    threads = [Repeating(generate), Repeating(evaluate)]
    until = time.monotonic() + 5
    for mask in itertools.cycle((large, small)):
        if time.monotonic() > until or not all(thread.is_alive() for thread in threads):
            break
        store.prefetch(mask)
        store.switch(mask)
    for thread in threads:
        thread.end()
        assert thread.calls > 10
    store.switch(small)
    assert torch.allclose(logits(llm), allowed[0], atol=1e-4)


def masks_of_other_mlps(llm: SwitchableLLM) -> tuple[PruningMask, PruningMask]:
    """Two masks that keep the same heads, so that a cache holds for both, and other parts of MLPs."""
    sites = [site for site, _own in llm.shape.components.sites]
    small = [1 if site.kind == "attention" or site.layer % 2 else 2 for site in sites]
    large = [1 if site.kind == "attention" or not site.layer % 2 else 3 for site in sites]
    return PruningMask.from_widths(llm.shape, small), PruningMask.from_widths(llm.shape, large)


def mixtures(llm: SwitchableLLM, masks: tuple[PruningMask, PruningMask]) -> list[PruningMask]:
    """Every choice of one of two masks for each layer, the first mask alone first."""
    found = []
    for choice in itertools.product((0, 1), repeat=llm.shape.n_layers):
        rows = enumerate(llm.shape.components)
        found.append(PruningMask.from_bits(llm.shape, [masks[choice[row.site.layer]].keep[at] for at, row in rows]))
    return found
