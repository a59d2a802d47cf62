"""The reranker: scores equal upstream's, whatever leaves early, and requests that can't be answered."""

import math

import numpy as np
import pytest
import torch

import rap_env
from rap_env.errors import RankingFailed
from rap_env.rerank import ClusterRule, MemoryBounds, Reranker, Template, replay
from rap_env.rerank.similarity import SimilarityExit
from tests.rerank.cases import DOCUMENTS, N_LAYERS, QUERY, tiny, upstream_scores


@pytest.fixture(scope="module")
def reranker():
    return Reranker(tiny())


@pytest.mark.parametrize("model_type", ["llama", "opt", "qwen2", "qwen3", "mistral"])
def test_scores_equal_upstreams_on_each_full_prompt(model_type):
    llm, most = tiny(model_type), 64 if model_type == "opt" else 512  # OPT's context has 512 tokens
    scores = Reranker(llm, max_document_tokens=most).ranking(QUERY, DOCUMENTS).scores
    assert np.abs(np.array(scores) - upstream_scores(llm, QUERY, DOCUMENTS, most)).max() < 1e-5


def test_the_last_row_of_a_path_is_the_models_and_the_others_its_layers(reranker):
    path = reranker.score_path(QUERY, DOCUMENTS)
    assert path.shape == (N_LAYERS, len(DOCUMENTS))
    assert path[-1].tolist() == list(reranker.ranking(QUERY, DOCUMENTS).scores)
    for layer in (0, 3):
        with torch.inference_mode():
            llm = tiny()
            del llm.model.model.layers[layer + 1 :]
            assert np.abs(path[layer] - upstream_scores(llm, QUERY, DOCUMENTS)).max() < 1e-5


def test_a_mask_prunes_the_reranker():
    llm = tiny()
    mask = rap_env.PruningMask.all_kept(llm.shape).drop(
        "layer1.attention", "layer2.mlp", "layer4.attention", "layer4.mlp"
    )
    with llm.pruned(mask):
        expected = upstream_scores(llm, QUERY, DOCUMENTS)
        scores = Reranker(llm).ranking(QUERY, DOCUMENTS).scores
    assert np.abs(np.array(scores) - expected).max() < 1e-5


def test_results_have_the_form_of_a_cross_encoders(reranker):
    results = reranker.rank(QUERY, DOCUMENTS)
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True) and all(type(score) is float for score in scores)
    assert sorted(result["corpus_id"] for result in results) == list(range(len(DOCUMENTS)))
    assert all(result.keys() == {"corpus_id", "score"} for result in results)
    named = reranker.rank(QUERY, DOCUMENTS, top_k=3, return_documents=True)
    assert [{**result, "text": DOCUMENTS[result["corpus_id"]]} for result in results[:3]] == named


def test_equal_documents_keep_their_order(reranker):
    ids = [result["corpus_id"] for result in reranker.rank(QUERY, ["b", "a", "b", "a", "b"])]
    assert ids in ([0, 2, 4, 1, 3], [1, 3, 0, 2, 4])
    pruning = Reranker(reranker.llm, decider=ClusterRule(0.01))
    assert [result["corpus_id"] for result in pruning.rank(QUERY, ["b", "a"] * 4, 4)] in ([0, 2, 4, 6], [1, 3, 5, 7])
    assert [result["corpus_id"] for result in reranker.rank(QUERY, ["a"] * 5, 3)] == [0, 1, 2]


@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize(
    "rule", [ClusterRule(0.05), ClusterRule(0.3, first_layer=2), ClusterRule(0.05, keeps_order=True)]
)
def test_a_rule_decides_on_the_stream_as_it_does_on_recorded_scores(reranker, rule, top_k):
    pruning = Reranker(reranker.llm, decider=rule, memory=MemoryBounds(chunk_tokens=200))
    ranking = pruning.ranking(QUERY, DOCUMENTS, top_k)
    expected = replay(reranker.score_path(QUERY, DOCUMENTS), rule, top_k)
    assert (ranking.ids, ranking.layers) == (expected.ids, expected.layers)
    assert np.abs(np.array(ranking.scores) - expected.scores).max() < 1e-5
    assert sum(ranking.layers) < N_LAYERS * len(DOCUMENTS)  # the rule had something to do


def test_who_leaves_is_not_computed_any_more():
    rule, llm, rows = ClusterRule(0.05), tiny(), []
    for layer in llm.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[:2].numel()))
    documents = ["a" * 40, "b" * 40, "c" * 40, "d" * 40]
    reranker = Reranker(llm, decider=rule)
    ranking, own = reranker.ranking(QUERY, documents, 1), int(reranker.token_counts(QUERY, documents)[0])
    left = [sum(layers > index for layers in ranking.layers) for index in range(max(ranking.layers))]
    blocks = {1: [128], 2: [256], 3: [256, 128]}  # by how often 128 rows are read
    expected = [block for n in left for block in blocks[math.ceil(n * own / 128)]]
    assert [n for n in rows if n != rows[0]] == expected  # without the prefix's stream
    assert sum(ranking.layers) < 4 * N_LAYERS


