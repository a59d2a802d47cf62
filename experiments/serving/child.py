"""Runs a command under a memory limit that moves: a watchdog kills it as soon as it uses more than it may."""

import contextlib
import functools
import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from experiments.serving.groups import ControlGroup
from experiments.serving.launch import launched
from experiments.serving.resident import ResidentMemory
from experiments.serving.watchdog import Enforcement, Kill, Sample, Watchdog
from rap_env.errors import InvalidConfig

__all__ = ["Enforcement", "Kill", "Outcome", "Sample", "announce_ready", "run_limited"]

_READY_FD = "RAP_READY_FD"
_READY = re.compile(rb"ready (\d{1,18})\n")
_READY_BYTES = 64  # more than such a line has
# Above the highest limit, so that the kernel does not strike before the watchdog: memory that is mapped but not
# touched, page tables, and stacks of threads, 8 MiB each.
_BACKSTOP_BYTES = 64 * 2**20 + 16 * 2**20 * (os.cpu_count() or 1)


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    Attributes:
        exit_code: Its exit code, or minus the number of the signal that ended it.
        kill: Why it was killed for its memory; None where it was not.
        peak_bytes: The most that it used above its baseline, as far as the samples show.
        samples: What the watchdog saw.
        backstop: What enforced the highest limit: `"control group"` or `"RLIMIT_DATA"`.
        catches_peaks: Whether peaks between two samples were seen.
        watchdog_cpu_seconds: Processor time of the watchdog.
    """

    exit_code: int
    kill: Kill | None
    peak_bytes: int
    samples: list[Sample] = field(repr=False)
    backstop: str
    catches_peaks: bool
    watchdog_cpu_seconds: float

    @property
    def killed(self) -> bool:
        """Whether it was killed because it used more than it might."""
        return self.kill is not None


def announce_ready(baseline_bytes: int) -> None:
    """Tells the parent, from inside the child, that limits count from now on. It may be called once.

    Args:
        baseline_bytes: Resident memory that does not count, such as that of the interpreter and its libraries.

    Raises:
        KeyError: The process was not started by `run_limited`.
    """
    with os.fdopen(int(os.environ.pop(_READY_FD)), "wb") as pipe:
        pipe.write(b"ready %d\n" % baseline_bytes)


def run_limited(
    command: Sequence[str],
    limit: Callable[[float], float],
    enforcement: Enforcement,
    on_ready: Callable[[], object] = lambda: None,
) -> Outcome:
    """Runs a command under a limit on its resident memory.

    The command writes `ready BASELINE_BYTES` and a line end to the file descriptor that `RAP_READY_FD` names
    (`announce_ready` does it). This is second 0 of the limit, which counts above that baseline. From then on the
    watchdog, in this thread, reads the resident memory of the process itself, not of others that it starts, and kills
    it once it had more than the largest limit since `grace_seconds` before the last sample. A process that ends by
    itself is not judged for what it took after the last sample. Whatever happens, the command and its process group are
    gone when this returns or raises, and the command does not outlive this process.

    `RLIMIT_DATA` counts what is mapped after second 0, touched or not: a command that maps 64 MiB, and 16 for each
    processor, above the highest limit gets no memory, and may fail.

    Args:
        command: Program and arguments.
        limit: The limit in bytes for a time in seconds.
        enforcement: How it is enforced.
        on_ready: Is called at second 0.

    Returns:
        How it ended; a command that fails by itself raises nothing.

    Raises:
        InvalidConfig: The command is empty, the limit is no number or above the highest, or no control group can be
            made.
        ChildProcessError: The command ended before it was ready, or wrote something else.
        TimeoutError: It was not ready in time, or ran for too long.
    """
    if not command:
        raise InvalidConfig("command: expected a program; got an empty list")
    with contextlib.ExitStack() as undo:
        group = None
        if enforcement.groups is not None:
            group = ControlGroup(enforcement.groups)
            undo.callback(group.remove)
        process, pipe = undo.enter_context(_started(launched(command, group and group.procs)))
        try:
            memory = undo.enter_context(contextlib.closing(ResidentMemory(process.pid)))
        except ProcessLookupError as error:
            raise _ended_early(process) from error
        baseline_bytes = _wait_until_ready(process, pipe, enforcement.ready_seconds)
        watchdog = Watchdog(memory, baseline_bytes, limit, enforcement)
        on_ready()
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            highest_bytes = baseline_bytes + enforcement.highest_bytes + enforcement.mapped_bytes
            _set_backstop(process.pid, memory, highest_bytes, group)
        watchdog.watch(functools.partial(_has_ended, process), functools.partial(_kill, process))
        exit_code, kill = _reaped(process), watchdog.kill
        if kill is None and group is not None and group.killed():
            last_bytes = watchdog.samples[-1].used_bytes if watchdog.samples else 0
            kill = Kill("control group", watchdog.seconds, enforcement.highest_bytes, last_bytes)
    return Outcome(
        exit_code=exit_code,
        kill=kill,
        peak_bytes=max((sample.used_bytes for sample in watchdog.samples), default=0),
        samples=watchdog.samples,
        backstop="RLIMIT_DATA" if group is None else "control group",
        catches_peaks=memory.catches_peaks,
        watchdog_cpu_seconds=watchdog.cpu_seconds,
    )


def _set_backstop(pid: int, memory: ResidentMemory, highest_bytes: int, group: ControlGroup | None) -> None:
    """Lets the kernel enforce the highest limit on resident memory, baseline included, with some bytes to spare."""
    if group is not None:
        return group.limit(highest_bytes + _BACKSTOP_BYTES)
    left_bytes = max(0, highest_bytes - memory.now_bytes()) + _BACKSTOP_BYTES
    hard_bytes = resource.prlimit(pid, resource.RLIMIT_DATA)[1]
    n_bytes = memory.data_bytes() + left_bytes
    n_bytes = n_bytes if hard_bytes == resource.RLIM_INFINITY else min(n_bytes, hard_bytes)
    resource.prlimit(pid, resource.RLIMIT_DATA, (n_bytes, n_bytes))


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process in a group of its own, and the pipe in which it says that it is ready; none stays behind."""
    read, write = os.pipe()
    try:
        try:
            environment = os.environ | {_READY_FD: str(write)}
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[write], start_new_session=True
            )
        finally:
            os.close(write)
        try:
            yield process, read
        finally:
            if process.returncode is None:
                _reaped(process)
    finally:
        os.close(read)


