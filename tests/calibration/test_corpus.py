import copy
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rap_env.calibration import Corpus, hub_corpus, local_corpus, random_windows, self_generated_corpus
from rap_env.errors import CorpusUnavailable
from rap_env.rng import isolated_rng

WORDS = [f"w{number}" for number in range(30)]
ROWS_BEYOND_TOKENIZER = 3


def make_llm(with_bos: bool = True) -> SimpleNamespace:
    """Two random layers over 30 words, the special tokens, and 3 embedding rows that no word uses."""
    special = ["<unk>", "</s>", "<s>"] if with_bos else ["<unk>", "</s>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = {"bos_token": "<s>"} if with_bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **bos)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + ROWS_BEYOND_TOKENIZER,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=2 if with_bos else None,
        eos_token_id=1,
    )
    with isolated_rng(0):
        model = LlamaForCausalLM(config).eval()
    return SimpleNamespace(model=model, tokenizer=tokenizer, device=torch.device("cpu"), digest="tiny")


@pytest.fixture
def llm():
    return make_llm()


def fake_hub(monkeypatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_the_digest_depends_on_the_documents_and_their_borders_but_not_on_the_name():
    corpus = Corpus("a", ("one two", "three"))
    assert corpus.digest == Corpus("b", ("one two", "three")).digest
    assert corpus.digest != Corpus("a", ("one", " twothree")).digest
    assert corpus.digest != Corpus("a", ("three", "one two")).digest


@pytest.mark.parametrize("documents", [(), ("", " \n")])
def test_a_corpus_without_text_is_refused(documents):
    with pytest.raises(CorpusUnavailable, match="'nothing' holds no text"):
        Corpus("nothing", documents)


def test_a_plain_file_is_one_document_and_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("no text file")
    assert local_corpus(tmp_path).documents == ("first", "second\n\nstill second")
    assert local_corpus([tmp_path / "b.txt", str(tmp_path / "a.txt")]).documents == ("second\n\nstill second", "first")


def test_wikitext_is_split_in_front_of_article_headings_only(tmp_path):
    first = " = Homarus gammarus = \n \n Lobster . \n \n = = Description = = \n \n Large ; a = b = c . \n \n"
    second = " = M @-@ 82 ( Michigan highway ) = \n \n Road . \n"
    (tmp_path / "wiki.txt").write_text(" \n" + first + second)
    assert local_corpus(tmp_path / "wiki.txt").documents == (first, second)


def test_local_errors_name_the_path(tmp_path):
    with pytest.raises(CorpusUnavailable, match=r"missing\.txt: .*No such file"):
        local_corpus(tmp_path / "missing.txt")
    with pytest.raises(CorpusUnavailable, match=r"folder .* has no \.txt file"):
        local_corpus([tmp_path])
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CorpusUnavailable, match=r"empty\.txt is empty"):
        local_corpus(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorpusUnavailable, match=r"can't read .*binary\.txt"):
        local_corpus(tmp_path / "binary.txt")


def test_the_hub_is_streamed_and_read_only_as_far_as_the_limit(monkeypatch):
    taken = []

    def load_dataset(dataset, config, split, streaming):
        assert (dataset, config, split, streaming) == ("allenai/c4", "en", "validation", True)
        for text in ("one", " ", "two", "three", "four"):
            taken.append(text)
            yield {"text": text, "url": "-"}

    fake_hub(monkeypatch, load_dataset)
    assert hub_corpus("allenai/c4", "en", split="validation", limit=2).documents == ("one", "two")
    assert taken == ["one", " ", "two"]


def test_an_unknown_column_is_reported_with_the_known_ones(monkeypatch):
    fake_hub(monkeypatch, lambda *args, **kwargs: iter([{"content": "one", "url": "-"}]))
    with pytest.raises(CorpusUnavailable, match="no column 'text'; known: content, url"):
        hub_corpus("some/set")


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError("BuilderConfig not found")])
def test_a_hub_failure_says_what_to_use_instead(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(CorpusUnavailable, match=rf"can't load .*'some/set'.*{error}.*calibration=self.*local files"):
        hub_corpus("some/set")


def test_generated_documents_have_exactly_the_tokens_asked_for_and_no_special_ones(llm, tmp_path):
    corpus = self_generated_corpus(llm, tmp_path, n_documents=5, tokens_per_document=40)
    assert [len(document.split()) for document in corpus.documents] == [40] * 5
    assert set(" ".join(corpus.documents).split()) <= set(WORDS)
    assert len(set(corpus.documents)) == 5


def test_a_tokenizer_without_bos_starts_each_document_with_a_random_ordinary_token(tmp_path):
    corpus = self_generated_corpus(make_llm(with_bos=False), tmp_path, n_documents=6, tokens_per_document=10)
    words = [document.split() for document in corpus.documents]
    assert {len(document) for document in words} == {11}
    assert len({document[0] for document in words}) > 1
    assert set(" ".join(corpus.documents).split()) <= set(WORDS)


def test_equal_seeds_give_equal_text_and_other_settings_other_text(llm, tmp_path):
    def sample(folder, **settings):
        return self_generated_corpus(llm, tmp_path / folder, n_documents=2, tokens_per_document=20, **settings).digest

    assert sample("a") == sample("b")
    assert len({sample("a"), sample("a", seed=1), sample("a", temperature=0.5)}) == 3
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_sampling_leaves_random_states_and_the_generation_config_as_they_were(llm, tmp_path):
    generation_config = copy.deepcopy(llm.model.generation_config.to_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert llm.model.generation_config.to_dict() == generation_config


def test_stored_text_is_read_instead_of_sampled_again(llm, tmp_path, monkeypatch):
    first = self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    monkeypatch.setattr(llm.model, "generate", lambda **kwargs: pytest.fail("sampled again"))
    assert self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5) == first
    (stored,) = tmp_path.iterdir()
    assert json.loads(stored.read_text())["settings"]["model_digest"] == "tiny"


def test_other_weights_get_their_own_text(llm, tmp_path):
    self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    llm.digest = "other"
    self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace(" w", " x"), lambda text: "[]"])
def test_a_damaged_stored_file_is_an_error_and_stays_as_it_was(llm, tmp_path, damage):
    self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    (stored,) = tmp_path.iterdir()
    stored.write_text(damage(stored.read_text()))
    damaged = stored.read_text()
    with pytest.raises(CorpusUnavailable, match=rf"{stored.name} is damaged; delete it"):
        self_generated_corpus(llm, tmp_path, n_documents=2, tokens_per_document=5)
    assert stored.read_text() == damaged


@pytest.mark.llm
def test_the_embedded_model_samples_text_without_a_word_of_warning(embedded_folder, tmp_path, capfd):
    real = SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.bfloat16).eval(),
        tokenizer=AutoTokenizer.from_pretrained(embedded_folder),
        device=torch.device("cpu"),
        digest="real",
    )
    capfd.readouterr()
    corpus = self_generated_corpus(real, tmp_path, n_documents=2, tokens_per_document=12)
    windows = random_windows(corpus, real.tokenizer, n_samples=2, tokens_per_sample=8)
    assert capfd.readouterr() == ("", "")
    assert windows.shape == (2, 8)
    assert not set(windows.flatten().tolist()) & set(real.tokenizer.all_special_ids)
