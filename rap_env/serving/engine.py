"""The engine: serves requests together while the model's mask follows the memory."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rap_env.errors import InvalidConfig, InvalidWorkload, check_known
from rap_env.llm.live import LiveModel, Reading
from rap_env.mask import PruningMask
from rap_env.memory.measured import trim_freed_memory
from rap_env.serving.controller import Controller
from rap_env.serving.request import Request, Sequence, Status
from rap_env.serving.switching import RESTORING, Restoring, Switching

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How an engine serves.

    Attributes:
        max_batch: Sequences in flight at most.
        read_tokens: Tokens that are read in a step at most, those that were just generated included.
        restoring: What KV heads that come back mean to sequences in flight: they read all their tokens again
            (`"exact"`), go on without these heads (`"left out"`), or attend with them to the tokens from now on
            (`"from now"`).
        patience_seconds: How long a request waits, while no memory makes room for any, before it is refused.

    Raises:
        InvalidConfig: A number is not positive, or there is no room to read a token of each sequence in a step.
        UnknownName: There is no such way of restoring.
    """

    max_batch: int = 16
    read_tokens: int = 512
    restoring: Restoring = "left out"
    patience_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_known("way of restoring", self.restoring, RESTORING)
        if not 1 <= self.max_batch <= self.read_tokens:
            raise InvalidConfig(f"expected 1 <= max_batch <= read_tokens; got {self.max_batch} and {self.read_tokens}")


@dataclass(frozen=True)
class Step:
    """What an engine did in one step.

    Attributes:
        began_seconds: By the engine's clock.
        decide_seconds: What the decision took.
        switch_seconds: What applying it took: weights and caches.
        read_seconds: What the forward took, with the drawing of tokens.
        read_tokens: Tokens that went through the model.
        generated_tokens: Tokens that came out.
        running: Sequences in flight.
        waiting: Sequences that are not let in yet.
        mask: What the model ran with.
        switched: Whether that is new.
        by: Who decided.
        budget_bytes: What the memory told.
        needed_bytes: What weights and KV cache take by the memory model.
    """

    began_seconds: float
    decide_seconds: float
    switch_seconds: float
    read_seconds: float
    read_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    mask: PruningMask
    switched: bool
    by: str
    budget_bytes: float
    needed_bytes: int


