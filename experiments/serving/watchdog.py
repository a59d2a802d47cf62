"""The watchdog: looks at a process every few milliseconds, and kills it once it used more than the limit in force."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.serving.resident import ResidentMemory
from rap_env.errors import InvalidConfig


@dataclass(frozen=True)
class Enforcement:
    """How a limit is enforced.

    Attributes:
        highest_bytes: The most that the limit ever is. Where the watchdog is too slow the kernel enforces this one.
        grace_seconds: How long a limit that has fallen is not in force yet: a process can't react before it has seen
            the new limit, and then it has to finish or stop what it computes. A limit that rises is in force at once.
        sample_seconds: Time between two looks at the child.
        ready_seconds: How long the child may take until it is ready.
        longest_seconds: How long it may run after that.
        mapped_bytes: What it keeps mapped without having it in memory, such as weights that were released; the kernel
            counts that too.
        groups: Folder in which this user may make control groups, see `ControlGroup`; None: `RLIMIT_DATA` instead.

    Raises:
        InvalidConfig: A value is negative or no number, or there is no time between samples.
    """

    highest_bytes: int
    grace_seconds: float = 1.0
    sample_seconds: float = 0.01
    ready_seconds: float = 60.0
    longest_seconds: float = math.inf
    mapped_bytes: int = 0
    groups: Path | None = None

    def __post_init__(self) -> None:
        for name in (
            "highest_bytes",
            "grace_seconds",
            "sample_seconds",
            "ready_seconds",
            "longest_seconds",
            "mapped_bytes",
        ):
            if not getattr(self, name) >= 0:
                raise InvalidConfig(f"{name}: expected at least 0; got {getattr(self, name)}")
        if self.sample_seconds == 0:
            raise InvalidConfig("sample_seconds: expected above 0; got 0")


class Sample(NamedTuple):
    """What the watchdog saw.

    Attributes:
        seconds: When, since the child was ready.
        limit_bytes: The limit in force, that is with grace.
        used_bytes: The most that the child had above its baseline since the last sample.
    """

    seconds: float
    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class Kill:
    """Why a child was killed.

    Attributes:
        by: `"watchdog"`, or `"control group"`: the kernel, for the highest limit.
        seconds: When, since the child was ready.
        limit_bytes: The limit that it broke.
        used_bytes: What it used above its baseline; as last seen where the kernel killed it.
    """

    by: str
    seconds: float
    limit_bytes: int
    used_bytes: int

    def __str__(self) -> str:
        return (
            f"killed by the {self.by} {self.seconds:.3f} s after it was ready: {self.used_bytes:,} bytes used,"
            f" {self.used_bytes - self.limit_bytes:,} over the limit of {self.limit_bytes:,}"
        )


class LimitInForce:
    """The largest limit of the last seconds, each look in constant time on the mean.

    A look judges everything since the one before, so "last" counts from there: nobody is killed for what was allowed
    when it happened, however late a look comes.

    Args:
        grace_seconds: How long a limit that has fallen is not in force yet.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds, self._before = grace_seconds, 0.0
        self._falling = deque[tuple[float, int]]()  # limits, each with the time from which on it is the largest

    def look(self, seconds: float, limit_bytes: int) -> int:
        """Takes the limit of a time, later than those before, and gives the one in force."""
        since, holds_from = self._before - self._grace_seconds, seconds
        while self._falling and self._falling[-1][1] <= limit_bytes:
            holds_from = self._falling.pop()[0]
        self._falling.append((holds_from, limit_bytes))
        while len(self._falling) > 1 and self._falling[1][0] <= since:
            self._falling.popleft()
        self._before = seconds
        return self._falling[0][1]


class Watchdog:
    """Watches one process from now on, second 0.

    Args:
        memory: Of the process.
        baseline_bytes: What of it does not count.
        limit: The limit in bytes for a time in seconds.
        enforcement: How it is enforced.

    Attributes:
        samples: What was seen.
        kill: Why the process was killed; None as long as it was not.
        cpu_seconds: Processor time that watching took.
    """

    def __init__(
        self, memory: ResidentMemory, baseline_bytes: int, limit: Callable[[float], float], enforcement: Enforcement
    ) -> None:
        self.samples: list[Sample] = []
        self.kill: Kill | None = None
        self.cpu_seconds = 0.0
        self._memory, self._baseline_bytes, self._limit, self._enforcement = memory, baseline_bytes, limit, enforcement
        self._in_force = LimitInForce(enforcement.grace_seconds)
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start

    def watch(self, has_ended: Callable[[], bool], kill: Callable[[], None]) -> None:
        """Looks until the process has ended or has to be killed.

        Args:
            has_ended: Says whether it has ended.
            kill: Kills it.

        Raises:
            InvalidConfig: The limit is no number, negative, or above the highest.
            TimeoutError: It runs for too long.
        """
        began = time.thread_time()
        try:
            self._memory.peak_bytes()  # what was before does not count
            while not has_ended():
                if self._look() is not None:
                    return kill()
                late = self.seconds % self._enforcement.sample_seconds
                time.sleep(self._enforcement.sample_seconds - late)
        except ProcessLookupError:  # it ended in between
            pass
        finally:
            self.cpu_seconds = time.thread_time() - began

    def _look(self) -> Kill | None:
        seconds = self.seconds
        used_bytes = max(0, self._memory.peak_bytes() - self._baseline_bytes)
        limit_bytes = self._in_force.look(seconds, self._announced(seconds))
        self.samples.append(Sample(seconds, limit_bytes, used_bytes))
        if used_bytes > limit_bytes:
            self.kill = Kill("watchdog", seconds, limit_bytes, used_bytes)
        elif seconds > self._enforcement.longest_seconds:
            raise TimeoutError(f"the command was not done after {self._enforcement.longest_seconds} s")
        return self.kill

    def _announced(self, seconds: float) -> int:
        limit_bytes = self._limit(seconds)
        if not 0 <= limit_bytes <= self._enforcement.highest_bytes:
            highest = self._enforcement.highest_bytes
            raise InvalidConfig(
                f"limit: expected from 0 to highest_bytes, {highest}; got {limit_bytes} at {seconds:.3f} s"
            )
        return int(limit_bytes)
