"""How much memory there is: of the machine, the control group and the GPU, or as it was recorded."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from rap_env.errors import InvalidConfig
from rap_env.memory.measured import trim_freed_memory

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = "max"


def free_bytes(device: str | torch.device = "cpu", cgroup: Path = _CGROUP) -> int:
    """Bytes that this process can still take.

    On CUDA what the driver has free, and what torch's allocator holds without using it.
    Elsewhere the smaller of what the machine has available and what the control group (version 2) leaves, pages of
    files that nobody uses now counting as free in both.

    Args:
        device: Where the model is.
        cgroup: Folder of the process's control group; one without `memory.max` sets no limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    available = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else _UNLIMITED
    if text == _UNLIMITED:
        return available
    used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    entries = (line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    unused_files = next((int(value) for name, value in entries if name == "inactive_file"), 0)
    return max(0, min(available, int(text) - used + unused_files))


class RealMemory:
    """A budget of what is free and what the model holds already, less a reserve for others.

    Pages of mapped weights count as free on a CPU, for the operating system can have them back at any time; so what the
    model holds is what it holds beside them. A control group counts some of them as used: then the budget is too
    small by these, which prunes more than is needed, never less.

    Args:
        held: Bytes that the model holds, without mapped weights.
        reserve_bytes: What stays free.
        device: Where the model is.
    """

    def __init__(self, held: Callable[[], int], reserve_bytes: int, device: str | torch.device = "cpu") -> None:
        self._held, self._reserve_bytes, self._device = held, reserve_bytes, device

    def __call__(self) -> int:
        return max(0, free_bytes(self._device) + self._held() - self._reserve_bytes)


class BudgetFile:
    """A budget that a file holds, as one number; whoever writes another one changes the budget.

    While the file is empty, as for a moment when a shell writes it, the budget stays what it was.

    Args:
        path: The file.

    Raises:
        InvalidConfig: There is no such file, or no number in it. If that happens later, reading it raises OSError or
            ValueError, which a controller takes as it takes all failures.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, ""
        try:
            self()
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"expected a file with a number of bytes; {path}: {error}") from error

    def __call__(self) -> float:
        self._last = self._path.read_text(encoding="ascii").strip() or self._last
        if math.isnan(budget := float(self._last)):
            raise ValueError(f"expected a number of bytes; got {self._last}")
        return budget


class LimitedProcess:
    """A budget of a process that has a limit: the limit, less what the process takes beside the model.

    What libraries keep for themselves comes and goes, and no formula has it; so it is measured at each reading. The
    C library is first asked to give back what it keeps of freed blocks: its holes between small blocks fill up from
    step to step.

    Args:
        limit: Tells the bytes that the process may take above a baseline.
        baseline_bytes: Resident memory of the process without the model.
        held: Tells what the model takes by the memory model between two steps, so without activations.
    """

    def __init__(self, limit: Callable[[], float], baseline_bytes: int, held: Callable[[], int]) -> None:
        self._limit, self._baseline_bytes, self._held = limit, baseline_bytes, held
        self._process = psutil.Process()

    def __call__(self) -> float:
        beside_bytes = self._beside_bytes()
        if beside_bytes > 0:
            trim_freed_memory()
            beside_bytes = self._beside_bytes()
        return max(0.0, self._limit() - max(0, beside_bytes))

    def _beside_bytes(self) -> int:
        return self._process.memory_info().rss - self._baseline_bytes - self._held()


class RecordedMemory:
    """A budget that moves as it was recorded: the last value at or before a time, the first one before all.

    Args:
        seconds: Times, ascending.
        n_bytes: The budget from each of them on.
        clock: Tells the time in seconds.

    Raises:
        InvalidConfig: There is no value, not one for each time, or the times do not ascend.
    """

    def __init__(self, seconds: Sequence[float], n_bytes: Sequence[float], clock: Callable[[], float]) -> None:
        if not seconds or len(seconds) != len(n_bytes) or list(seconds) != sorted(set(seconds)):
            raise InvalidConfig(
                f"expected ascending times with a value each; got {len(seconds)} times and {len(n_bytes)} values"
            )
        self._seconds, self._bytes, self._clock = list(seconds), list(n_bytes), clock

    def __call__(self) -> float:
        return self._bytes[max(0, bisect_right(self._seconds, self._clock()) - 1)]
