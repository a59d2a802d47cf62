"""What can happen to the file of a weight store, to the folder it is in, and to the model that it is of."""

import errno
import mmap
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rap_env.errors import WeightsUnavailable
from rap_env.llm.weights import WeightStore
from tests.llm.weights_cases import build, everything, half, logits, own_cache, pruned_logits  # noqa: F401

HEADER_BYTES = 4096


def flip(path: Path, offset: int) -> None:
    """Flips the bits of one byte, some time after what was written before."""
    time.sleep(0.02)  # clocks of file systems are coarse
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 255]))


def cut(path: Path, n_bytes: int) -> None:
    path.chmod(0o600)
    os.truncate(path, n_bytes)


def last_absent_byte(store: WeightStore) -> int:
    """A byte of the file that is not in memory: the last one of a tensor of which parts were released."""
    one, (_start, end) = store._pieces(store.resident, needed=False)[-1]
    return store.memory._starts[one] + end - 1


@pytest.mark.parametrize("where", ["weights", "header"])
def test_a_file_that_was_written_to_is_told_and_the_mask_before_still_computes(where):
    llm = build()
    store, mask, whole = WeightStore(llm), half(llm), logits(llm)
    store.switch(mask)
    pruned, path = logits(llm), store.memory.path
    place = 20 if where == "header" else last_absent_byte(store)
    flip(path, place)
    for restoring in (store.restore, store.switch, lambda mask: store.prefetch(mask).result()):
        with pytest.raises(WeightsUnavailable, match="are not those that were written"):
            restoring(everything(llm))
    assert store.resident == llm.mask == mask and torch.equal(logits(llm), pruned)
    flip(path, place)
    store.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_a_file_is_not_written_to_by_accident():
    assert WeightStore(build()).memory.path.stat().st_mode & 0o777 == 0o444


def test_a_file_that_was_only_touched_is_read_on():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.switch(half(llm))
    os.utime(store.memory.path, (1, 1))
    store.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_an_input_error_while_pages_are_read_is_told_and_does_not_end_the_process(monkeypatch):
    try:
        mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).madvise(22, 0, 4096)
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("this kernel can't read pages on demand")
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    store.switch(mask)
    monkeypatch.setattr(store.memory, "_check", lambda: None)  # as if the file were cut just afterwards
    cut(store.memory.path, HEADER_BYTES)
    with pytest.raises(WeightsUnavailable, match="can't be read"):
        store.switch(everything(llm))
    assert store.resident == llm.mask == mask


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "header"])
def test_a_damaged_file_is_written_anew_when_a_store_is_made(damage):
    llm = build()
    store = WeightStore(llm)
    path, whole = store.memory.path, logits(llm)
    content = path.read_bytes()
    if damage == "flipped":
        flip(path, HEADER_BYTES * 3 + 1)
    elif damage == "header":
        flip(path, 20)
    else:
        cut(path, 0 if damage == "emptied" else len(content) - 4096)
    llm = build()
    store = WeightStore(llm)
    assert path.read_bytes() == content
    store.switch(half(llm))
    store.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_each_granularity_has_a_file_of_its_own_that_is_written_once():
    written = {WeightStore(build(granularity="block")).memory.path: None}
    written = {path: path.stat().st_ino for path in [*written, WeightStore(build()).memory.path]}
    assert len(written) == 2
    for granularity in ("block", "group"):
        path = WeightStore(build(granularity=granularity)).memory.path
        assert path.stat().st_ino == written[path]


def limited_files(n_bytes: int, function: Callable[[], object]) -> None:
    """Calls a function while no file may become larger; the disk is full, as far as it can tell."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_cannot_be_written_is_told_and_nothing_of_it_stays(tmp_path):
    llm = build()
    whole = logits(llm)

    def refused(folder: Path) -> None:
        with pytest.raises(WeightsUnavailable, match=r"can't be written to .*safetensors"):
            WeightStore(llm, folder)

    limited_files(3 * 4096, lambda: refused(tmp_path / "full"))
    assert list((tmp_path / "full").iterdir()) == []
    (tmp_path / "file").write_text("no folder")
    refused(tmp_path / "file")
    assert llm.store is None and torch.allclose(logits(llm), whole, atol=2e-5)
    before = logits(llm)
    store = WeightStore(llm, tmp_path / "full")  # there is room again
    store.switch(half(llm))
    store.switch(everything(llm))
    assert torch.equal(logits(llm), before)


def test_two_models_share_one_file_and_nothing_else():
    first, second = build(), build()
    stores = [WeightStore(first), WeightStore(second)]
    assert stores[0].memory.path == stores[1].memory.path
    whole, pruned = logits(second), pruned_logits(second, half(second))
    stores[0].switch(half(first))
    assert torch.equal(logits(second), whole) and second.resident == everything(second)
    stores[1].switch(half(second))
    stores[0].switch(everything(first))
    assert torch.equal(logits(first), whole) and torch.equal(logits(second), pruned)


def test_a_second_store_of_a_model_takes_the_place_of_the_first():
    llm = build()
    first, whole = WeightStore(llm), logits(llm)
    first.switch(half(llm))
    second = WeightStore(llm)
    assert llm.store is second and llm.resident == everything(llm) and torch.equal(logits(llm), whole)
    for refused in (first.switch, first.release, first.restore, first.prefetch):
        with pytest.raises(WeightsUnavailable, match="was changed, or has another store, since this one was made"):
            refused(half(llm))
    second.switch(half(llm))
    second.switch(everything(llm))
    assert torch.equal(logits(llm), whole)


def test_a_model_that_is_changed_has_everything_in_memory_and_its_store_is_of_no_use():
    llm = build()
    store, whole = WeightStore(llm), logits(llm)
    store.switch(half(llm))
    llm.weights_changed()
    assert llm.store is None and llm.resident == llm.mask == everything(llm) and torch.equal(logits(llm), whole)
    with pytest.raises(WeightsUnavailable, match="make it anew"):
        store.switch(half(llm))
    assert torch.equal(logits(llm), whole)


def test_a_model_is_quantised_with_what_was_released():
    llm, other = build(), build()
    WeightStore(other)  # output matrices by columns
    other.quantise("int8")
    WeightStore(llm).switch(half(llm))
    llm.quantise("int8")
    assert llm.store is None and torch.equal(logits(llm), logits(other))
    store = WeightStore(llm)
    store.switch(half(llm))
    store.switch(everything(llm))
    assert torch.equal(logits(llm), logits(other))


def test_a_model_is_not_changed_while_what_it_lacks_cannot_be_read():
    llm = build()
    store, mask = WeightStore(llm), half(llm)
    store.switch(mask)
    pruned, size = logits(llm), store.memory.path.stat().st_size
    cut(store.memory.path, size - 4096)
    with pytest.raises(WeightsUnavailable):
        llm.quantise("int8")
    assert llm.store is store and llm.mask == mask and torch.equal(logits(llm), pruned)
