"""Memory that goes while the endpoint answers, clients that go, and what is counted meanwhile."""

import asyncio
import logging
import socket

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rap_env.serving import asking
from tests.serving.endpoint_cases import PLENTY, lines_of, served, until


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "_end_tokens", lambda llm: ())  # a pruned random model may draw one at any time
    with served(tmp_path) as running:
        yield running


def counted(server) -> dict[str, float]:
    """All samples of `/metrics`, buckets left out."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        ",".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def small(server, other_bytes: int = 0) -> float:
    """A budget for three quarters of the weights."""
    return 0.75 * server.llm.shape.weight_bytes + other_bytes


def test_an_answer_goes_on_while_memory_falls(server):
    body = {"model": server.model, "prompt": "Hello there", "max_tokens": 600, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = lines_of(response)
        next(lines)
        assert all(server.engine.mask.keep) and counted(server)["rap_switches_total"] == 0
        server.budget.n_bytes = small(server, 400_000)  # what reading takes, and the cache of 611 tokens
        until(lambda: counted(server)["rap_switches_total"] == 1)
        numbers = counted(server)
        assert not all(server.llm.store.resident.keep)
        rest = list(lines)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert numbers["rap_kept_weights_ratio"] < 1.0 and numbers["rap_needed_bytes"] < numbers["rap_budget_bytes"]
    assert numbers["rap_switch_seconds_count"] == 1 and numbers["rap_running"] == 1
    assert counted(server)["rap_generated_tokens_total"] == 600


def test_the_model_shrinks_and_grows_while_nobody_asks(server):
    until(lambda: server.service.step is not None)
    dense_bytes = server.llm.store.resident.weight_bytes
    server.budget.n_bytes = small(server)
    until(lambda: server.llm.store.resident.weight_bytes < dense_bytes)
    server.budget.n_bytes = PLENTY
    until(lambda: server.llm.store.resident.weight_bytes == dense_bytes)


def test_without_memory_a_call_is_refused_with_the_bytes_that_would_do(server):
    server.budget.n_bytes = 0
    with pytest.raises(openai.InternalServerError) as caught:
        server.client.completions.create(model=server.model, prompt="Hello", max_tokens=5)
    assert caught.value.status_code == 503 and caught.value.code == "insufficient_memory"
    assert int(caught.value.response.headers["retry-after"]) > 0
    needed = int(caught.value.message.rpartition("at least ")[2].partition(" bytes")[0].replace(",", ""))
    stream = {"model": server.model, "prompt": "Hello", "max_tokens": 5, "stream": True}
    assert server.post(stream).status_code == 503
    server.budget.n_bytes = needed - 1
    assert server.post(stream).status_code == 503
    server.budget.n_bytes = needed
    assert server.ask("Hello", 5).choices[0].finish_reason in ("stop", "length")


def test_a_stream_that_loses_all_memory_says_so_and_ends(server):
    body = {"model": server.model, "prompt": "Hello there", "max_tokens": 8000, "temperature": 0, "stream": True}
    with server.client.completions.create(**body) as stream:
        next(stream)
        server.budget.n_bytes = 0
        with pytest.raises(openai.APIError, match="not enough memory: at least"):
            list(stream)
    until(lambda: server.service.n_open == 0)
    assert counted(server)["rap_evictions_total"] == 1 and counted(server)["rap_requests_total,503"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_sequence(server, stream):
    body = {"model": server.model, "prompt": "Hello there", "max_tokens": 8000, "temperature": 0, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = lines_of(response)  # held: a collected iterator closes the connection at once
            next(lines)
            assert server.service.n_open == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    until(lambda: server.service.n_open == 0 and server.engine.idle)
    until(lambda: counted(server).get("rap_requests_total,499") == 1)
    assert counted(server)["rap_generated_tokens_total"] < 8000


def test_who_hangs_up_in_the_middle_of_a_call_is_no_failure_of_the_server(server, caplog):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\n{")
    until(lambda: counted(server).get("rap_requests_total,499") == 1)
    assert caplog.records == []


def test_calls_and_tokens_are_counted(server):
    answers = [server.ask(prompt, 7, stop="never there") for prompt in ("Hello", "Hi", ["a", "b"])]
    server.post({"model": "another", "prompt": "a"})
    until(lambda: server.engine.idle)
    numbers = counted(server)
    assert numbers["rap_requests_total,200"] == 3 and numbers["rap_requests_total,404"] == 1
    assert numbers["rap_prompt_tokens_total"] == sum(answer.usage.prompt_tokens for answer in answers) == 9
    assert numbers["rap_generated_tokens_total"] == sum(answer.usage.completion_tokens for answer in answers) == 28
    assert numbers["rap_time_to_first_token_seconds_count"] == numbers["rap_time_per_output_token_seconds_count"] == 4
    assert numbers["rap_running"] == numbers["rap_waiting"] == 0 and numbers["rap_kept_weights_ratio"] == 1.0
    assert numbers["rap_budget_bytes"] == PLENTY and numbers["rap_decide_seconds_count"] > 0
    assert numbers["rap_needed_bytes"] == server.llm.shape.weight_bytes
    assert numbers["rap_read_seconds_count"] >= 14


def test_fifty_streams_at_once_all_end(server):
    body = {"model": server.model, "prompt": "Hello there", "max_tokens": 8, "temperature": 0, "stream": True}

    async def ask(client: httpx.AsyncClient) -> str:
        response = await client.post("/v1/completions", json=body)
        assert response.text.endswith("data: [DONE]\n\n")
        return "".join(line["choices"][0]["text"] for line in lines_of(response))

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client:
            return await asyncio.gather(*(ask(client) for _ in range(50)))

    assert len(set(asyncio.run(ask_all()))) == 1


def test_steps_that_fail_are_told_by_health_logged_once_and_survived(server, monkeypatch, caplog):
    until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "ok")
    monkeypatch.setattr("rap_env.serving.service._GIVE_UP_SECONDS", 0.3)

    def broken(*_arguments):
        raise ValueError("out of order")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        patched.setattr(server.engine._controller, "decide", broken)
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health").json()["status"] == "failing"
        response = server.post({"model": server.model, "prompt": "Hello", "max_tokens": 3})
        assert response.status_code == 500 and "ValueError: out of order" in response.json()["error"]["message"]
        assert [record.message for record in caplog.records] == ["a step failed"]
    until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert server.ask("Hello", 3).usage.completion_tokens == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_dead_is_told_by_health_and_keeps_nobody_waiting(server, monkeypatch):
    def ended():
        raise SystemExit

    body = {"model": server.model, "prompt": "Hello there", "max_tokens": 8000, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = lines_of(response)
        next(lines)
        monkeypatch.setattr(server.engine, "step", ended)
        assert "the engine has ended" in list(lines)[-1]["error"]["message"]
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503 and health.json()["status"] == "dead"
    assert server.post(body).json()["error"]["code"] == "not_running"
