"""Who holds a claim: a process, named so that others notice its death."""

import contextlib
import functools
import json
import os
import platform
import time

import psutil

LEASE_SECONDS = 600.0
_START_TOLERANCE_SECONDS = 1.0


def this_process() -> str:
    """Host, process id and start time (seconds since the host started) of the calling process, as JSON."""
    return _owner(os.getpid())  # of the present id: a forked child is not its parent


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> str:
    return json.dumps([_host(), pid, _started_at(psutil.Process(pid))])


def _started_at(process: psutil.Process) -> float:
    """Seconds from the host's start to the process's: wall-clock times would change when somebody sets the clock."""
    booted_at = psutil.boot_time()  # read anew, and what the next line counts from
    return process.create_time() - booted_at


def _host() -> str:
    host = platform.node()
    with contextlib.suppress(OSError):  # Linux only: containers may share a host's name, and then number apart
        host += " " + os.readlink("/proc/self/ns/pid")
    return host


def is_gone(owner: str, renewed_at: float) -> bool:
    """Whether others may take over what a process claimed.

    On the same host a claim ends with its process, however long that takes. Processes of other hosts can't be seen:
    there it ends `LEASE_SECONDS` after the owner took, or last renewed it, as `measured_once` does while it measures.

    Args:
        owner: What `this_process` said there.
        renewed_at: When the owner last showed that it is alive, in seconds since 1970.
    """
    host, pid, started_at = json.loads(owner)
    if host != _host():
        return abs(time.time() - renewed_at) > LEASE_SECONDS  # ahead of us: a clock was set back since
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # dead, and not yet waited for by its parent
            return True
        return abs(_started_at(process) - started_at) > _START_TOLERANCE_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
