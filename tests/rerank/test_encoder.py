"""Encoder cross-encoders: the scores of transformers, documents that leave early, and what is refused."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from rap_env.errors import ModelUnavailable, RankingFailed, UnsupportedArchitecture
from rap_env.llm import widened
from rap_env.rerank import ClusterRule, EncoderReranker, replay
from rap_env.rerank.similarity import SimilarityExit

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "wing", "flow", "heat", "shock", "jet", "lift", "drag", "plate"]
QUERY = "wing lift"
DOCUMENTS = ["wing flow", "", "heat shock jet lift drag plate wing flow heat", "jet", "jet", "plate " * 40, "lift drag"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.5,
    "type_vocab_size": 2,
    "num_labels": 1,
}


def words_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def encoder(family: str = "bert", **changes):
    torch.manual_seed(0)
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES | changes)).eval()
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**SIZES | {"pad_token_id": 0} | changes)).eval()


@torch.inference_mode()
def upstream_scores(model, tokenizer) -> list[float]:
    """Each pair alone, without padding."""
    pairs = [
        tokenizer([QUERY], [each], truncation="only_second", max_length=30, return_tensors="pt") for each in DOCUMENTS
    ]
    return [float(model(**pair).logits[0, 0]) for pair in pairs]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_scores_are_those_of_transformers(family):
    model, tokenizer = encoder(family), words_tokenizer()
    reranker = EncoderReranker(model, tokenizer, max_tokens=30, batch_size=3)
    expected = upstream_scores(model, tokenizer)
    ranked = reranker.rank(QUERY, DOCUMENTS, top_k=3, return_documents=True)
    order = np.argsort(-np.array(expected), kind="stable")[:3].tolist()
    assert [each["corpus_id"] for each in ranked] == order
    assert [each["score"] for each in ranked] == pytest.approx([expected[number] for number in order], abs=1e-5)
    assert ranked[0]["text"] == DOCUMENTS[order[0]]
    assert reranker.score_path(QUERY, DOCUMENTS)[-1] == pytest.approx(expected, abs=1e-5)
    assert reranker.rank(QUERY, []) == []


def test_without_instructions_for_bfloat16_layers_multiply_by_way_of_float32(monkeypatch):
    model, calls, product = encoder().bfloat16(), [], widened.widened
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(widened, "widened", lambda *given: calls.append(given) or product(*given))
    found = EncoderReranker(model, words_tokenizer(), max_tokens=30, batch_size=3).score_path(QUERY, DOCUMENTS)[-1]
    assert len(calls) == 3 * SIZES["num_hidden_layers"] * 6  # batches, layers, and matrices of each
    assert found == pytest.approx(upstream_scores(encoder(), words_tokenizer()), abs=0.1)


def test_documents_that_leave_early_are_those_of_the_rule():
    reranker = EncoderReranker(encoder(), words_tokenizer(), ClusterRule(0.1), max_tokens=30, batch_size=3)
    ranking = reranker.ranking(QUERY, DOCUMENTS, top_k=2)
    expected = replay(reranker.score_path(QUERY, DOCUMENTS), reranker.decider, 2)
    assert ranking.ids == expected.ids and ranking.layers == expected.layers
    assert min(ranking.layers) < reranker.n_layers


def test_documents_unlike_the_query_are_read_by_no_layer():
    reranker = EncoderReranker(encoder(), words_tokenizer(), SimilarityExit(0.0), max_tokens=30, batch_size=3)
    table = reranker._model.bert.embeddings.word_embeddings.weight.detach().double().numpy()
    means = [table[[WORDS.index(word) for word in text.split()]].mean(0) for text in (QUERY, "wing flow", "lift drag")]
    cosines = [means[0] @ each / np.linalg.norm(means[0]) / np.linalg.norm(each) for each in means[1:]]
    similarities = reranker.similarities(QUERY, DOCUMENTS)
    assert similarities[[0, 6]] == pytest.approx(cosines) and similarities[1] == -1
    ranking, path = reranker.ranking(QUERY, DOCUMENTS, top_k=2), reranker.score_path(QUERY, DOCUMENTS)
    read = np.argsort(-similarities)[:2]
    assert sorted(ranking.ids) == sorted(read) == [number for number, n in enumerate(ranking.layers) if n]
    assert [ranking.scores[number] for number in read] == pytest.approx(path[-1, read], abs=1e-5)
    assert reranker.ranking(QUERY, DOCUMENTS).layers == (reranker.n_layers,) * len(DOCUMENTS)


def test_a_folder_is_loaded(tmp_path):
    model, tokenizer = encoder(), words_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = EncoderReranker.load(str(tmp_path), max_tokens=30)
    assert loaded.score_path(QUERY, DOCUMENTS)[-1] == pytest.approx(upstream_scores(model, tokenizer), abs=1e-5)


def test_what_cannot_be_ranked_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitecture, match="with 1 output; got bert with 2"):
        EncoderReranker(encoder(num_labels=2), words_tokenizer())
    with pytest.raises(ModelUnavailable, match="can't load"):
        EncoderReranker.load(str(tmp_path))
    with pytest.raises(RankingFailed, match="no room for a document"):
        EncoderReranker(encoder(), words_tokenizer(), max_tokens=4).rank("wing " * 9, ["jet"])
    with pytest.raises(RankingFailed, match="list of documents"):
        EncoderReranker(encoder(), words_tokenizer()).rank("wing", "jet")
