"""From bodies to requests: prompts and chats become tokens, and lengths are checked against the model."""

import secrets
import threading
from dataclasses import dataclass

from rap_env.llm.switchable import SwitchableLLM
from rap_env.serving.protocol import (
    ApiError,
    Body,
    BodyKind,
    ChatBody,
    CompletionBody,
    checked,
    prompts_of,
    short,
    stops_of,
    text_of,
)
from rap_env.serving.request import Request

_COMPLETION_TOKENS, _CHAT_TOKENS = 16, 256  # where nothing is said; the first is what OpenAI documents
_LEAST_TEMPERATURE = 1e-4  # below it the most likely token is taken: to divide by less would overflow


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        requests: One for each prompt.
        stops: Strings that end an answer.
        stream: Whether tokens are wanted as they come.
        include_usage: Whether a stream ends with the token counts.
    """

    requests: tuple[Request, ...]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


class Asking:
    """Reads bodies; may be called from several threads.

    Args:
        llm: The model that is asked, with its tokenizer.
        name: What it is called.
    """

    def __init__(self, llm: SwitchableLLM, name: str) -> None:
        self._tokenizer, self._shape, self._name = llm.tokenizer, llm.shape, name
        self._ends = frozenset(_end_tokens(llm))
        self._lock = threading.Lock()  # to encode may set a tokenizer's padding and truncation

    def completion(self, raw: bytes) -> Asked:
        """What a body of `/v1/completions` asks for.

        Raises:
            ApiError: It is not valid, or asks for what is not there.
        """
        body = self._named(checked(CompletionBody, raw))
        prompts = [self._encoded(prompt, True) if isinstance(prompt, str) else prompt for prompt in prompts_of(body)]
        return self._asked(body, prompts, "prompt", _COMPLETION_TOKENS)

    def chat(self, raw: bytes) -> Asked:
        """The same for `/v1/chat/completions`."""
        body = self._named(checked(ChatBody, raw))
        return self._asked(body, [self._encoded(self._templated(body), False)], "messages", _CHAT_TOKENS)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _named(self, body: BodyKind) -> BodyKind:
        if body.model != self._name:
            message = f"the model {short(body.model)} does not exist; this is {self._name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return body

    def _encoded(self, text: str, special: bool) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"expected text in Unicode: {error.reason}", code="invalid_value") from error
        with self._lock:
            return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _templated(self, body: ChatBody) -> str:
        if not self._tokenizer.chat_template:
            message = f"{self._name} has no chat template: ask /v1/completions"
            raise ApiError(400, message, "messages", "no_chat_template")
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": text_of(message.content, f"messages.{number}.content"),
            }
            for number, message in enumerate(body.messages)
        ]
        try:
            with self._lock:
                return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template refuses in its own words, as where roles must alternate
            raise ApiError(400, f"messages: {error}", "messages", "invalid_value") from error

    def _asked(self, body: Body, prompts: list[tuple[int, ...]], param: str, default_tokens: int) -> Asked:
        requests = tuple(self._request(body, tokens, param, default_tokens) for tokens in prompts)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return Asked(requests, stops_of(body.stop), bool(body.stream), include_usage)

    def _request(self, body: Body, tokens: tuple[int, ...], param: str, default_tokens: int) -> Request:
        context, vocabulary = self._shape.context_tokens, self._shape.vocab_size
        if not tokens:
            raise ApiError(400, f"{param}: expected at least one token; got none", param, "invalid_value")
        if not all(0 <= token < vocabulary for token in tokens):
            raise ApiError(400, f"{param}: expected tokens of 0 to {vocabulary - 1}", param, "invalid_value")
        wanted = body.max_completion_tokens or body.max_tokens
        n_tokens = max(1, min(default_tokens, context - len(tokens))) if wanted is None else wanted
        if len(tokens) + n_tokens > context:
            message = (
                f"this model's context has {context:,} tokens, prompt and answer together; got {len(tokens):,}"
                f" and {short(n_tokens)}"
            )
            raise ApiError(400, message, param if wanted is None else "max_tokens", "context_length_exceeded")
        temperature = 1.0 if body.temperature is None else body.temperature
        return Request(
            tokens,
            n_tokens,
            self._ends,
            temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
        )


def _end_tokens(llm: SwitchableLLM) -> set[int]:
    """Tokens with which an answer ends: that of the tokenizer, and those of the model."""
    configured = llm.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return {token for token in (llm.tokenizer.eos_token_id, *several) if token is not None}
