"""Control groups that bound the memory of a process."""

import contextlib
import os
import secrets
import time
from pathlib import Path

from rap_env.errors import InvalidConfig

# Of both versions: the file of the limit, the one that keeps the group from swapping instead, and the one with kills.
_FILES = {
    "memory.max": ("memory.swap.max", "memory.events"),
    "memory.limit_in_bytes": ("memory.swappiness", "memory.oom_control"),
}
_REMOVAL_SECONDS = 2.0


class ControlGroup:
    """A control group of version 2 or 1, made for one process and removed after it.

    Tested on folders that only look like groups, not on a kernel's.

    Args:
        parent: Folder of a group in which this user may make others, with the memory controller, such as one that
            `systemd-run --user -p Delegate=yes` made.

    Attributes:
        procs: File into which a process writes itself to join.

    Raises:
        InvalidConfig: No group can be made there, or it has no memory controller.
    """

    def __init__(self, parent: Path) -> None:
        self._folder = parent / f"limited-{secrets.token_hex(8)}"
        try:
            os.mkdir(self._folder)
        except OSError as error:
            raise InvalidConfig(f"no control group can be made in {parent}: {error.strerror}") from error
        limits = [name for name in _FILES if (self._folder / name).exists()]
        if not limits:
            os.rmdir(self._folder)
            raise InvalidConfig(f"{parent}: expected a control group with the memory controller")
        self._limit, (self._swap, self._kills) = limits[0], _FILES[limits[0]]
        self.procs = self._folder / "cgroup.procs"

    def limit(self, n_bytes: int) -> None:
        """Bounds what the group may hold; beyond it the kernel kills a process of the group."""
        if (self._folder / self._swap).exists():
            (self._folder / self._swap).write_text("0", encoding="ascii")
        (self._folder / self._limit).write_text(str(n_bytes), encoding="ascii")

    def killed(self) -> bool:
        """Whether the kernel has killed a process of the group for its memory."""
        lines = (self._folder / self._kills).read_text(encoding="ascii").splitlines()
        return any(int(line.split()[1]) > 0 for line in lines if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Kills what is left in the group, where the kernel can do that, and removes it.

        Raises:
            OSError: Something stays in it.
        """
        with contextlib.suppress(FileNotFoundError):  # version 1, or before Linux 5.14
            descriptor = os.open(self._folder / "cgroup.kill", os.O_WRONLY)
            os.write(descriptor, b"1")
            os.close(descriptor)
        give_up = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                return os.rmdir(self._folder)
            except OSError:  # processes leave some time after they were killed
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.01)
