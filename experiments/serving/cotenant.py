"""A co-tenant: another process of the machine that takes and gives back memory as a memory trace says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.serving.launch import launched
from rap_env.serving.memory_traces import MemoryTrace

_PROGRAM = Path(__file__).with_name("holder.py")


class CoTenant:
    """The co-tenant's process, as its parent sees it.

    Args:
        process: It waits for its start.

    Attributes:
        pid: Its process.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        self.pid = process.pid
        self._process = process

    def start(self) -> None:
        """Second 0 of its trace is now.

        Raises:
            BrokenPipeError: It has ended, or was started before.
        """
        if self._process.stdin.closed:
            raise BrokenPipeError("the co-tenant was started before")
        self._process.stdin.write("start\n")
        self._process.stdin.close()


@contextmanager
def cotenant(trace: MemoryTrace, whole_bytes: int) -> Iterator[CoTenant]:
    """Runs a co-tenant during the block; it takes nothing until it is started.

    Its memory is anonymous, and written, so that the machine really lacks it; if the machine runs out, the co-tenant is
    the first that the kernel ends. It ends with the block, or with the thread that began it.

    Args:
        trace: What it holds when; the last value until the end.
        whole_bytes: What a share of 1 is.

    Yields:
        The co-tenant.

    Raises:
        ChildProcessError: It ended before the block did, as it does where the machine has no such memory.
    """
    command = launched([sys.executable, "-I", "-S", str(_PROGRAM)])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:
        try:
            print(json.dumps([trace.seconds, trace.n_bytes(whole_bytes)]), file=process.stdin)
            if process.stdout.readline() != "ready\n":
                raise ChildProcessError(f"the co-tenant ended with {process.wait()} before it was ready")
            yield CoTenant(process)
            if process.poll() is not None:
                raise ChildProcessError(f"the co-tenant ended with {process.returncode} before it was stopped")
        finally:
            process.kill()
