"""The tokenizer's digest changes with what becomes of a text, and with nothing else."""

import json
import subprocess
import sys

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, CTRLTokenizer

from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.tokenizer import tokenizer_digest


@pytest.fixture
def tokenizer():
    return build_tiny_llm(n_layers=1).tokenizer


def add_bos(tokenizer) -> None:
    template = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    tokenizer.backend_tokenizer.post_processor = template


def slow_tokenizer(folder, merges: str = "a b</w> 1\n", **options) -> CTRLTokenizer:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a@@": 0, "b": 1, "ab": 2, "<unk>": 3}))
    (folder / "merges.txt").write_text("#version\n" + merges)
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **options)


def test_a_post_processor_that_adds_bos_changes_the_digest(tokenizer):
    before, ids = tokenizer_digest(tokenizer), tokenizer("ab").input_ids
    add_bos(tokenizer)
    assert tokenizer("ab").input_ids == [256, *ids]
    assert tokenizer_digest(tokenizer) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["ab"]),
        lambda tokenizer: setattr(tokenizer, "bos_token", "a"),
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 64),
    ],
    ids=["vocabulary", "bos token", "chat template", "longest input"],
)
def test_each_thing_that_changes_token_ids_changes_the_digest(tokenizer, change):
    before = tokenizer_digest(tokenizer)
    change(tokenizer)
    assert tokenizer_digest(tokenizer) != before


def test_calls_that_pad_or_truncate_leave_the_digest(tokenizer):
    before, state = tokenizer_digest(tokenizer), tokenizer.backend_tokenizer.to_str()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() != state
    assert tokenizer_digest(tokenizer) == before


def test_a_pad_token_that_a_library_sets_leaves_the_digest(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token = "a"
    tokenizer.padding_side = "left"
    assert tokenizer_digest(tokenizer) == before


def test_a_second_process_that_loads_from_another_folder_has_the_same_digest(tokenizer, tmp_path):
    add_bos(tokenizer)
    tokenizer(["a", "bcd"], padding=True)  # the folder's file keeps this state
    tokenizer.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; from transformers import AutoTokenizer; from rap_env.llm.tokenizer import tokenizer_digest;"
        "print(tokenizer_digest(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved")], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == tokenizer_digest(tokenizer)


def test_a_slow_tokenizer_without_files_keeps_its_digest_when_saved_and_loaded(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(ByT5Tokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(ByT5Tokenizer(extra_ids=3)) != tokenizer_digest(tokenizer)


def test_a_slow_tokenizers_digest_follows_its_files_and_not_their_folder(tmp_path):
    first = tokenizer_digest(slow_tokenizer(tmp_path / "first"))
    assert tokenizer_digest(slow_tokenizer(tmp_path / "copy")) == first
    assert tokenizer_digest(slow_tokenizer(tmp_path / "merges", merges="b a 1\n")) != first


@pytest.mark.llm
def test_the_embedded_models_tokenizer_has_one_digest_however_it_is_named(embedded_folder, monkeypatch):
    by_path = tokenizer_digest(AutoTokenizer.from_pretrained(embedded_folder))
    monkeypatch.chdir(embedded_folder)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(".")) == by_path
