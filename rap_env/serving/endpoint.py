"""The endpoint: OpenAI's completions and chat over HTTP, health and metrics."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from rap_env.llm.switchable import SwitchableLLM
from rap_env.serving.answers import DONE, Answer, ChatAnswer, event
from rap_env.serving.asking import Asked, Asking
from rap_env.serving.generation import Generation
from rap_env.serving.metrics import Metrics
from rap_env.serving.protocol import ApiError
from rap_env.serving.service import Service

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_READ_ON = 16  # times the limit, so that who sends too much can read why; beyond that the connection is closed
_HUNG_UP = 499


class _HungUp(Exception):
    """Who asked does not listen any more."""


def create_app(
    service: Service, llm: SwitchableLLM, metrics: Metrics, max_body_bytes: int = 2**20, body_seconds: float = 60.0
) -> FastAPI:
    """The application; it starts the service and closes it.

    Args:
        service: Serves.
        llm: What it serves, for tokenizer and sizes.
        metrics: What the service counts with.
        max_body_bytes: Of a call.
        body_seconds: That a call's body may take to arrive.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    calls = _Calls(service, llm, metrics, max_body_bytes, body_seconds)
    created = int(time.time())

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await calls.answer(http, calls.asking.completion, Answer(llm.name))

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await calls.answer(http, calls.asking.chat, ChatAnswer(llm.name))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": llm.name, "object": "model", "created": created, "owned_by": "rap-env"}
        return {"object": "list", "data": [model | {"max_model_len": llm.shape.context_tokens}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse(_health(service), 200 if service.alive and not service.failing else 503)

    @app.get("/metrics")
    async def counted() -> PlainTextResponse:
        return PlainTextResponse(metrics.text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def unknown(http: Request, error: Any) -> JSONResponse:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return _refusal(ApiError(error.status_code, message, code="unknown_url"))

    app.add_exception_handler(404, unknown)
    app.add_exception_handler(405, unknown)
    return app


def _health(service: Service) -> dict[str, Any]:
    state = "dead" if not service.alive else "failing" if service.failing else "ok"
    if (step := service.step) is None:
        return {"status": state, "error": service.failing}
    numbers = {name: getattr(step, name) for name in ("running", "waiting", "budget_bytes", "needed_bytes")}
    return {"status": state, "error": service.failing} | numbers


class _Calls:
    """Answers calls of either protocol."""

    def __init__(
        self, service: Service, llm: SwitchableLLM, metrics: Metrics, max_body_bytes: int, body_seconds: float
    ) -> None:
        self.asking = Asking(llm, llm.name)
        self._service, self._metrics = service, metrics
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds

    async def answer(self, http: Request, read: Callable[[bytes], Asked], form: Answer) -> Response:
        """Answers one call; whatever goes wrong is said in the protocol's format."""
        try:
            raw = await self._body(http)
            asked = await asyncio.to_thread(read, raw)
            generation = Generation(self._service, asked, self.asking.decode)
            try:
                if asked.stream:
                    return await self._streamed(http, generation, asked, form)
                texts = await _unless_gone(http, _whole(generation, len(asked.requests)))
            except BaseException:
                generation.close()
                raise
            self._metrics.answered(200)
            return JSONResponse(form.whole(texts, generation.usage))
        except ApiError as error:
            refused = error
        except (_HungUp, ClientDisconnect):
            refused = ApiError(_HUNG_UP, "hung up")
        except Exception:
            _log.exception("a call failed")
            refused = ApiError(500, "the call failed; the server's log says why", code="internal_error")
        self._metrics.answered(refused.status)
        return _refusal(refused)

    async def _body(self, http: Request) -> bytes:
        try:
            async with asyncio.timeout(self._body_seconds):
                return await _body(http, self._max_body_bytes)
        except TimeoutError as error:
            message = f"expected the whole body within {self._body_seconds:g} seconds"
            raise ApiError(408, message, code="body_too_slow") from error

    async def _streamed(self, http: Request, generation: Generation, asked: Asked, form: Answer) -> Response:
        """A stream, once its first piece is there: what is refused before is refused with its status."""
        pieces = generation.pieces()
        first = await _unless_gone(http, anext(pieces))
        ended = _Ended()

        async def events() -> AsyncIterator[str]:
            try:
                for chunk in form.opening(len(asked.requests)):
                    yield event(chunk)
                for chunk in form.chunks(first):
                    yield event(chunk)
                async for piece in pieces:
                    for chunk in form.chunks(piece):
                        yield event(chunk)
                if asked.include_usage:
                    yield event(form.closing(generation.usage))
                ended.status = 200
            except ApiError as error:
                ended.status = error.status
                yield event(error.body)
            yield DONE

        def end() -> None:
            generation.close()
            self._metrics.answered(ended.status)

        return _Events(events(), end)


class _Ended:
    """How a stream ended."""

    status = _HUNG_UP


class _Events(StreamingResponse):
    """Server-sent events, and what is to be done however their sending ends."""

    def __init__(self, content: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._end = end

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _whole(generation: Generation, n_choices: int) -> list[tuple[str, str]]:
    """All pieces joined: text and finish reason of each prompt."""
    texts, reasons = [""] * n_choices, [""] * n_choices
    async for piece in generation.pieces():
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason or reasons[piece.index]
    return list(zip(texts, reasons, strict=True))


async def _body(http: Request, max_bytes: int) -> bytes:
    """The body of a call.

    Raises:
        ApiError: It is too large, or not said to be JSON; a browser sends that to its own origin only.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"expected Content-Type: application/json; got {kind or 'none'}", code="invalid_type")
    raw, n_bytes = bytearray(), 0
    async for chunk in http.stream():
        n_bytes += len(chunk)
        if n_bytes <= max_bytes:
            raw += chunk
        elif n_bytes > _READ_ON * max_bytes:
            break
    if n_bytes > max_bytes:
        raise ApiError(413, f"expected a body of at most {max_bytes:,} bytes; got more", code="body_too_large")
    return bytes(raw)


async def _unless_gone(http: Request, work: Awaitable[_Result]) -> _Result:
    """Waits for something as long as somebody listens."""
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait([done, gone], return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise _HungUp
        return done.result()
    finally:
        done.cancel()
        gone.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: ApiError) -> JSONResponse:
    headers = None if error.retry_seconds is None else {"Retry-After": str(error.retry_seconds)}
    return JSONResponse(error.body, error.status, headers)
