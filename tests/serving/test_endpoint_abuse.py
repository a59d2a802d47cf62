"""Whatever is sent is answered with what is wrong about it or is hung up on, and the next call is served."""

import asyncio
import contextlib
import json
import random
import socket
import time

import httpx
import pytest

from tests.hardening.mutations import mutations_of
from tests.serving.endpoint_cases import Served, greedy, served, until

BODY_SECONDS = 0.4
PROMPT = [5, 77, 130, 9]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("weights"), max_waiting=32) as running:
        yield running


@pytest.fixture(scope="module")
def text(server) -> str:
    return server.llm.tokenizer.decode(greedy(server.llm, PROMPT, 6), skip_special_tokens=True)


@pytest.fixture(autouse=True)
def the_next_call_is_served(server, text):
    yield
    until(lambda: server.service.n_open == 0)
    assert server.ask(PROMPT, 6).choices[0].text == text


def body(server: Served, **fields) -> dict:
    return {"model": server.model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0} | fields


def connected(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    connection.settimeout(5)
    return connection


def said_to(server: Served, raw: bytes) -> bytes:
    """What a server answers to raw bytes until it hangs up, or has answered."""
    answer = b""
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(raw)
        with contextlib.suppress(OSError):  # it may have hung up already
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            answer += piece
    return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW = {
    "nothing": b"",
    "noise": bytes(range(256)) * 4,
    "no such version": b"GET /health HTTP/x\r\n\r\n",
    "no line end": b"GET /health",
    "a header without end": HEAD + b"X: " + b"a" * 200_000,
    "many headers": HEAD + b"X: a\r\n" * 20_000 + b"\r\n",
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n{}",
    "a length that is no number": HEAD + b"Content-Length: ten\r\n\r\n{}",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
    "a length and pieces": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "pieces of no length": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a body that is cut off": HEAD + b'Content-Length: 500\r\n\r\n{"model":',
    "a secure connection": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "a path out of the server": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a path that is no text": b"GET /%00%ff%fe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("kind", RAW)
def test_what_is_no_call_is_refused_or_hung_up_on(server, kind):
    answer = said_to(server, RAW[kind])
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:100]
    assert b"Traceback" not in answer


def test_bodies_that_are_damaged_are_refused_with_what_is_wrong(server, tmp_path):
    valid, statuses = json.dumps(body(server, stop=["x"], stream=False, seed=3, top_p=1.0)).encode(), set()
    with httpx.Client(base_url=server.url, headers={"content-type": "application/json"}) as client:
        for case in range(60):
            rng = random.Random(case)
            mutate = rng.choice([each for _name, each in sorted(mutations_of("body.json").items())])
            content = mutate(valid, rng, tmp_path / "trap")[:60_000]
            response = client.post("/v1/completions", content=content)
            assert response.status_code == 200 or 400 <= response.status_code < 500, (case, response.text)
            assert response.status_code == 200 or response.json()["error"]["message"], case
            statuses.add(response.status_code)
    assert {200, 400} <= statuses and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_of_any_size_is_read_no_further_than_its_limit(server, with_length):
    pieces = [b"x" * 4096] * 200
    content = b"".join(pieces) if with_length else iter(pieces)
    try:
        response = httpx.post(
            f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
    except httpx.TransportError:
        return  # it hung up before all was sent
    assert response.status_code == 413 and "at most 4,096 bytes" in response.json()["error"]["message"]


def test_who_sends_slowly_is_told_and_holds_up_nobody(tmp_path, text):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(tmp_path, body_seconds=BODY_SECONDS))
        slow = [stack.enter_context(connected(server)) for _ in range(40)]
        for connection in slow[:20]:
            connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")  # and no more
        for connection in slow[20:]:
            connection.sendall(b"POST /v1/comp")
        started = time.monotonic()
        assert server.ask(PROMPT, 6).choices[0].text == text
        assert time.monotonic() - started < 5.0
        for connection in slow[:20]:
            answer = b""
            while b"}}" not in answer:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408") and b"within 0.4 seconds" in answer


def test_two_hundred_connections_at_once_are_each_answered_or_told_to_wait(server, text):
    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            url = f"{server.url}/v1/completions"
            return await asyncio.gather(*(client.post(url, json=body(server)) for _ in range(200)))

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} <= {200, 429}
    served_ones = [answer for answer in answers if answer.status_code == 200]
    assert len(served_ones) >= 32 and {answer.json()["choices"][0]["text"] for answer in served_ones} == {text}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_connections_that_break_in_the_middle_of_a_stream_free_their_sequences(server):
    asked = json.dumps(body(server, max_tokens=4000, stream=True)).encode()
    for _ in range(4):
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                connection = stack.enter_context(connected(server))
                connection.sendall(HEAD + f"Content-Length: {len(asked)}\r\n\r\n".encode() + asked)
                assert connection.recv(30)
        until(lambda: server.service.n_open == 0)
