"""Text that grows: the same in the end as decoded at once, in whole characters, and cut before a stop string."""

import numpy as np
import pytest

from rap_env.llm.loading import build_tiny_llm
from rap_env.serving.pieces import GrowingText

TOKENIZER = build_tiny_llm().tokenizer


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def grown(tokens: list[int], *stops: str) -> tuple[list[str], bool]:
    """What is shown after each token, and at the end."""
    text = GrowingText(decode, stops)
    return [*(text.push(token) for token in tokens), text.finish()], text.stopped


def tokens_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_a_character_comes_whole_with_its_last_byte():
    shown, stopped = grown(tokens_of("aé€😀b"))
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""] and not stopped


def test_what_is_no_character_in_the_end_is_shown_as_such():
    shown, _stopped = grown(tokens_of("a€")[:-1])
    assert shown == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_text_whatever_the_bytes_are(seed):
    tokens = np.random.default_rng(seed).integers(0, 257, 200).tolist()
    shown, _stopped = grown(tokens)
    assert "".join(shown) == decode(tokens)


def test_a_stop_string_is_not_shown_nor_anything_after_it():
    assert grown(tokens_of("one two three"), "two") == ([*"one ", *[""] * 10], True)
    assert grown(tokens_of("aaab"), "aab") == (["", "", "a", "", ""], True)
    assert grown(tokens_of("x€y"), "€")[0][0] == "x"


def test_what_only_looked_like_a_stop_string_is_shown_once_that_is_clear():
    assert grown(tokens_of("a twig"), " two") == (["a", "", "", "", " twi", "g", ""], False)
    assert grown(tokens_of("a tw"), " two") == (["a", "", "", "", " tw"], False)


def test_the_first_of_several_stop_strings_counts():
    text = GrowingText(lambda tokens: "".join("ab<c>d"[: 6 * len(tokens)]), ["c", "<c>"])
    assert text.push(0) == "ab" and text.stopped and text.push(1) == "" and text.finish() == ""
