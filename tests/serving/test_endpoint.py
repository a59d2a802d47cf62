"""The endpoint answers the real `openai` client with what the model generates, whole and in streams."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.endpoint_cases import greedy, lines_of, random_llm, served

PROMPTS = ["Hello there", "a", "Where is it?", "xyz", "The cat", "one two", "b", "é"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("weights")) as running:
        yield running


@pytest.fixture(scope="module")
def expected():
    """The most likely answer to a prompt, from whole forwards of an equal model."""
    llm = random_llm()

    def answer(prompt: str, n_tokens: int) -> str:
        return llm.tokenizer.decode(greedy(llm, llm.tokenizer(prompt)["input_ids"], n_tokens))

    return answer


def test_a_completion_is_what_the_model_generates(server, expected):
    completion = server.ask("Hello there", 40)
    assert completion.choices[0].text == expected("Hello there", 40)
    assert completion.choices[0].finish_reason == "length"
    assert completion.model == server.model and completion.object == "text_completion"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 40, 51)


def test_prompts_may_be_texts_or_tokens_one_or_several(server, expected):
    tokens = [server.llm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    texts = [expected(prompt, 12) for prompt in PROMPTS[:3]]
    for prompts in (PROMPTS[:3], tokens):
        completion = server.ask(prompts)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        assert [choice.text for choice in completion.choices] == texts
        assert completion.usage.prompt_tokens == sum(map(len, tokens)) and completion.usage.completion_tokens == 36
    assert server.ask(tokens[0]).choices[0].text == texts[0]


def test_a_chat_goes_through_the_template(server, expected):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]},
    ]
    chat = server.client.chat.completions.create(
        model=server.model, messages=messages, max_completion_tokens=20, temperature=0
    )
    stream = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=20, temperature=0, stream=True
    )
    chunks = list(stream)
    assert chat.choices[0].message.content == expected("s:Be brief.\nu:Who is it?\na:", 20)
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_says_the_same_in_pieces_that_never_are_half_a_character(server, expected, prompt):
    body = {"model": server.model, "prompt": prompt, "max_tokens": 60, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(lines_of(response))
    texts = [line["choices"][0]["text"] for line in lines]
    assert "".join(texts) == expected(prompt, 60) and len(texts) > 10
    assert lines[-1]["choices"][0]["finish_reason"] == "length"
    assert len({line["id"] for line in lines}) == 1


def test_a_stream_ends_with_its_counts_where_they_are_asked_for_and_then_with_done(server):
    body = {"model": server.model, "prompt": ["ab", "c"], "max_tokens": 5, "stream": True, "seed": 1}
    response = server.post(body | {"stream_options": {"include_usage": True}})
    assert response.text.endswith("data: [DONE]\n\n")
    *pieces, last = lines_of(response)
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert {piece["choices"][0]["index"] for piece in pieces} == {0, 1}


def test_a_stop_string_ends_the_answer_before_it(server, expected):
    whole = expected("Hello there", 40)
    stop = whole[8:11]
    assert whole.index(stop) == 8
    for stops in (stop, ["never there", stop], [stop, whole[9:30]]):
        choice = server.ask("Hello there", 40, stop=stops).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[:8], "stop")
        stream = server.client.completions.create(
            model=server.model, prompt="Hello there", max_tokens=40, temperature=0, stop=stops, stream=True
        )
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == whole[:8] and chunks[-1].finish_reason == "stop"
    assert server.ask("Hello there", 40, stop=whole[-4:] + "more").choices[0].text == whole


def test_draws_follow_the_seed(server):
    def drawn(**fields) -> str:
        body = {"model": server.model, "prompt": "Hello", "max_tokens": 30} | fields
        return server.post(body).json()["choices"][0]["text"]

    assert drawn(seed=5) == drawn(seed=5) != drawn(seed=6)
    assert drawn() != drawn()
    assert drawn(top_p=1e-9) == drawn(temperature=0) == drawn(temperature=1e-300)


def test_many_at_once_get_each_their_own_answer(server, expected):
    asked = [PROMPTS[number % len(PROMPTS)] + "!" * (number // len(PROMPTS)) for number in range(50)]
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda prompt: server.ask(prompt, 10).choices[0].text, asked))
    assert answers == [expected(prompt, 10) for prompt in asked]


def test_the_model_is_listed(server):
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_fields_that_change_nothing_are_ignored(server):
    fields = {"n": 1, "best_of": 1, "logprobs": None, "echo": False, "presence_penalty": 0, "user": "me", "odd": [1]}
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 3}
    assert server.post(body | fields).status_code == 200
