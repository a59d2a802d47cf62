"""The reranker on the embedded model."""

import numpy as np
import pytest
import torch

from rap_env.rerank import ClusterRule, MemoryBounds, Reranker, replay
from rap_env.rerank.prompts import QWEN3, Prompts
from tests.rerank.cases import cranfield_like, upstream_scores

QUERY = "what is the drag of a wing in supersonic flow?"
DOCUMENTS = [*cranfield_like(4, 60), "", "the lift of a wing."]


@pytest.mark.llm
def test_the_answers_are_single_tokens(embedded_llm_float32):
    tokenizer = embedded_llm_float32.tokenizer
    prompts = Prompts(tokenizer, QWEN3, 512, 8192)
    assert tokenizer.convert_ids_to_tokens([prompts.yes, prompts.no]) == ["yes", "no"]


@pytest.mark.llm
def test_a_prompt_in_parts_has_the_tokens_of_the_prompt_as_a_whole(embedded_llm_float32):
    tokenizer = embedded_llm_float32.tokenizer
    prompt = Prompts(tokenizer, QWEN3, 512, 8192).of(QUERY, DOCUMENTS)
    for document, ending in zip(DOCUMENTS, prompt.endings, strict=True):
        whole = QWEN3.text.format(instruction=QWEN3.instruction, query=QUERY, document=document)
        assert [*prompt.prefix, *ending] == tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.slow
@pytest.mark.llm
def test_scores_equal_upstreams_whatever_is_bounded(embedded_llm_float32, tmp_path, embedded_folder):
    llm = embedded_llm_float32
    expected = upstream_scores(llm, QUERY, DOCUMENTS)
    reranker = Reranker(llm, memory=MemoryBounds(chunk_tokens=None))
    path = reranker.score_path(QUERY, DOCUMENTS)
    assert np.abs(path[-1] - expected).max() < 5e-5  # upstream's own batches differ by 5e-6
    rule = ClusterRule(0.3, first_layer=8)
    pruned = replay(path, rule, 2)
    bounded = Reranker.load(
        str(embedded_folder),
        dtype="float32",
        device="cpu",
        decider=rule,
        memory=MemoryBounds(300, True, 0.1, tmp_path),
    )
    ranking = bounded.ranking(QUERY, DOCUMENTS, 2)
    assert (ranking.ids, ranking.layers) == (pruned.ids, pruned.layers)
    assert np.abs(np.array(bounded.ranking(QUERY, DOCUMENTS).scores) - expected).max() < 5e-5


@pytest.mark.llm
def test_in_bfloat16_scores_are_close_and_no_two_of_them_equal(embedded_llm, embedded_llm_float32):
    exact = np.array(upstream_scores(embedded_llm_float32, QUERY, DOCUMENTS))
    scores = np.array(Reranker(embedded_llm).ranking(QUERY, DOCUMENTS).scores)
    assert np.abs(scores - exact).max() < 0.25 and len(set(scores)) == len(scores)
    assert embedded_llm.dtype == torch.bfloat16
