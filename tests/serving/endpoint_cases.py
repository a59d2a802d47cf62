"""A tiny model behind a real server on a free port, and what it has to answer."""

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import torch
import uvicorn

from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.policies import OrderPolicy, even_order
from rap_env.serving import Engine, Limits, Options, Service
from rap_env.serving.assembly import assemble
from rap_env.serving.endpoint import create_app
from rap_env.serving.metrics import Metrics

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
PLENTY = 2**40


class Budget:
    """Bytes that a test sets."""

    n_bytes: float = PLENTY

    def __call__(self) -> float:
        return self.n_bytes


@dataclass
class Served:
    """A server that runs."""

    url: str
    llm: SwitchableLLM
    service: Service
    metrics: Metrics
    budget: Budget

    @property
    def model(self) -> str:
        return self.llm.name

    @property
    def engine(self) -> Engine:
        return self.service._engine

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, body: object, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        """A call as it comes from anybody, valid or not."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content, headers={"content-type": "application/json"} | headers)

    def ask(self, prompt, n_tokens: int = 12, **fields):
        """A completion by the most likely tokens."""
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=n_tokens, temperature=0, **fields
        )


def random_llm() -> SwitchableLLM:
    """The model that is served; the same each time."""
    llm = build_tiny_llm(seed=3)
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@contextlib.contextmanager
def served(
    folder: Path,
    max_body_bytes: int = 4096,
    max_waiting: int = 64,
    patience_seconds: float = 0.2,
    body_seconds: float = 60.0,
):
    """A server, until the block ends."""
    llm, budget = random_llm(), Budget()
    WeightStore(llm, folder)
    options = Options(max_batch=8, read_tokens=64, patience_seconds=patience_seconds)
    deciders = {"even": OrderPolicy(llm.shape, even_order(llm.shape))}
    service, metrics = assemble(llm, deciders, budget, options, Limits(window_seconds=0.2), max_waiting)
    app = create_app(service, llm, metrics, max_body_bytes, body_seconds)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        until(lambda: server.started)
        try:
            running = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", llm, service, metrics, budget)
            yield running
            running.client.close()
        finally:
            server.should_exit = True
            thread.join(20)
    assert not service.alive and service.n_open == 0


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def greedy(llm: SwitchableLLM, tokens: Sequence[int], n_tokens: int) -> list[int]:
    """The most likely tokens after a prompt, each from a whole forward."""
    tokens, end = list(tokens), len(tokens) + n_tokens
    with torch.inference_mode():
        while len(tokens) < end:
            token = int(llm.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == llm.tokenizer.eos_token_id:
                break
            tokens.append(token)
    return tokens[end - n_tokens :]


def lines_of(response: httpx.Response) -> Iterator[dict]:
    """What the events of a stream hold."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
