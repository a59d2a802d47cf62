"""What is asked of a live model, and what becomes of it."""

import enum
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rap_env.errors import InvalidWorkload
from rap_env.llm.live_cache import SequenceCache
from rap_env.mask import PruningMask

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A prompt that is to be gone on with.

    Attributes:
        tokens: The prompt.
        generated_tokens: Tokens that are generated at most.
        stop_tokens: Tokens that end the generation; the one that does is not part of it.
        temperature: Of the distribution that tokens are drawn from; 0 takes the most likely one.
        top_p: Share of the distribution's most likely tokens that are drawn from.
        seed: Of the draws.
        answer: What it is gone on with, whatever the model would say; what the model thinks of it is measured.

    Raises:
        InvalidWorkload: The prompt is empty, nothing is to be generated, or a number is out of its range.
    """

    tokens: tuple[int, ...]
    generated_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    answer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InvalidWorkload("expected a prompt of at least one token; got none")
        if self.generated_tokens < 1:
            raise InvalidWorkload(f"generated_tokens: expected at least 1; got {self.generated_tokens}")
        if self.answer is not None and len(self.answer) != self.generated_tokens:
            raise InvalidWorkload(
                f"expected an answer of {self.generated_tokens} tokens, as are to be generated; got {len(self.answer)}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InvalidWorkload(f"temperature: expected at least 0; got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidWorkload(f"top_p: expected more than 0 and at most 1; got {self.top_p}")

    @property
    def length(self) -> int:
        """Tokens that the sequence may come to have."""
        return len(self.tokens) + self.generated_tokens


class Status(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"  # all of it was generated, or a stop token came
    REFUSED = "refused"  # no mask makes room for it
    FAILED = "failed"  # something raised
    CANCELLED = "cancelled"  # nobody wants it any more


@dataclass(eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        request: What was asked.
        arrived_seconds: When, by the engine's clock.
        listener: Called after each new token and at the end, by the thread that runs the engine.
        status: Where it stands.
        error: Why it was refused, or failed.
        generated: Tokens so far.
        masks: What each of them was generated with.
        log_likelihoods: Of the tokens of an answer that was given.
        first_seconds: When its first token came.
        ended_seconds: When it ended.
        cancelled: Whether it is to end with the next step.
        evictions: How often its cache was given up for lack of memory, to be read again later.
        cache: Its keys and values while it runs.
    """

    request: Request
    arrived_seconds: float
    listener: Callable[["Sequence"], None] | None = None
    status: Status = Status.WAITING
    error: str = ""
    generated: list[int] = field(default_factory=list)
    masks: list[PruningMask] = field(default_factory=list)
    log_likelihoods: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    ended_seconds: float | None = None
    cancelled: bool = False
    evictions: int = 0
    cache: SequenceCache | None = None
    _generator: torch.Generator | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt, and what was generated."""
        return [*self.request.tokens, *self.generated]

    @property
    def unread(self) -> int:
        """Tokens that the cache does not have; 1 while it generates."""
        read = 0 if self.cache is None else self.cache.length
        return len(self.request.tokens) + len(self.generated) - read

    def notify(self) -> None:
        """Calls the listener; what it raises is logged, for somebody else's code must not end the service."""
        if self.listener is not None:
            try:
                self.listener(self)
            except Exception:
                _log.exception("a listener raised")

    def draw(self, logits: torch.Tensor) -> int:
        """The next token from its logits [V]."""
        request = self.request
        if request.answer is not None:
            token = request.answer[len(self.generated)]
            self.log_likelihoods.append(float(logits.float().log_softmax(-1)[token]))
            return token
        if request.temperature == 0.0:
            return int(logits.argmax())
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(request.seed)
        shares, order = (logits.float().cpu() / request.temperature).softmax(-1).sort(descending=True)
        within = shares.cumsum(-1) - shares < request.top_p  # at least the first
        return int(order[torch.multinomial(shares * within, 1, generator=self._generator)])
