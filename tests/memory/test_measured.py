"""Measured peaks see what a block takes at most, also when it is freed again, and nothing of what was there before."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from rap_env.memory import measured
from rap_env.memory.measured import (
    keep_less_freed_memory,
    measured_peak,
    return_freed_memory,
    trim_freed_memory,
)

MB = 1_000_000


def ones(n_bytes: int) -> torch.Tensor:
    return torch.ones(n_bytes // 8, dtype=torch.float64)


@pytest.fixture(params=["high-water mark", "sampling"])
def method(request, monkeypatch) -> str:
    """Both ways of measuring a process."""
    if request.param == "sampling":
        monkeypatch.setattr(measured, "_reset_high_water_mark", lambda: False)
    elif not measured._reset_high_water_mark():
        pytest.skip("the high-water mark can't be reset here")
    return request.param


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_tensor_is_seen_within_a_tenth(method, device):
    with measured_peak(device) as peak:
        tensor = ones(200 * MB)
    assert tensor.nbytes == 200 * MB
    assert 180 * MB < peak.peak_bytes < 220 * MB


def test_a_tensor_that_is_freed_before_the_end_is_seen(method):
    with measured_peak() as peak:
        ones(200 * MB).max()  # long enough for a sample
    assert 180 * MB < peak.peak_bytes < 220 * MB


def test_only_what_is_alive_at_once_adds_up(method):
    with measured_peak() as peak:
        for _ in range(3):
            ones(100 * MB).max()
    assert 90 * MB < peak.peak_bytes < 110 * MB


def test_what_was_there_or_freed_before_the_block_is_not_seen(method):
    tensor = ones(200 * MB)
    ones(200 * MB).max()
    with measured_peak() as peak:
        assert tensor[-1] == 1
    assert 0 <= peak.peak_bytes < 10 * MB


def test_memory_that_the_c_library_kept_does_not_hide_the_peak(method):
    blocks = [ones(100_000) for _ in range(1_000)]  # too small to be mapped: freed ones stay with the C library
    last = ones(100_000)
    del blocks
    with measured_peak() as peak:
        blocks = [ones(100_000) for _ in range(1_000)]
    assert len(blocks) == 1_000 and last.nbytes == 100_000
    assert 90 * MB < peak.peak_bytes < 110 * MB


def test_the_peak_is_known_when_the_block_raises(method):
    with pytest.raises(KeyError), measured_peak() as peak:
        ones(100 * MB).max()
        raise KeyError
    assert 90 * MB < peak.peak_bytes < 110 * MB


def test_the_peak_is_zero_until_the_block_ends():
    with measured_peak() as peak:
        assert peak.peak_bytes == 0


@pytest.mark.parametrize("reason", ["no such file", "not permitted", "no such line", "nothing was reset"])
def test_a_high_water_mark_that_can_not_be_reset_is_not_used(monkeypatch, tmp_path, reason):
    clear_refs, status = tmp_path / "clear_refs", tmp_path / "status"
    status.write_text("VmHWM:\t  400000 kB\nVmRSS:\t  200000 kB\n" if reason != "no such line" else "Name:\tpython\n")
    if reason == "not permitted":
        clear_refs.mkdir()  # writing raises an OSError, also for root
    monkeypatch.setattr(measured, "_CLEAR_REFS", clear_refs)
    monkeypatch.setattr(measured, "_STATUS", status if reason != "no such file" else tmp_path / "missing")
    assert not measured._reset_high_water_mark()
    if reason == "nothing was reset":
        assert clear_refs.read_text() == "5"
        status.write_text("VmHWM:\t  200000 kB\nVmRSS:\t  200000 kB\n")
        assert measured._reset_high_water_mark()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)])
@pytest.mark.parametrize("raising", [False, True])
def test_on_cuda_the_allocator_is_asked(monkeypatch, device, raising):
    calls = []  # nothing here has run on a GPU: only that torch is asked the right things in the right order

    def answer(name: str, n_bytes: int | None = None):
        monkeypatch.setattr(torch.cuda, name, lambda on: calls.append((name, on)) or n_bytes)

    answer("reset_peak_memory_stats")
    answer("memory_allocated", 300 * MB)
    answer("max_memory_allocated", 1_000 * MB)
    try:
        with measured_peak(device) as peak:
            calls.append("block")
            if raising:
                raise KeyError
    except KeyError:
        assert raising
    on = torch.device(device)
    assert calls == [
        ("reset_peak_memory_stats", on),
        ("memory_allocated", on),
        "block",
        ("max_memory_allocated", on),
    ]
    assert peak.peak_bytes == 700 * MB


def test_glibc_is_told_to_map_large_blocks(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert return_freed_memory()
    assert calls == [(-3, 131_072)]  # M_MMAP_THRESHOLD of malloc.h
    assert keep_less_freed_memory()
    assert calls[1:] == [(-3, 524_288), (-1, 4_194_304)]  # and M_TRIM_THRESHOLD


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def refuse(name):
        raise error

    trim_freed_memory()  # else the tensor may lie in what an earlier test left, which is resident already
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not return_freed_memory() and not keep_less_freed_memory()
    with measured_peak() as peak:
        tensor = ones(100 * MB)
    assert tensor.nbytes == 100 * MB
    assert 90 * MB < peak.peak_bytes < 110 * MB
