"""Prompts: what is shared, where long documents are cut, and templates that can't be used."""

import pytest

from rap_env.errors import RankingFailed
from rap_env.rerank.prompts import QWEN3, Prompts, Template
from tests.rerank.cases import DOCUMENTS, QUERY

SHORT = Template("Q: {query}\nD: {document}!", yes="yes", no="no")


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    return tiny_llm.tokenizer


def prompts(tokenizer, template: Template = SHORT, most: int = 512, context: int = 8192) -> Prompts:
    return Prompts(tokenizer, template, most, context)


def text_of(tokenizer, prompt, index: int) -> str:
    return tokenizer.decode([*prompt.prefix, *prompt.endings[index]])


def test_a_prompt_is_the_template_with_query_and_document_in_it(tokenizer):
    prompt = prompts(tokenizer).of("why?", ["because", ""])
    assert text_of(tokenizer, prompt, 0) == "Q: why?\nD: because!"
    assert text_of(tokenizer, prompt, 1) == "Q: why?\nD: !"
    assert tokenizer.decode(prompt.prefix) == "Q: why?\nD:"  # the space goes with the document: tokens are " word"


def test_the_published_form_asks_for_yes_or_no(tokenizer):
    text = text_of(tokenizer, prompts(tokenizer, QWEN3).of("q", ["d"]), 0)
    assert "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n" in text
    assert "<Query>: q\n<Document>: d<|im_end|>\n<|im_start|>assistant\n" in text and "{" not in text


def test_braces_in_query_and_document_are_text(tokenizer):
    prompt = prompts(tokenizer).of("{document}", ["{query} {0}"])
    assert text_of(tokenizer, prompt, 0) == "Q: {document}\nD: {query} {0}!"


def test_a_long_document_is_cut_behind_its_first_tokens_and_nothing_else_is(tokenizer):
    prompt = prompts(tokenizer, most=4).of("why?", ["abcdef", "ab"])
    assert text_of(tokenizer, prompt, 0) == "Q: why?\nD: abc!"  # a byte a token, the space too
    assert text_of(tokenizer, prompt, 1) == "Q: why?\nD: ab!"


def test_a_document_is_cut_where_the_context_ends(tokenizer):
    prompt = prompts(tokenizer, context=13).of("why?", ["abcdef"])
    assert text_of(tokenizer, prompt, 0) == "Q: why?\nD: a!"
    with pytest.raises(RankingFailed, match="query and template have 11 tokens, the model takes 11: there is no room"):
        prompts(tokenizer, context=11).of("why?", ["abcdef"])


def test_spaces_and_line_breaks_of_documents_stay(tokenizer):
    prompt = prompts(tokenizer).of(QUERY, DOCUMENTS)
    for index, document in enumerate(DOCUMENTS[:2] + DOCUMENTS[3:6]):
        index += index > 1  # without the long one
        assert text_of(tokenizer, prompt, index) == f"Q: {QUERY}\nD: {document}!"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{query} only", "one {document}"),
        ("a {query} {document} {document} b", "one {document}"),
        ("a {query} {document!r} b", "one {document}"),
        ("a {query} {document} {title} b", r"got \['query', 'document', 'title'\]"),
        ("{document} {query}", "at one end"),
        ("{query} {document}", "at one end"),
        ("a {query {document} b", "no format string|one {document}"),
    ],
)
def test_templates_without_a_place_for_all_parts_are_refused(text, problem):
    with pytest.raises(RankingFailed, match=problem):
        Template(text)


def test_answers_have_to_begin_with_different_tokens(tokenizer):
    assert prompts(tokenizer).yes == tokenizer("y").input_ids[0]
    for yes, no in (("yes", "yet"), ("yes", "")):
        with pytest.raises(RankingFailed, match="two words with different first tokens"):
            prompts(tokenizer, Template(SHORT.text, yes=yes, no=no))


def test_documents_need_room(tokenizer):
    with pytest.raises(RankingFailed, match="at least 1 token of a document; got 0"):
        prompts(tokenizer, most=0)
