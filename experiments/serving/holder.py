"""The co-tenant's program: holds memory as its parent says. It needs the standard library only, so it is small itself.

The parent sends a list of times in seconds and one of bytes as a line of JSON, reads `ready`, and sends a second line
at second 0.
"""

import json
import mmap
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CHUNK_BYTES = 2**20
_OOM_SCORE, _FIRST_TO_GO = Path("/proc/self/oom_score_adj"), "1000"  # where the machine runs out of memory


def _play(seconds: Sequence[float], n_bytes: Sequence[int], start: float) -> None:
    """Holds so many bytes from each time on."""
    memory = mmap.mmap(-1, max(mmap.PAGESIZE, *n_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held, chunk = 0, b"\1" * _CHUNK_BYTES
    for when, wanted in zip(seconds, n_bytes, strict=True):
        time.sleep(max(0.0, start + when - time.monotonic()))
        wanted -= wanted % mmap.PAGESIZE
        if wanted < held:
            memory.madvise(mmap.MADV_DONTNEED, wanted, held - wanted)
        for first in range(held, wanted, _CHUNK_BYTES):
            last = min(first + _CHUNK_BYTES, wanted)
            memory[first:last] = chunk[: last - first]
        held = wanted


def _main() -> None:
    _OOM_SCORE.write_text(_FIRST_TO_GO, encoding="ascii")
    seconds, n_bytes = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    if sys.stdin.readline():  # nothing, where the parent has ended
        _play(seconds, n_bytes, time.monotonic())
        signal.pause()


if __name__ == "__main__":
    _main()
