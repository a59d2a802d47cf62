"""Answers in the two forms of OpenAI's protocol: texts and chats, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rap_env.serving.generation import Piece

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Answer:
    """One answer of `/v1/completions`.

    Args:
        model: Its name.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self._id, self._model, self._created = f"{self.prefix}-{secrets.token_hex(12)}", model, int(time.time())

    def whole(self, texts: Sequence[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """All of it: each prompt's text and finish reason."""
        choices = [self._whole_choice(text) | _about(index, reason) for index, (text, reason) in enumerate(texts)]
        return self._envelope(self.whole_object, choices) | {"usage": usage}

    def opening(self, n_choices: int) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece."""
        yield from ()

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece as chunks."""
        yield self._chunk({"text": piece.text}, piece.index, piece.finish_reason)

    def closing(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the token counts."""
        return self._envelope(self.chunk_object, []) | {"usage": usage}

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _chunk(self, content: dict[str, Any], index: int, reason: str | None) -> dict[str, Any]:
        return self._envelope(self.chunk_object, [content | _about(index, reason)])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class ChatAnswer(Answer):
    """One answer of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, n_choices: int) -> Iterator[dict[str, Any]]:
        for index in range(n_choices):
            yield self._chunk({"delta": {"role": "assistant", "content": ""}}, index, None)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.text:
            yield self._chunk({"delta": {"content": piece.text}}, piece.index, None)
        if piece.finish_reason:
            yield self._chunk({"delta": {}}, piece.index, piece.finish_reason)

    def _whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _about(index: int, reason: str | None) -> dict[str, Any]:
    return {"index": index, "logprobs": None, "finish_reason": reason}
