"""Starts a command that ends when its parent does, in a control group from its first page on.

It is a process of its own rather than a function that runs between `fork` and `exec`, which is unsafe in a process with
threads. It uses nothing but the standard library.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # see prctl(2); it outlives `exec`
_CANNOT_RUN = 127  # as shells say it


def launched(command: Sequence[str], procs: Path | None = None) -> list[str]:
    """The command that runs a command in this way.

    The kernel kills it when the thread that started it ends, so start it from a thread that lives as long as it should.

    Args:
        command: Program and arguments.
        procs: File `cgroup.procs` of the control group that it joins first; None: it stays in its parent's.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(procs or ""), *command]


def _run(parent_pid: int, procs: str, command: Sequence[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the kernel was told
        sys.exit(_CANNOT_RUN)
    if procs:
        Path(procs).write_text("0", encoding="ascii")  # 0 is whoever writes
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by this Python, and programs would inherit that
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(_CANNOT_RUN)


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
