"""What a service generates for one call, as pieces of text."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from rap_env.serving.asking import Asked
from rap_env.serving.pieces import GrowingText
from rap_env.serving.protocol import ApiError
from rap_env.serving.request import Status
from rap_env.serving.service import Progress, Service, ServiceStopped, TooManyWaiting

_MEMORY_RETRY_SECONDS, _QUEUE_RETRY_SECONDS = 10, 1


@dataclass(frozen=True)
class Piece:
    """Some more of an answer.

    Attributes:
        index: Which prompt it answers.
        text: May be empty.
        finish_reason: `"stop"` or `"length"` in the last piece, None before.
    """

    index: int
    text: str
    finish_reason: str | None


class Generation:
    """The answers to one call; made in the event loop that reads them.

    Args:
        service: Generates.
        asked: The call.
        decode: Text of some tokens.

    Attributes:
        prompt_tokens: Of all prompts.
        completion_tokens: Of all answers so far; tokens that stop strings are in count.

    Raises:
        ApiError: Too many wait, or the service does not run.
    """

    def __init__(self, service: Service, asked: Asked, decode: Callable[[Sequence[int]], str]) -> None:
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Progress]]()
        self._service, self._requests = service, asked.requests
        self._texts = [GrowingText(decode, asked.stops) for _request in asked.requests]
        self._counts = [0] * len(asked.requests)
        self._open = set(range(len(asked.requests)))
        self.prompt_tokens = sum(len(request.tokens) for request in asked.requests)

        def tell(index: int, progress: Progress) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, (index, progress))

        try:
            self._sequences = service.submit(asked.requests, tell)
        except TooManyWaiting as error:
            raise ApiError(429, str(error), None, "too_many_requests", _QUEUE_RETRY_SECONDS) from error
        except ServiceStopped as error:
            raise ApiError(503, str(error), None, "not_running") from error

    @property
    def completion_tokens(self) -> int:
        return sum(self._counts)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts as the protocol has them."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"total_tokens": sum(counts.values())}

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces as they come, those of several prompts as they happen to.

        Raises:
            ApiError: There was not enough memory, or something failed; pieces may have come before.
        """
        while self._open:
            index, progress = await self._news.get()
            if index in self._open:
                piece = self._piece(index, progress)
                if piece.text or piece.finish_reason:
                    yield piece

    def close(self) -> None:
        """Cancels what has not ended."""
        for index in self._open:
            self._service.cancel(self._sequences[index])
        self._open.clear()

    def _piece(self, index: int, progress: Progress) -> Piece:
        text, shown = self._texts[index], ""
        for token in progress.tokens:
            if not text.stopped:
                self._counts[index] += 1
                shown += text.push(token)
        if progress.status is Status.FINISHED:
            shown += text.finish()
        if text.stopped:
            self._service.cancel(self._sequences[index])
        elif progress.status in (Status.WAITING, Status.RUNNING):
            return Piece(index, shown, None)
        elif progress.status is Status.REFUSED:
            raise ApiError(503, progress.error, None, "insufficient_memory", _MEMORY_RETRY_SECONDS)
        elif progress.status is not Status.FINISHED:
            raise ApiError(500, progress.error or "the request was cancelled", None, "generation_failed")
        self._open.discard(index)
        ended = text.stopped or self._counts[index] < self._requests[index].generated_tokens
        return Piece(index, shown, "stop" if ended else "length")