class Engine:
    """Serves requests with continuous batching: each step reads prompts and next tokens of all sequences in flight.

    At the beginning of each step the controller decides. What has to shrink does so before anything is let in: first
    weights and caches of dropped heads leave, and if that is not enough the sequences that came last give their caches
    up and wait to be read again. Weights that come back are read ahead by the store's thread while the engine goes on.

    One thread calls `step`; any may call `submit` and `cancel`.

    Args:
        model: Nothing else may apply masks to it.
        controller: Decides; it must know the same `read_tokens`.
        options: How to serve.
        clock: Tells the time in seconds.

    Raises:
        InvalidConfig: It does not.
    """

    def __init__(
        self,
        model: LiveModel,
        controller: Controller,
        options: Options | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._controller, self._options = model, controller, options or Options()
        if controller.read_tokens != self._options.read_tokens:
            told = f"{controller.read_tokens} and {self._options.read_tokens}"
            raise InvalidConfig(f"read_tokens: expected the same of controller and options; got {told}")
        self._clock, self._switching = clock, Switching(model, controller, self._options.restoring)
        self._lock = threading.Lock()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._short_since: float | None = None  # since when nothing can be served

    @property
    def mask(self) -> PruningMask:
        return self._model.llm.mask

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, and nothing waits."""
        return not self._running and not self._waiting

    @property
    def needed_bytes(self) -> int:
        """What weights and KV cache will take at most, by the memory model."""
        return self._weights_bytes + sum(sequence.cache.nbytes for sequence in self._running)

    @property
    def written_bytes(self) -> int:
        """What they take now."""
        return self._weights_bytes + sum(sequence.cache.written_bytes for sequence in self._running)

    @property
    def _weights_bytes(self) -> int:
        return self._model.llm.shape.fixed_bytes + self._switching.weight_bytes

    def submit(self, request: Request, listener: Callable[[Sequence], None] | None = None) -> Sequence:
        """Lets a request wait for its turn.

        Raises:
            InvalidWorkload: It is longer than the model's context, or has a token that the model does not know.
        """
        shape = self._model.llm.shape
        if request.length > shape.context_tokens:
            raise InvalidWorkload(
                f"expected at most {shape.context_tokens:,} tokens, prompt and answer together; got"
                f" {len(request.tokens):,} and {request.generated_tokens:,}"
            )
        if not all(0 <= token < shape.vocab_size for token in request.tokens):
            raise InvalidWorkload(f"expected tokens of 0 to {shape.vocab_size - 1}")
        sequence = Sequence(request, self._clock(), listener)
        with self._lock:
            self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence, at the latest with the next step."""
        sequence.cancelled = True

    def step(self) -> Step:
        """Decides, switches, lets in, reads once and draws the next tokens.

        Whatever the reading of a step raises fails the sequences in it; the next step goes on with the others.
        """
        began = self._clock()
        self._drop_cancelled()
        with self._lock:
            candidates = [*self._running, *self._waiting][: self._options.max_batch]
        n_running = len(self._running)
        decision = self._controller.decide([one.request.length for one in candidates], n_running)
        decided = self._clock()
        while len(self._running) > decision.n_served:
            self._evict(self._running[-1])
        switched = self._switching.follow(decision.mask, self._running)
        self._let_in(candidates[n_running : decision.n_served])
        if decision.n_served == 0 and self._waiting:
            self._refuse(decision.needed_bytes)
        else:
            self._short_since = None
        switched_at = self._clock()
        read_tokens, generated_tokens = self._read()
        return Step(
            began_seconds=began,
            decide_seconds=decided - began,
            switch_seconds=switched_at - decided,
            read_seconds=self._clock() - switched_at,
            read_tokens=read_tokens,
            generated_tokens=generated_tokens,
            running=len(self._running),
            waiting=len(self._waiting),
            mask=self.mask,
            switched=switched,
            by=decision.by,
            budget_bytes=self._controller.budget_bytes,
            needed_bytes=self.needed_bytes,
        )

    def _let_in(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            with self._lock:
                self._waiting.remove(sequence)
            sequence.cache = self._model.new_cache(sequence.request.length)
            sequence.status = Status.RUNNING
            self._running.append(sequence)

    def _evict(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.cache, sequence.status = None, Status.WAITING
        sequence.evictions += 1
        trim_freed_memory()
        with self._lock:
            self._waiting.appendleft(sequence)

    def _refuse(self, needed_bytes: int) -> None:
        """Refuses what has waited for too long while nothing could be served; time in flight is no waiting."""
        now = self._clock()
        self._short_since = now if self._short_since is None else self._short_since
        with self._lock:
            waiting = list(self._waiting)
        for sequence in waiting:
            if now - max(sequence.arrived_seconds, self._short_since) >= self._options.patience_seconds:
                error = f"not enough memory: at least {needed_bytes:,} bytes are needed to serve one sequence"
                self._end(sequence, Status.REFUSED, error)

    def _drop_cancelled(self) -> None:
        with self._lock:
            sequences = [*self._running, *self._waiting]
        for sequence in sequences:
            if sequence.cancelled:
                self._end(sequence, Status.CANCELLED)

    def _end(self, sequence: Sequence, status: Status, error: str = "") -> None:
        with self._lock:
            (self._running if sequence.status is Status.RUNNING else self._waiting).remove(sequence)
        sequence.cache = None
        sequence.status, sequence.error, sequence.ended_seconds = status, error, self._clock()
        sequence.notify()

    def _plan(self) -> list[tuple[Sequence, list[int]]]:
        """Which tokens are read next: that of each sequence that generates, then prompts in order."""
        room, planned = self._options.read_tokens, []
        for sequence in sorted(self._running, key=lambda one: one.unread > 1):
            if n_tokens := min(sequence.unread, room):
                read = sequence.cache.length
                planned.append((sequence, sequence.tokens[read : read + n_tokens]))
                room -= n_tokens
        return planned

    def _read(self) -> tuple[int, int]:
        """Reads and draws; returns how many tokens were read and generated."""
        if not (planned := self._plan()):
            return 0, 0
        try:
            readings: list[Reading] = [(sequence.cache, tokens) for sequence, tokens in planned]
            logits = self._model.read(readings)
        except Exception as error:  # a step that fails must not end the service
            _log.exception("a step failed")
            for sequence, _tokens in planned:
                self._end(sequence, Status.FAILED, f"{type(error).__name__}: {error}")
            return 0, 0
        drawing = [(one, own) for (one, _tokens), own in zip(planned, logits, strict=True) if not one.unread]
        for sequence, own in drawing:
            self._draw(sequence, own)
        return sum(len(tokens) for _sequence, tokens in planned), len(drawing)

    def _draw(self, sequence: Sequence, logits: torch.Tensor) -> None:
        try:
            token = sequence.draw(logits)
        except RuntimeError as error:  # logits that are no numbers
            self._end(sequence, Status.FAILED, f"no token could be drawn: {error}")
            return
        if sequence.first_seconds is None:
            sequence.first_seconds = self._clock()
        stopped = token in sequence.request.stop_tokens
        if not stopped:
            sequence.generated.append(token)
            sequence.masks.append(self.mask)
        if stopped or len(sequence.generated) == sequence.request.generated_tokens:
            self._end(sequence, Status.FINISHED)
        else:
            sequence.notify()
