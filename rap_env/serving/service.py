"""The service: a thread that runs an engine, and the way in and out for everybody else."""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

from rap_env.errors import InvalidConfig, RapError
from rap_env.serving.engine import Engine, Step
from rap_env.serving.request import Request, Sequence, Status

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.1  # between two steps while nobody asks: the model shrinks all the same when memory falls
_STARVED_SECONDS = 0.02  # between two steps while no memory makes room for those who wait
_FAILED_SECONDS = 0.1  # after a step that raised
_GIVE_UP_SECONDS = 5.0  # of failing steps, after which nobody is left waiting for an answer
_JOIN_SECONDS = 30.0
_UNDER_WAY = (Status.WAITING, Status.RUNNING)


class TooManyWaiting(RapError):
    """More requests than may wait."""


class ServiceStopped(RapError):
    """A service whose thread does not run."""


@dataclass(frozen=True)
class Progress:
    """News of a sequence.

    Attributes:
        tokens: What came since the last news.
        status: Where it stands.
        error: Why it was refused, or failed.
    """

    tokens: tuple[int, ...]
    status: Status
    error: str = ""


Tell = Callable[[int, Progress], None]  # is told which of the requests there is news of, by the service's thread


class Observer(Protocol):
    """Counts what happens; called by the service's thread."""

    def stepped(self, step: Step) -> None:
        """The engine did a step."""

    def generated(self, n_tokens: int) -> None:
        """Tokens came out."""

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended, however it did."""


class NoObserver:
    """Counts nothing."""

    def stepped(self, step: Step) -> None:
        pass

    def generated(self, n_tokens: int) -> None:
        pass

    def ended(self, sequence: Sequence) -> None:
        pass


class Service:
    """Runs an engine in a thread of its own: all the time while there is something to do, else ten times a second.

    A step that raises does not end the thread: it is logged once and tried again. If that goes on for five seconds,
    the sequences under way fail, for else they would wait for ever.

    Args:
        engine: Nobody else may call its `step`.
        observer: Is told what happens.
        max_waiting: Sequences that may wait at a time.

    Attributes:
        step: The engine's last one; None before the first.
        failing: What the last step raised; empty if it did not.

    Raises:
        InvalidConfig: Nothing may wait.
    """

    def __init__(self, engine: Engine, observer: Observer | None = None, max_waiting: int = 64) -> None:
        if max_waiting < 1:
            raise InvalidConfig(f"max_waiting: expected at least 1; got {max_waiting}")
        self.step: Step | None = None
        self.failing = ""
        self._engine, self._observer, self._max_waiting = engine, observer or NoObserver(), max_waiting
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._open: dict[Sequence, _Listener] = {}
        self._failing_since = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; sequences under way fail."""
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._open)

    @property
    def cache_bytes(self) -> int:
        """What the caches of the sequences in flight have been written to; the rest of them takes no memory yet."""
        with self._lock:
            caches = [cache for sequence in self._open if (cache := sequence.cache) is not None]
        return sum(cache.nbytes * cache.length // cache.capacity_tokens for cache in caches)

    def submit(self, requests: Several[Request], tell: Tell) -> list[Sequence]:
        """Lets requests wait for their turn, all of them or none.

        Args:
            requests: What is asked.
            tell: Called with the number of a request and what is new about it.

        Raises:
            ServiceStopped: Nobody would serve them.
            TooManyWaiting: Others wait already, or there are too many at once.
            InvalidWorkload: As `Engine.submit`.
        """
        sequences: list[Sequence] = []
        with self._lock:
            if not self.alive or self._closing.is_set():
                raise ServiceStopped("the engine does not run")
            if (n_waiting := self._engine.n_waiting) + len(requests) > self._max_waiting:
                raise TooManyWaiting(
                    f"expected at most {self._max_waiting} waiting requests; got {len(requests)} beside {n_waiting}"
                )
            try:
                for number, request in enumerate(requests):
                    listener = _Listener(self, number, tell)
                    sequence = self._engine.submit(request, listener)
                    self._open[sequence] = listener
                    sequences.append(sequence)
            except RapError:
                for sequence in sequences:
                    self._engine.cancel(sequence)
                raise
        self._wake.set()
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence that nobody wants any more, soon."""
        self._engine.cancel(sequence)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._wake.clear()  # before the step: who comes while it runs is not slept over
                if seconds := self._one_step():
                    self._wake.wait(seconds)
        finally:
            self._fail_all("the engine has ended")

    def _one_step(self) -> float:
        """A step; returns how many seconds nothing is to be done."""
        try:
            step = self._engine.step()
            self._observer.stepped(step)
        except Exception as error:  # whatever it is, it must not end the service
            self._failed(error)
            return _FAILED_SECONDS
        self.step, self.failing = step, ""
        if self._engine.idle:
            return _IDLE_SECONDS
        return 0.0 if step.read_tokens else _STARVED_SECONDS

    def _failed(self, error: Exception) -> None:
        now, described = time.monotonic(), f"{type(error).__name__}: {error}"
        if not self.failing:
            self._failing_since = now
        if described != self.failing:  # once; it will be so each time
            _log.error("a step failed", exc_info=error)
        self.failing = described
        if now - self._failing_since >= _GIVE_UP_SECONDS:
            self._fail_all(f"the engine fails: {described}")

    def _fail_all(self, error: str) -> None:
        with self._lock:
            left, self._open = self._open, {}
        for sequence, listener in left.items():
            self._engine.cancel(sequence)
            listener.end(error)


class _Listener:
    """Tells the news of one sequence; nothing after its end."""

    def __init__(self, service: Service, number: int, tell: Tell) -> None:
        self._service, self._number, self._tell = service, number, tell
        self._n_told, self._ended = 0, False

    def __call__(self, sequence: Sequence) -> None:
        if self._ended:
            return
        tokens = tuple(sequence.generated[self._n_told :])
        self._n_told += len(tokens)
        if tokens:
            self._service._observer.generated(len(tokens))
        if sequence.status not in _UNDER_WAY:
            self._ended = True
            with self._service._lock:
                self._service._open.pop(sequence, None)
            self._service._observer.ended(sequence)
        self._tell(self._number, Progress(tokens, sequence.status, sequence.error))

    def end(self, error: str) -> None:
        self._ended = True
        try:
            self._tell(self._number, Progress((), Status.FAILED, error))
        except RuntimeError:  # who asked has gone, and its event loop with it
            _log.info("nobody was there to be told that %s", error)
