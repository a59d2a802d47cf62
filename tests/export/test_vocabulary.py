"""Which tokenizers a GGUF file can hold, and what it then says of them."""

import pytest

from rap_env.errors import ExportRefused
from rap_env.export.vocabulary import vocabulary_of
from rap_env.llm.loading import build_tiny_llm
from tests.export.cases import merging

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = BYTES | {"use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STEPS = {
    "gpt-2": (BYTES, False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], False),
    "llama-bpe": (
        [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, PLAIN],
        True,
    ),
    "qwen2": (
        [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA3.replace("{1,3}", "")},
                "behavior": "Isolated",
                "invert": False,
            },
            PLAIN,
        ],
        False,
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_llm().tokenizer


def sequence(steps) -> dict:
    return steps if isinstance(steps, dict) else {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize("name", STEPS)
def test_llama_cpps_name_follows_from_the_steps(tokenizer, name):
    steps, ignore_merges = STEPS[name]
    changed = merging(tokenizer, pre_tokenizer=sequence(steps), model={"ignore_merges": ignore_merges})
    assert vocabulary_of(changed, 258).pre_tokenizer == name


def test_tokens_merges_and_special_tokens_are_as_in_the_tokenizer(tokenizer):
    vocabulary = vocabulary_of(merging(tokenizer), 260)
    assert vocabulary.tokens[:257] == [tokenizer.convert_ids_to_tokens(row) for row in range(257)]
    assert vocabulary.tokens[257:] == ["th", "[PAD258]", "[PAD259]"] and vocabulary.merges == ["t h"]
    assert vocabulary.types[255:] == [1, 3, 1, 5, 5]  # normal, control, normal, unused
    assert vocabulary.special == {"bos": 256, "eos": 256, "padding": 256} and not vocabulary.adds_bos


REFUSED = {
    "another model": ({"model": {"byte_fallback": True}}, "byte-level BPE.*; got BPE with byte fallback"),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, "changes no text; got the normalizer .*Lowercase"),
    "other steps": ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "splits text like gpt-2, smollm, llama-bpe"),
    "merges last": ({"model": {"ignore_merges": True}}, "splits text like gpt-2, smollm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_tokenizers_are_refused(tokenizer, case):
    changes, message = REFUSED[case]
    with pytest.raises(ExportRefused, match=message):
        vocabulary_of(merging(tokenizer, **changes), 258)


def test_tokenizers_without_merges_or_of_another_library_are_refused(tokenizer):
    with pytest.raises(ExportRefused, match="expected a tokenizer with merges"):
        vocabulary_of(tokenizer, 257)
    with pytest.raises(ExportRefused, match="expected a tokenizer of the tokenizers library"):
        vocabulary_of(object(), 257)
