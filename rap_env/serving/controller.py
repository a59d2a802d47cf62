"""The controller: which mask a live model runs with, and how many sequences, while its memory moves."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rap_env.errors import InvalidConfig
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes
from rap_env.memory.workload import Workload

_log = logging.getLogger(__name__)


class Decider(Protocol):
    """A policy, or whatever stands in for one."""

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask."""


@dataclass(frozen=True)
class Limits:
    """What keeps a controller from switching to and fro, and a model from being pruned for a queue's sake.

    Attributes:
        margin: Share of every budget that is left free.
        slack: Share of the budget that a new mask leaves free in addition, if any mask does; so memory that goes on
            falling, or falls again after a growth, does not mean a switch each time. A mask also grows by that share
            at least, or to the whole model: less is not worth the risk that it has to be taken back.
        window_seconds: A mask grows to what was free all this time, and so long after the last switch at the earliest;
            shrinking waits for nothing.
        least_kept: Share of the components' weight bytes that a mask must keep to be chosen for letting more sequences
            in; below it they wait. Sequences in flight, and the only one there is, may have less.

    Raises:
        InvalidConfig: A share is not between 0 and 1, or the window is negative.
    """

    margin: float = 0.02
    slack: float = 0.05
    window_seconds: float = 2.0
    least_kept: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "slack", "least_kept"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InvalidConfig(f"{name}: expected at least 0 and below 1; got {getattr(self, name)}")
        if not self.window_seconds >= 0.0:
            raise InvalidConfig(f"window_seconds: expected at least 0; got {self.window_seconds}")


@dataclass(frozen=True)
class Decision:
    """What to do now.

    Attributes:
        mask: What to run with; None where no decider has a mask that the memory holds, not even without sequences. Of
            memory that holds no model at all, the smallest mask is the best that can be done.
        n_served: How many of the sequences, the first ones, may be in memory with it.
        by: Which decider the mask is of; `"held"` where the present one stays.
        needed_bytes: Where none may, the smallest budget that would do for one, margin included.
    """

    mask: PruningMask | None
    n_served: int
    by: str
    needed_bytes: int = 0


