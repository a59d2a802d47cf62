"""Measured peak bytes: of the allocator on CUDA, of the process everywhere else."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_SAMPLING_SECONDS = 0.002
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESETS_HIGH_WATER = "5"  # see proc_pid_clear_refs(5)
_M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped, and unmapped when they are freed
_M_TRIM_THRESHOLD = -1  # of malloc.h: what the heap may have free at its end
_LARGE_BLOCK_BYTES = 2**17  # glibc's own first choice, which it raises up to 32 MiB unless it is set
_QUICK_BLOCK_BYTES, _QUICK_TRIM_BYTES = 2**19, 2**22  # smaller ones would map activations anew each time
_SLACK_BYTES = 2**20  # between two readings of /proc; the kernel counts pages in batches for each processor


@dataclass
class PeakMemory:
    """What a block of `measured_peak` needed.

    Attributes:
        peak_bytes: The block's peak above what was in use when it began; 0 until it ends.
    """

    peak_bytes: int = 0


@contextlib.contextmanager
def measured_peak(device: str | torch.device = "cpu", trim: bool = True) -> Iterator[PeakMemory]:
    """Measures the peak memory of a block, above what was in use when it began; blocks must not be nested.

    On CUDA it is what tensors on the device took (`torch.cuda.max_memory_allocated`), without what the allocator only
    caches; this path has been tested on fakes only. Elsewhere it is the resident memory of the whole process, all
    threads: what the C library keeps after a `free` counts, and so do pages of memory-mapped weights that the block is
    first to read, so run a block once before it is measured. Linux's own high-water mark is used where it can be reset,
    which misses nothing (and resets `ru_maxrss` too); elsewhere a thread reads the resident memory every 2 ms.

    Args:
        device: Where the tensors are.
        trim: Whether the C library gives back first what it keeps of freed blocks; otherwise a block that takes those
            again seems to need nothing.

    Yields:
        The result, filled in when the block ends, also when it raises.
    """
    device, peak = torch.device(device), PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        highest = functools.partial(torch.cuda.max_memory_allocated, device)
    else:
        if trim:
            trim_freed_memory()
        if _reset_high_water_mark():
            before, highest = _status_bytes("VmHWM"), functools.partial(_status_bytes, "VmHWM")
        else:
            before, highest = psutil.Process().memory_info().rss, _sampling()
    try:
        yield peak
    finally:
        peak.peak_bytes = highest() - before


def _sampling() -> Callable[[], int]:
    """Starts to read the resident memory; the function that is returned ends that and says the most that was read."""
    process, ended = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not ended.wait(_SAMPLING_SECONDS):
            samples[0] = max(samples[0], process.memory_info().rss)

    def end() -> int:
        ended.set()
        thread.join()
        return max(samples[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, name="measured_peak", daemon=True)
    thread.start()
    return end


def _reset_high_water_mark() -> bool:
    """Sets Linux's high-water mark to the present resident memory; says whether that worked."""
    try:
        _CLEAR_REFS.write_text(_RESETS_HIGH_WATER)
        return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + _SLACK_BYTES
    except (OSError, KeyError):  # another system, a sandbox without these files, or one that forbids writing
        return False


def _status_bytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[name].removesuffix("kB"))


def return_freed_memory() -> bool:
    """Makes the C library give every large block back as soon as it is freed, for the rest of the process.

    By default glibc keeps freed blocks of up to 32 MiB to use them again, often in pieces, so that a process takes up
    to twice what its tensors do. Without that, resident memory follows the tensors, but fresh pages cost time: a tenth
    to a third of a forward. Call it before a model is loaded: blocks that are already kept are used first.

    Returns:
        Whether the C library can do so; only glibc can.
    """
    return _call_glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES) == 1


def keep_less_freed_memory() -> bool:
    """Makes the C library keep less of what is freed, for the rest of the process.

    Blocks of 512 KiB and more are given back as soon as they are freed, and what is free at the heap's end from 4 MiB
    on. Activations are of about that size: a process that bounds its memory would else keep many. Call
    it before a model is loaded: blocks that are already kept are used first.

    Returns:
        Whether the C library can do so; only glibc can.
    """
    asked = (_M_MMAP_THRESHOLD, _QUICK_BLOCK_BYTES), (_M_TRIM_THRESHOLD, _QUICK_TRIM_BYTES)
    return all(_call_glibc("mallopt", *each) == 1 for each in asked)


def trim_freed_memory() -> None:
    """Makes the C library give back now what it keeps of freed blocks; where it is not glibc nothing happens."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> int | None:
    """Calls a function that only glibc has; None elsewhere."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # musl and macOS, or Windows
        return None
    return function(*arguments)
