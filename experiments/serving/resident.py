"""The resident memory of another process, with its peaks between two readings."""

import os
import re

_RESETS_HIGH_WATER = b"5"  # see proc_pid_clear_refs(5)
_SLACK_BYTES = 2**20  # between two readings of /proc
_STATUS_BYTES = 8192  # more than the file ever has


class ResidentMemory:
    """Reads what a process has in memory, and the most that it had since it was last read.

    `/proc/PID/status` tells both, the resident memory and its high-water mark, in about 3 microseconds whatever the
    process holds; `statm` takes 1 but has no mark, and `smaps_rollup` walks the page tables, which takes 150 and more
    for each GiB while the process can't map memory. The mark is set back after each reading, where the kernel allows
    that, so no peak is missed. A process that sets its own mark back, as `measured_peak` does, hides peaks from this
    one. Elsewhere the mark stays, and only a peak that is the highest so far shows.

    Pages of files count, shared libraries too: they are no different from weights that are mapped.

    Args:
        pid: The process; one of the same user.

    Attributes:
        catches_peaks: Whether the mark can be set back.

    Raises:
        ProcessLookupError: There is no such process, or it has ended.
    """

    def __init__(self, pid: int) -> None:
        try:
            self._status = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ProcessLookupError(f"no process {pid}") from error
        try:
            self._clear = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:  # forbidden, or a sandbox without it
            self._clear = -1
        self._last_mark = 0
        self.catches_peaks = False
        try:
            self.catches_peaks = self._reset() and self.peak_bytes() <= self.now_bytes() + _SLACK_BYTES
        except ProcessLookupError:
            self.close()
            raise

    def now_bytes(self) -> int:
        """What is resident now.

        Raises:
            ProcessLookupError: The process has ended.
        """
        return self._bytes(b"VmRSS")

    def data_bytes(self) -> int:
        """What counts against `RLIMIT_DATA`: private writable memory, touched or not.

        Raises:
            ProcessLookupError: The process has ended.
        """
        return self._bytes(b"VmData")

    def peak_bytes(self) -> int:
        """The most that was resident since the last call.

        Raises:
            ProcessLookupError: The process has ended.
        """
        mark = self._bytes(b"VmHWM")
        if self.catches_peaks:
            self._reset()
            return mark
        risen, self._last_mark = mark > self._last_mark, mark
        return mark if risen else self.now_bytes()

    def close(self) -> None:
        """Closes the files of /proc."""
        for descriptor in {self._status, self._clear} - {-1}:
            os.close(descriptor)
        self._status = self._clear = -1

    def _bytes(self, name: bytes) -> int:
        found = re.search(name + rb":\s*(\d+) kB", os.pread(self._status, _STATUS_BYTES, 0))
        if found is None:  # it waits to be reaped
            raise ProcessLookupError("the process has ended")
        return 1024 * int(found[1])

    def _reset(self) -> bool:
        try:
            return self._clear != -1 and os.write(self._clear, _RESETS_HIGH_WATER) > 0
        except OSError:  # it has ended, or a sandbox whose file only looks like one
            return False