class Controller:
    """Asks for the memory and for a mask, and never returns one that the memory does not hold.

    A budget is what may be taken by weights, KV cache and activations together. It is read at each decision and made
    smaller by a margin and by what activations take. If the present mask does not fit any more, or fits too few
    sequences, the deciders are asked in their order, and the first mask that fits is taken; one that raises, or answers
    something else than a mask that fits, is passed over and counted. If none helps, fewer sequences are served, and if
    not even one fits, it is refused. A mask grows only to what would have fitted during a whole window, with the
    sequences of then, and if memory is falling, will fit after another one; so what comes and goes is not chased. A
    reading that is no number counts as the lowest of the window, and as nothing before there is one.

    A decision that holds the mask takes constant time on the mean, whatever the window holds; deciders are asked to
    grow once a window at most.

    Args:
        shape: The model.
        deciders: By name, in the order in which they are asked: a policy, and what stands in for it.
        read: Tells the bytes that the model may take in all; see `free_bytes` for what is free beside what it holds.
        clock: Tells the time in seconds; it does not go backwards.
        read_tokens: Tokens that are read at once at most, of all sequences together.
        limits: Against switching to and fro.

    Attributes:
        read_tokens: The same.
        mask: What the model runs with, as far as the controller knows.
        budget_bytes: What the memory last told, margin and activations not taken off.
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
        read_tokens: int = 512,
        limits: Limits | None = None,
    ) -> None:
        if not deciders:
            raise InvalidConfig("expected at least one decider, such as a policy; got none")
        self.read_tokens, self.mask = read_tokens, PruningMask.all_kept(shape)
        self.budget_bytes = 0.0
        self.failures: Counter[str] = Counter()
        self.switches = 0
        self._shape, self._deciders, self._read, self._clock = shape, dict(deciders), read, clock
        self._limits = limits or Limits()
        window = self._limits.window_seconds
        self._budgets, self._counts, self._tokens = _Recent(window), _Recent(window), _Recent(window)
        self._reading_bytes = activation_bytes(shape, self.mask, read_tokens, 0)
        self._least_bytes = self._limits.least_kept * self.mask.weight_bytes
        self._now, self._changed = 0.0, None  # seconds: of this decision; of the last switch, or of asking to grow

    def decide(self, lengths: Sequence[int], n_running: int) -> Decision:
        """What to run with now; the caller applies the mask before it lets anything in.

        Args:
            lengths: Tokens that each sequence may come to have: first those in flight, then those that wait.
            n_running: How many are in flight.
        """
        self._now, self.budget_bytes = self._clock(), self._reading()
        for recent, value in (
            (self._budgets, self.budget_bytes),
            (self._counts, -len(lengths)),  # negated, as the most is wanted
            (self._tokens, -sum(lengths)),
        ):
            recent.add(self._now, value)
        self._changed = self._now if self._changed is None else self._changed
        if self._now - self._changed >= self._limits.window_seconds:
            self._changed = self._now
            if (grown := self._larger(lengths, n_running)) is not None:
                return grown
        for n_served in _fewer_and_fewer(len(lengths), n_running):
            tokens, floor_bytes = lengths[:n_served], self._floor(n_served, n_running)
            if self._bytes(self.mask, tokens) <= self._left(self.budget_bytes, n_served):
                return Decision(self.mask, n_served, "held", self._needed(n_served))
            for share in (1.0 - self._limits.slack, 1.0):
                found = self._ask(tokens, self._left(share * self.budget_bytes, n_served), floor_bytes)
                if found is not None:
                    return self._taken(*found, n_served)
        return Decision(None, 0, "nobody", self._needed(0))

    def applied(self, mask: PruningMask) -> None:
        """Has to be told where another mask was applied than was decided on."""
        self.mask = mask

    def _reading(self) -> float:
        try:
            n_bytes = float(self._read())
        except Exception:  # whatever it is, it must not end the service
            if not self.failures["reading"]:  # once; it is read at each step
                _log.exception("the memory could not be read")
            n_bytes = math.nan
        if math.isfinite(n_bytes) and n_bytes >= 0.0:
            return n_bytes
        self.failures["reading"] += 1
        return self._budgets.lowest if self._budgets else 0.0

    def activation_bytes(self, n_sequences: int) -> int:
        """What is taken off every budget for activations; without sequences nothing is read."""
        return self._reading_bytes + 4 * n_sequences * self._shape.vocab_size if n_sequences else 0

    def _left(self, n_bytes: float, n_sequences: int) -> int:
        """Of a budget, what weights and KV cache may take; without sequences never less than what can't be dropped."""
        left_bytes = int(n_bytes * (1.0 - self._limits.margin)) - self.activation_bytes(n_sequences)
        return left_bytes if n_sequences else max(left_bytes, self._shape.fixed_bytes)

    def _bytes(self, mask: PruningMask, lengths: Sequence[int]) -> int:
        return self._shape.fixed_bytes + mask.weight_bytes + mask.kv_bytes_per_token * sum(lengths)

    def _floor(self, n_served: int, n_running: int) -> float:
        """Weight bytes that a mask must keep to be chosen for so many sequences."""
        return self._least_bytes if n_served > max(1, n_running) else 0.0

    def _ask(self, lengths: Sequence[int], left_bytes: int, floor_bytes: float) -> tuple[PruningMask, str] | None:
        """The first decider's mask that fits, and its name."""
        if left_bytes < self._shape.fixed_bytes:
            return None  # nobody can help
        workload = Workload(max(1, len(lengths)), max(1, math.ceil(sum(lengths) / max(1, len(lengths)))))
        for name, decider in self._deciders.items():
            try:
                mask = decider.decide(workload, left_bytes)
                if mask.components == self._shape.components and self._bytes(mask, lengths) <= left_bytes:
                    return (mask, name) if mask.weight_bytes >= floor_bytes else None
                reason: Exception | str = "its mask does not fit, or is another model's"
            except Exception as error:  # a policy that fails must not end the service
                reason = error
            if not self.failures[name]:  # once; it will be so each time
                _log.warning("%s failed to decide: %r", name, reason)
            self.failures[name] += 1
        return None

    def _larger(self, lengths: Sequence[int], n_running: int) -> Decision | None:
        """A mask that takes more than the present one, for all sequences."""
        falling_bytes = max(0.0, self._budgets.first - self.budget_bytes)
        steady_bytes = (self._budgets.lowest - falling_bytes) * (1.0 - self._limits.slack)
        n_most, most_tokens = int(-self._counts.lowest), int(-self._tokens.lowest)
        most = [math.ceil(most_tokens / n_most)] * n_most if n_most else []
        found = self._ask(most, self._left(steady_bytes, max(1, n_most)), self._floor(len(lengths), n_running))
        if found is None or not self._is_worth_a_switch(found[0], lengths):
            return None
        return self._taken(*found, len(lengths))

    def _is_worth_a_switch(self, mask: PruningMask, lengths: Sequence[int]) -> bool:
        least_gain = 0.0 if all(mask.keep) else self._limits.slack
        return self._bytes(mask, lengths) > (1.0 + least_gain) * self._bytes(self.mask, lengths)

    def _taken(self, mask: PruningMask, by: str, n_served: int) -> Decision:
        if mask != self.mask:
            self.mask, self._changed = mask, self._now
            self.switches += 1
        return Decision(mask, n_served, by, self._needed(n_served))

    def _needed(self, n_served: int) -> int:
        """Where no sequence is served, what one needs."""
        if n_served:
            return 0
        return math.ceil((self._shape.fixed_bytes - self._left(0.0, 1)) / (1.0 - self._limits.margin))


class _Recent:
    """The values of a window of time, the first and the lowest of them, in constant time on the mean."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._all, self._rising = deque[tuple[float, float]](), deque[tuple[float, float]]()

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def first(self) -> float:
        return self._all[0][1]

    @property
    def lowest(self) -> float:
        return self._rising[0][1]

    def add(self, now: float, value: float) -> None:
        while self._rising and self._rising[-1][1] >= value:
            self._rising.pop()
        for values in (self._all, self._rising):
            values.append((now, value))
            while len(values) > 1 and values[0][0] <= now - self._seconds:
                values.popleft()


def _fewer_and_fewer(n_all: int, n_running: int) -> Iterator[int]:
    """All sequences; those in flight with half of the others, and half of these; then half of those in flight, down to
    one; and none."""
    waiting, running = n_all - n_running, n_running
    while waiting:
        yield running + waiting
        waiting //= 2
    while running:
        yield running
        running //= 2
    yield 0