def test_similarities_are_cosines_of_mean_embeddings_and_who_is_not_similar_is_not_read(reranker):
    found = reranker.similarities("ab", ["ab", "b", "", "zzz"])
    table = reranker.llm.model.get_input_embeddings().weight.double()
    a, b = (reranker.llm.tokenizer("ab").input_ids[place] for place in (-2, -1))
    expected = torch.cosine_similarity(table[[a, b]].mean(0), table[b], dim=0)
    assert found[0] == pytest.approx(1.0) and found[1] == pytest.approx(float(expected)) and found[2] == -1.0
    pruning = Reranker(reranker.llm, decider=SimilarityExit(0.0, ClusterRule(0.05)))
    ranking = pruning.ranking("ab", ["", "ab", "zzz"], 1)
    assert ranking.ids == (1,) and ranking.layers[::2] == (0, 0) and ranking.layers[1] > 0
    assert pruning.ranking("ab", ["", "ab"]).layers == (N_LAYERS, N_LAYERS)


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_without_documents_there_is_an_empty_list(reranker, top_k):
    assert reranker.rank(QUERY, [], top_k) == []
    with pytest.raises(RankingFailed, match="expected at least 1 document; got none"):
        reranker.score_path(QUERY, [])


@pytest.mark.parametrize("top_k", [None, 1, 2, 1000])
def test_one_document_is_ranked(reranker, top_k):
    (result,) = Reranker(reranker.llm, decider=ClusterRule(0.1)).rank(QUERY, ["alpha"], top_k)
    assert result["corpus_id"] == 0
    assert abs(result["score"] - upstream_scores(reranker.llm, QUERY, ["alpha"])[0]) < 1e-5


def test_documents_without_text_are_ranked(reranker):
    assert [result["corpus_id"] for result in reranker.rank("", ["", ""])] == [0, 1]


def test_a_long_document_is_cut_where_it_says(reranker):
    cut = Reranker(reranker.llm, max_document_tokens=11)
    assert cut.rank(QUERY, ["0123456789" * 100]) == cut.rank(QUERY, ["0123456789"])  # a space in front is the 11th
    assert cut.rank(QUERY, ["012345678"]) != cut.rank(QUERY, ["0123456789"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((None, ["a"]), "a query of type str; got NoneType"),
        ((QUERY, "abc"), "a list of documents of type str"),
        ((QUERY, ["a", None]), "a list of documents of type str"),
        ((QUERY, ["a"], 0), "top_k of at least 1, or None; got 0"),
    ],
)
def test_requests_of_another_form_are_refused(reranker, arguments, problem):
    with pytest.raises(RankingFailed, match=problem):
        reranker.rank(*arguments)


def test_scores_that_are_no_numbers_are_told_and_the_next_request_is_answered():
    llm = tiny()
    reranker = Reranker(llm, decider=ClusterRule(0.1))
    expected = reranker.rank(QUERY, DOCUMENTS, 3)
    weight = llm.model.model.layers[2].mlp.down_proj.weight
    before = weight.detach().clone()
    weight.data[0, 0] = torch.nan
    with pytest.raises(RankingFailed, match=r"after layer 2 the scores of the documents .* are not finite"):
        Reranker(llm, decider=ClusterRule(1e9)).rank(QUERY, DOCUMENTS, 3)
    weight.data.copy_(before)
    assert reranker.rank(QUERY, DOCUMENTS, 3) == expected


def test_another_template_asks_with_other_words():
    llm = tiny()
    template = Template("query {query} document {document} relevant?", yes="true", no="false")
    scores = Reranker(llm, template=template).ranking(QUERY, ["alpha"]).scores
    with torch.inference_mode():
        tokens = llm.tokenizer(f"query {QUERY} document alpha relevant?", return_tensors="pt").input_ids
        logits = llm.model(tokens).logits[0, -1]
    assert scores[0] == pytest.approx(float(logits[ord("t") - 33] - logits[ord("f") - 33]), abs=1e-5)


def test_quantised_models_are_ranked_with_their_own_head():
    llm = tiny()
    llm.quantise("int8")
    scores = Reranker(llm).ranking(QUERY, ["alpha", "beta gamma"]).scores
    assert np.abs(np.array(scores) - upstream_scores(llm, QUERY, ["alpha", "beta gamma"])).max() < 1e-4


def test_the_package_has_it_by_name():
    assert rap_env.Reranker is Reranker
    (first, *_others) = rap_env.Reranker.load("tiny", dtype="float32", device="cpu").rank(QUERY, DOCUMENTS, top_k=2)
    assert first.keys() == {"corpus_id", "score"}
