"""Memory traces: budgets that move with time, as shares of a whole that the caller chooses."""

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rap_env.errors import InvalidConfig, UnknownName

_MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class MemoryTrace:
    """A budget over time: each share holds from its time on, the last one for ever.

    Attributes:
        seconds: Times, ascending from 0.
        shares: The budget from each of them on, as a share of a whole, such as what the dense model needs.

    Raises:
        InvalidConfig: Times do not ascend from 0, there is not one share for each, or a share is negative or no number.
    """

    seconds: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.seconds))
        if not self.seconds or self.seconds[0] != 0 or not ascending or len(self.seconds) != len(self.shares):
            raise InvalidConfig(
                "expected times that ascend from 0, with a share each;"
                f" got {len(self.seconds)} times and {len(self.shares)} shares"
            )
        for share in self.shares:
            _check("share", share, at_least=0.0)

    def share_at(self, seconds: float) -> float:
        """The share in force at a time; before 0 the first one."""
        return self.shares[max(0, bisect_right(self.seconds, seconds) - 1)]

    def n_bytes(self, whole_bytes: float) -> tuple[int, ...]:
        """The shares in bytes, as `RecordedMemory` plays them."""
        return tuple(int(share * whole_bytes) for share in self.shares)

    def limit(self, whole_bytes: float) -> Callable[[float], int]:
        """The same as a function from seconds to bytes."""
        return lambda seconds: int(self.share_at(seconds) * whole_bytes)


def constant(share: float = 1.0) -> MemoryTrace:
    """The same budget all the time.

    Args:
        share: Of the whole.
    """
    return MemoryTrace((0.0,), (float(share),))


def step(low: float, high: float, falls_seconds: float, rises_seconds: float | None = None) -> MemoryTrace:
    """A high budget that falls at once, and comes back.

    Args:
        low: Share between both times.
        high: Share before and after.
        falls_seconds: When it falls.
        rises_seconds: When it comes back; None: never.

    Raises:
        InvalidConfig: `low` is above `high`, or the times do not ascend from above 0.
    """
    _check_range(low, high)
    times = (0.0, falls_seconds) if rises_seconds is None else (0.0, falls_seconds, rises_seconds)
    return MemoryTrace(tuple(map(float, times)), (high, low, high)[: len(times)])


def sawtooth(
    low: float, high: float, period_seconds: float, duration_seconds: float, every_seconds: float = 0.1
) -> MemoryTrace:
    """A budget that falls evenly from high to low in each period, and then jumps back.

    Args:
        low: Smallest share, which each period ends with.
        high: Largest share, which each period begins with.
        period_seconds: How long a period lasts; at least two steps.
        duration_seconds: How long the trace lasts.
        every_seconds: Time between two values.

    Raises:
        InvalidConfig: `low` is above `high`, or a time is not positive, too short, or gives more than a million values.
    """
    _check_range(low, high)
    _check("period_seconds", period_seconds, at_least=2 * every_seconds)
    seconds = _times(duration_seconds, every_seconds)
    steps = max(2, round(period_seconds / every_seconds))
    fallen = (np.arange(len(seconds)) % steps) / (steps - 1)
    return MemoryTrace(seconds, tuple((high - (high - low) * fallen).tolist()))


def random_walk(
    low: float, high: float, duration_seconds: float, seed: int, every_seconds: float = 1.0, step_share: float = 0.05
) -> MemoryTrace:
    """A budget that starts high and wanders between two bounds, which throw it back.

    Args:
        low: Smallest share.
        high: Largest share, and the first.
        duration_seconds: How long the trace lasts.
        seed: Of the random numbers.
        every_seconds: Time between two values.
        step_share: Standard deviation of the change from one value to the next.

    Raises:
        InvalidConfig: `low` is above `high`, the step is negative, or a time is not positive or gives more than a
            million values.
    """
    _check_range(low, high)
    _check("step_share", step_share, at_least=0.0)
    seconds = _times(duration_seconds, every_seconds)
    steps = np.random.default_rng(seed).normal(0.0, step_share, len(seconds) - 1)
    below = np.concatenate(([0.0], np.cumsum(steps)))  # of an unbounded walk; reflections fold it into the bounds
    width = high - low
    folded = np.abs((below + width) % (2.0 * width) - width) if width > 0.0 else np.zeros_like(below)
    return MemoryTrace(seconds, tuple(np.clip(high - folded, low, high).tolist()))


_KINDS: dict[str, Callable[..., MemoryTrace]] = {
    function.__name__: function for function in (constant, step, sawtooth, random_walk)
}


def memory_trace(kind: str, **settings: float) -> MemoryTrace:
    """A memory trace by the name of its kind, as a config says it.

    Args:
        kind: `constant`, `step`, `sawtooth` or `random_walk`: the function of this file that makes it.
        settings: The arguments of that function.

    Raises:
        UnknownName: There is no such kind; the message lists those there are.
        InvalidConfig: Arguments that the kind does not take, that are missing, or that have no such values.
    """
    if kind not in _KINDS:
        raise UnknownName("memory trace", kind, _KINDS, suggest=False)
    make = _KINDS[kind]
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        takes = ", ".join(inspect.signature(make).parameters)
        raise InvalidConfig(f"memory trace {kind}: expected {takes}; {error}") from error
    for name, value in settings.items():
        if not isinstance(value, int | float) and not (value is None and name == "rises_seconds"):
            raise InvalidConfig(f"memory trace {kind}: {name}: expected a number; got {value!r}")
    return make(**settings)


def _times(duration_seconds: float, every_seconds: float) -> tuple[float, ...]:
    for name, value in {"duration_seconds": duration_seconds, "every_seconds": every_seconds}.items():
        if not 0.0 < value < math.inf:
            raise InvalidConfig(f"{name}: expected a positive number; got {value}")
    if duration_seconds / every_seconds > _MOST_VALUES:
        raise InvalidConfig(f"expected at most {_MOST_VALUES} values; got {duration_seconds} s every {every_seconds} s")
    return tuple((np.arange(math.ceil(duration_seconds / every_seconds)) * every_seconds).tolist())


def _check_range(low: float, high: float) -> None:
    _check("low", low, at_least=0.0)
    _check("high", high, at_least=low)


def _check(name: str, value: float, at_least: float) -> None:
    if not at_least <= value < math.inf:
        raise InvalidConfig(f"{name}: expected at least {at_least}; got {value}")
