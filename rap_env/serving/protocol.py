"""What may be asked by OpenAI's protocols, field by field, and how it is refused."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rap_env.errors import RapError

_MOST_STOPS = 4
_OFF: tuple[Any, ...] = (None, False, [], {})

# Fields that would change what comes out and are not there -> the values with which they change nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": _OFF,
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": _OFF,
    "logit_bias": _OFF,
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "ignore_eos": _OFF,
    "tools": _OFF,
    "tool_choice": (None, "none", "auto"),
    "functions": _OFF,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": _OFF,
    "web_search_options": (None,),
}


class ApiError(RapError):
    """What is answered instead, in OpenAI's format.

    Args:
        status: Of HTTP.
        message: What was expected, and what came.
        param: The field that it is about.
        code: For programs.
        retry_seconds: After which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_seconds = retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool = False


class Body(_Strict):
    """The fields that both protocols share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class CompletionBody(Body):
    """A body of `/v1/completions`."""

    prompt: Any


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None


class ChatBody(Body):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]


BodyKind = TypeVar("BodyKind", bound=Body)


def checked(kind: type[BodyKind], raw: bytes) -> BodyKind:
    """A body, once all of its fields are known to be what can be answered.

    Raises:
        ApiError: It is not valid, or asks for what is not there.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"expected a JSON object: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"expected a JSON object; got {short(values)}", code="invalid_json")
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f"; got {short(first['input'])}"
        raise ApiError(400, f"{param}: {first['msg']}{got}", param, "invalid_value") from error
    for name, harmless in _UNSUPPORTED.items():
        value = values.get(name)
        if not any(type(value) is type(other) and value == other for other in harmless):
            known = " or ".join(json.dumps(other) for other in harmless if other is not None)
            expected = f"expected {known}" if known else "it is not supported"
            raise ApiError(400, f"{name}: {expected}; got {short(value)}", name, "unsupported_parameter")
    return body


def short(value: Any) -> str:
    text = f"{value:,}" if type(value) is int and abs(value) < 10**18 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _are_tokens(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def prompts_of(body: CompletionBody) -> list[str | tuple[int, ...]]:
    """The prompts of a body, each a text or tokens."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _are_tokens(prompt):
            return [tuple(prompt)]
        if all(isinstance(each, str) for each in prompt):
            return list(prompt)
        if all(_are_tokens(each) for each in prompt):
            return [tuple(each) for each in prompt]
    message = f"prompt: expected a text, texts, tokens, or lists of tokens; got {short(prompt)}"
    raise ApiError(400, message, "prompt", "invalid_value")


def stops_of(value: Any) -> tuple[str, ...]:
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > _MOST_STOPS or not all(isinstance(s, str) and s for s in given):
        message = f"stop: expected up to {_MOST_STOPS} texts that are not empty; got {short(value)}"
        raise ApiError(400, message, "stop", "invalid_value")
    return tuple(given)


def text_of(value: Any, param: str) -> str:
    """A message's text: as it is, or in parts."""
    if isinstance(value, str):
        return value
    try:
        return "".join(_TextPart.model_validate(part).text for part in value)
    except (TypeError, ValidationError) as error:
        message = f"{param}: expected a text, or parts of type text; got {short(value)}"
        raise ApiError(400, message, param, "invalid_value") from error