def _kill(process: subprocess.Popen) -> None:
    """Kills a process that was not reaped yet, and its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _reaped(process: subprocess.Popen) -> int:
    """Its exit code, once it and whatever it left behind in its group are gone."""
    _kill(process)
    return process.wait()


def _has_ended(process: subprocess.Popen) -> bool:
    """Whether it has; unlike `poll`, without reaping it, so that nothing else gets its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _ended_early(process: subprocess.Popen) -> ChildProcessError:
    return ChildProcessError(f"the command ended with {_reaped(process)} before it was ready")


def _wait_until_ready(process: subprocess.Popen, pipe: int, timeout_seconds: float) -> int:
    """Its baseline in bytes, once it says so."""
    give_up, said = time.monotonic() + timeout_seconds, b""
    while not said.endswith(b"\n") and len(said) < _READY_BYTES:
        ended = _has_ended(process)  # asked first: what it said before it ended is in the pipe
        more = os.read(pipe, _READY_BYTES) if select.select([pipe], [], [], 0.01)[0] else b""
        said += more
        if ended and not more:
            raise _ended_early(process)
        if time.monotonic() > give_up:
            raise TimeoutError(f"the command was not ready after {timeout_seconds} s")
        if not more:
            time.sleep(0.001)  # it may have closed its end
    if (found := _READY.fullmatch(said)) is None:
        raise ChildProcessError(f"expected the line `ready BASELINE_BYTES` from the command; got {said!r}")
    return int(found[1])
