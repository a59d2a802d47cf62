"""The controller: which mask a live model runs with while its memory moves."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from rap_env.errors import InvalidConfig
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint, smallest_bytes
from rap_env.memory.workload import Workload

_log = logging.getLogger(__name__)


class Decider(Protocol):
    """A policy, or whatever stands in for one."""

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask."""


@dataclass(frozen=True)
class Limits:
    """What keeps a controller from switching to and fro.

    Attributes:
        margin: Share of every budget that is left free.
        growth: Share of the budget that stays free in addition after a growth; the gap between growing and shrinking.
        window_seconds: A mask grows to what was free all this time, and so long after the last switch at the earliest;
            shrinking waits for nothing.

    Raises:
        InvalidConfig: A share is not between 0 and 1, or the window is negative.
    """

    margin: float = 0.02
    growth: float = 0.05
    window_seconds: float = 2.0

    def __post_init__(self) -> None:
        for name in ("margin", "growth"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidConfig(f"{name}: expected at least 0 and below 1; got {getattr(self, name)}")
        if not self.window_seconds >= 0.0:
            raise InvalidConfig(f"window_seconds: expected at least 0; got {self.window_seconds}")


@dataclass(frozen=True)
class Decision:
    """What to do with a workload now.

    Attributes:
        mask: What to run with; None where nothing fits.
        batch_size: How many of the workload's sequences fit at once with it; fewer than asked where the batch has to be
            split, 0 where not even one fits.
        by: Which decider the mask is of; `"held"` where the present one stays.
        needed_bytes: Where nothing fits, the smallest budget that would do for one sequence, margin included.
    """

    mask: PruningMask | None
    batch_size: int
    by: str
    needed_bytes: int = 0


class Controller:
    """Asks for the memory and for a mask, and never returns one that the memory does not hold.

    A budget is what may be taken by weights, KV cache and activations together. It is read at each decision and made
    smaller by a margin and by what the prompt's activations take. If the present mask does not fit any more the
    deciders are asked in their order, and the first mask that fits is taken; one that raises, or answers something else
    than a mask that fits, is passed over and counted. If none helps, the batch is split, and if not even one sequence
    fits, the workload is refused. A mask grows only to what was free during a whole window, so that memory that comes
    and goes is not chased. A reading that is no number counts as the lowest of the window, and as nothing before there
    is one.

    Each decision takes constant time on the mean, whatever the window holds.

    Args:
        shape: The model.
        deciders: By name, in the order in which they are asked: a policy, and what stands in for it.
        read: Tells the bytes that the model may take in all; see `free_bytes` for what is free beside what it holds.
        clock: Tells the time in seconds; it does not go backwards.
        limits: Against switching to and fro.

    Attributes:
        mask: What the model runs with, as far as the controller knows.
        failures: How often each decider, and `"reading"`, failed.
        switches: How often the mask changed.

    Raises:
        InvalidConfig: There is no decider.
    """

    def __init__(
        self,
        shape: ModelShape,
        deciders: Mapping[str, Decider],
        read: Callable[[], float],
        clock: Callable[[], float],
        limits: Limits | None = None,
    ) -> None:
        if not deciders:
            raise InvalidConfig("expected at least one decider, such as a policy; got none")
        self.mask = PruningMask.all_kept(shape)
        self.failures: Counter[str] = Counter()
        self.switches = 0
        self._shape, self._deciders, self._read, self._clock = shape, dict(deciders), read, clock
        self._limits = limits or Limits()
        self._lowest = _LowestOf(self._limits.window_seconds)
        self._now, self._changed = 0.0, None  # seconds: of this decision, and of the last switch or the first decision

    def decide(self, workload: Workload) -> Decision:
        """What to run a workload with now; the caller applies the mask before it admits anything.

        Args:
            workload: All that runs, or would run, at once: sequences in flight and the new ones.

        Raises:
            InvalidWorkload: It is beyond the model's context.
        """
        smallest_bytes(self._shape, workload)  # refuses what no memory helps
        self._now, n_bytes = self._clock(), self._reading()
        self._lowest.add(self._now, n_bytes)
        self._changed = self._now if self._changed is None else self._changed
        if self._now - self._changed >= self._limits.window_seconds:
            steady_bytes = self._lowest.value * (1.0 - self._limits.growth)
            if (grown := self._larger(workload, self._left(workload, steady_bytes))) is not None:
                return grown
        left_bytes = self._left(workload, n_bytes)
        if self._peak(self.mask, workload) <= left_bytes:
            return Decision(self.mask, workload.batch_size, "held")
        for batch_size in _halves(workload.batch_size):
            part = replace(workload, batch_size=batch_size)
            if (found := self._ask(part, self._left(part, n_bytes))) is not None:
                return self._taken(*found, batch_size)
        return self._refusal(workload)

    def _reading(self) -> float:
        try:
            n_bytes = float(self._read())
        except Exception:  # whatever it is, it must not end the service
            _log.exception("the memory could not be read")
            n_bytes = math.nan
        if math.isfinite(n_bytes) and n_bytes >= 0.0:
            return n_bytes
        self.failures["reading"] += 1
        return self._lowest.value if self._lowest else 0.0

    def _left(self, workload: Workload, n_bytes: float) -> int:
        """Of a budget, what weights and KV cache may take."""
        dense = footprint(self._shape, PruningMask.all_kept(self._shape), workload)
        return int(n_bytes * (1.0 - self._limits.margin)) - dense.activation_bytes

    def _peak(self, mask: PruningMask, workload: Workload) -> int:
        return footprint(self._shape, mask, workload).peak_bytes

    def _ask(self, workload: Workload, left_bytes: int) -> tuple[PruningMask, str] | None:
        """The first decider's mask that fits, and its name."""
        if left_bytes < smallest_bytes(self._shape, workload):
            return None  # nobody can help
        for name, decider in self._deciders.items():
            try:
                mask = decider.decide(workload, left_bytes)
                if self._peak(mask, workload) <= left_bytes:
                    return mask, name
                _log.warning("%s decided on a mask that does not fit", name)
            except Exception:  # a policy that fails must not end the service
                _log.exception("%s failed to decide", name)
            self.failures[name] += 1
        return None

    def _larger(self, workload: Workload, left_bytes: int) -> Decision | None:
        found = self._ask(workload, left_bytes)
        if found is None or self._peak(found[0], workload) <= self._peak(self.mask, workload):
            return None
        return self._taken(*found, workload.batch_size)

    def _taken(self, mask: PruningMask, by: str, batch_size: int) -> Decision:
        if mask != self.mask:
            self.mask, self._changed = mask, self._now
            self.switches += 1
        return Decision(mask, batch_size, by)

    def _refusal(self, workload: Workload) -> Decision:
        one = replace(workload, batch_size=1)
        needed = smallest_bytes(self._shape, one) - self._left(one, 0.0)
        return Decision(None, 0, "nobody", math.ceil(needed / (1.0 - self._limits.margin)))


class _LowestOf:
    """The lowest of the values of a window of time, in constant time on the mean."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._rising = seconds, deque[tuple[float, float]]()

    def __bool__(self) -> bool:
        return bool(self._rising)

    @property
    def value(self) -> float:
        return self._rising[0][1]

    def add(self, now: float, value: float) -> None:
        while self._rising and self._rising[-1][1] >= value:
            self._rising.pop()
        self._rising.append((now, value))
        while len(self._rising) > 1 and self._rising[0][0] <= now - self._seconds:
            self._rising.popleft()


def _halves(batch_size: int) -> list[int]:
    """A batch size and its halves, down to 1."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes
