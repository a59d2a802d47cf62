"""What can't be answered is refused in OpenAI's format, and says why."""

import openai
import pytest

from tests.serving.endpoint_cases import served

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("weights"), max_waiting=8) as running:
        yield running


def refused(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and "Traceback" not in response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": ["a", 1]}, "prompt", "expected a text"),
        ({"prompt": [True]}, "prompt", "expected a text"),
        ({"prompt": [999]}, "prompt", "tokens of 0 to 256"),
        ({"prompt": [-1]}, "prompt", "tokens of 0 to 256"),
        ({"prompt": {"a": 1}}, "prompt", "expected a text"),
        ({"prompt": "\ud800"}, None, "Unicode"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1; got 0"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "got -1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ""}, "stop", "not empty"),
        ({"stop": list("abcde")}, "stop", "up to 4"),
        ({"stop": {"a": 1}}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"n": 2}, "n", "expected 1; got 2"),
        ({"n": True}, "n", "expected 1; got True"),
        ({"best_of": 3}, "best_of", "expected 1; got 3"),
        ({"logprobs": 0}, "logprobs", "got 0"),
        ({"echo": True}, "echo", "got True"),
        ({"suffix": "x"}, "suffix", "got 'x'"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "got {'5': 1}"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "got 0.5"),
        ({"top_k": 5}, "top_k", "got 5"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, fields, param, words):
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 3} | fields
    error = refused(server.post(body), 400)
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_chat_that_is_wrong_is_refused_too(server, fields, param):
    body = {"model": server.model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3} | fields
    assert refused(server.post(body, CHAT), 400)["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 4000, b'{"model": "a"}'])
def test_a_body_that_is_no_call_is_refused(server, body):
    for path in ("/v1/completions", CHAT):
        refused(server.post(body, path), 400)


def test_what_is_longer_than_the_context_is_refused_with_the_numbers(server):
    body = {"model": server.model, "prompt": [5, 6], "max_tokens": 8191}
    error = refused(server.post(body), 400)
    assert error["code"] == "context_length_exceeded" and "8,192 tokens" in error["message"]
    assert refused(server.post(body | {"max_tokens": 10**30}), 400)["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(model=server.model, prompt="a" * 100, max_tokens=8100)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"


def test_a_body_over_the_limit_another_type_and_other_addresses_are_refused(server):
    body = {"model": server.model, "prompt": "a" * 5000}
    assert "at most 4,096 bytes" in refused(server.post(body), 413)["message"]
    assert refused(server.post({}, **{"content-type": "text/plain"}), 415)["code"] == "invalid_type"
    assert refused(server.post({}, "/v1/embeddings"), 404)["code"] == "unknown_url"
    assert refused(server.post({}, "/health"), 405)["code"] == "unknown_url"


def test_another_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError, match=f"this is '{server.model}'") as caught:
        server.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"


def test_more_than_may_wait_are_refused_all_together(server):
    response = server.post({"model": server.model, "prompt": ["a"] * 9, "max_tokens": 3})
    error = refused(response, 429)
    assert "at most 8 waiting requests; got 9" in error["message"] and response.headers["retry-after"] == "1"
    assert server.service.n_open == 0


def test_a_model_without_a_chat_template_says_so(server, monkeypatch):
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", None)
    body = {"model": server.model, "messages": [{"role": "user", "content": "a"}]}
    assert refused(server.post(body, CHAT), 400)["code"] == "no_chat_template"


def test_what_fails_inside_is_said_without_its_traceback(server, monkeypatch):
    def broken(_readings):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patched:
        patched.setattr(server.engine._model, "read", broken)
        body = {"model": server.model, "prompt": "Hello", "max_tokens": 3}
        assert "no such kernel" in refused(server.post(body), 500)["message"]
        assert refused(server.post(body | {"stream": True}), 500)["type"] == "server_error"
    assert server.post(body).status_code == 200
