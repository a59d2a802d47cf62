"""Systems on a tiny model: what each of them answers, and a whole comparison in real processes."""

import io
import json
from itertools import chain, pairwise
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from experiments.rerank import Comparison
from experiments.reranking.cross_encoder import PromptedCrossEncoder, chat_template
from experiments.reranking.heads import AttentionHeads, Example
from experiments.reranking.padded import PaddedBatches
from experiments.reranking.ranker import Ranker
from experiments.reranking.systems import SYSTEMS, System
from experiments.reranking.worker import serve
from rap_env.errors import InvalidConfig
from rap_env.llm.loading import load_llm
from rap_env.rerank import QWEN3, Reranker
from rap_env.rerank.prompts import Prompts

ROOT = Path(__file__).parents[3]
QUERY, DOCUMENTS = "what is lift", ["the lift of a wing", "heat", "a long text of plates and shells", "flow", "wing"]


@pytest.fixture
def spec(tmp_path) -> dict:
    options = {"model_name": "tiny", "dtype": "float32", "adapter": None, "template": None, "max_document_tokens": 20}
    options |= {"batch_size": 2, "kept_channels": 0.5, "n_heads": 2}
    options |= {"bounds": {"chunk_tokens": {"small": 64, "large": 128}, "embedding_share": 0.1}}
    return options | {"rule": {"max_clusters": 3, "first_layer": 0}, "folder": str(tmp_path / "weights")}


def ranked(system: System, spec: dict, top_k: int | None = None, threshold: float | None = None):
    return Ranker(system, spec).rank(QUERY, DOCUMENTS, top_k, threshold)


@pytest.mark.parametrize("name", ["hf", "hf_offload", "streamed", "pruning_alone"])
def test_every_way_of_reading_gives_the_full_order_where_nothing_is_pruned(name, spec):
    found, full = ranked(SYSTEMS[name], spec), ranked(SYSTEMS["full"], spec)
    assert found.ids == full.ids and found.layers == full.layers
    assert (found.read_bytes is None) == name.startswith("hf")
    assert (found.read_bytes or 0) > 0 or name != "streamed"


def test_pruning_reads_fewer_layers_and_a_mask_or_int8_changes_scores(spec, monkeypatch, tmp_path):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))
    full, pruned = ranked(SYSTEMS["full"], spec, 1), ranked(SYSTEMS["pruned"], spec, 1, 0.0)
    assert pruned.layers < full.layers and len(pruned.ids) == 1
    noise = {"noise": [1.0] * 4}
    assert ranked(SYSTEMS["margins"], spec | noise, 1, 1e-6).layers < full.layers
    assert ranked(SYSTEMS["margins"], spec | noise, 1, 1e9).ids == full.ids[:1]
    assert Ranker(SYSTEMS["masked"], spec).path(QUERY, DOCUMENTS) != Ranker(SYSTEMS["full"], spec).path(
        QUERY, DOCUMENTS
    )
    assert len(ranked(SYSTEMS["int8"], spec).ids) == len(DOCUMENTS)


def test_heads_are_chosen_on_examples_and_score_by_attention_to_each_document(spec):
    llm = load_llm("tiny", "float32", "cpu")
    example = Example(QUERY, DOCUMENTS, [True, False, False, False, True])
    heads = AttentionHeads(llm, 20, [example], 3)
    assert len(set(heads.heads)) == 3 and llm.model.config._attn_implementation != "eager"
    with_query = [upstream_attention(llm, text) for text in (QUERY, "N/A")]
    expected = sum(with_query[0][head] - with_query[1][head] for head in heads.heads)
    assert heads.scores(QUERY, DOCUMENTS) == pytest.approx(expected.tolist(), abs=1e-5)
    ranker = Ranker(SYSTEMS["heads"], spec | {"examples": [example._asdict()]})
    assert len(ranker.rank(QUERY, DOCUMENTS, None, None).ids) == len(DOCUMENTS)
    with pytest.raises(InvalidConfig, match="relevant documents among its candidates"):
        AttentionHeads(llm, 20, [example._replace(relevant=[False] * 5)], 3)


def upstream_attention(llm, query: str):
    """Attention of the query's tokens to each document, in one forward without a cache [layers, heads, n]."""
    own = [llm.tokenizer(f"{text}\n", add_special_tokens=False).input_ids[:20] for text in DOCUMENTS]
    start = llm.tokenizer("Here are some passages:\n\n", add_special_tokens=False).input_ids
    asking = f"\nWhich of these passages answer the query?\nQuery: {query}"
    end = llm.tokenizer(asking, add_special_tokens=False).input_ids
    before = llm.model.config._attn_implementation
    llm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = llm.model(torch.tensor([[*start, *chain(*own), *end]]), output_attentions=True).attentions
    llm.model.set_attn_implementation(before)
    mean = np.stack([each[0, :, -len(end) :].mean(1).numpy() for each in attentions])
    ends = np.cumsum([len(start), *map(len, own)])
    return np.stack([mean[:, :, first:last].sum(2) for first, last in pairwise(ends)], 2)


def test_the_chat_template_of_sentence_transformers_renders_the_prompt():
    messages = [{"role": "query", "content": "{{a}}"}, {"role": "document", "content": "b\n"}]
    rendered = jinja2.Environment(trim_blocks=True).from_string(chat_template(QWEN3)).render(messages=messages)
    assert rendered == QWEN3.text.format(instruction=QWEN3.instruction, query="{{a}}", document="b\n")


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_the_cross_encoder_scores_as_the_reranker_does(spec, dtype, difference, tmp_path):
    pytest.importorskip("sentence_transformers")
    llm = load_llm("tiny", dtype, "cpu")
    prompts = Prompts(llm.tokenizer, QWEN3, 20, llm.shape.context_tokens)
    rival = PromptedCrossEncoder(llm, prompts, QWEN3, 20, 2, tmp_path)
    read = [rival._model[0].preprocess([[QUERY, text]])["input_ids"][0].tolist() for text in rival._cut(DOCUMENTS)]
    prompt = prompts.of(QUERY, DOCUMENTS)
    assert read == [[*prompt.prefix, *ending] for ending in prompt.endings]
    assert max(map(len, DOCUMENTS)) > 20 and rival._model[0].model.dtype == llm.dtype
    expected = Reranker(llm, QWEN3, None, 20).score_path(QUERY, DOCUMENTS)[-1]
    assert rival.scores(QUERY, DOCUMENTS) == pytest.approx(expected, abs=difference)
    assert ranked(SYSTEMS["cross_encoder"], spec).ids == ranked(SYSTEMS["full"], spec).ids


def test_padded_batches_read_a_model_that_is_not_frozen(spec):
    llm = load_llm("tiny", "float32", "cpu")  # frozen; the head would be copied for each prompt
    PaddedBatches(llm.model, Prompts(llm.tokenizer, QWEN3, 20, llm.shape.context_tokens), 2)
    assert all(weight.requires_grad for weight in llm.model.parameters())


def test_a_worker_answers_line_by_line(spec):
    request = {"query": QUERY, "documents": DOCUMENTS[:4]}
    commands = [{**spec, "system": SYSTEMS["pruned"].as_dict(), "warm_up": request}]
    commands += [{"rank": 0, **request, "top_k": 2, "threshold": 0.0}]
    commands += [{"path": 0, "query": QUERY, "documents": DOCUMENTS[:3]}]
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(each) + "\n" for each in commands)), answers)
    imported, loaded, rank, path = map(json.loads, answers.getvalue().splitlines())
    assert imported == {"imported": True} and loaded["loaded"] and len(rank["ids"]) == 2 and rank["seconds"] > 0
    assert len(path["path"][0]) == len(path["tokens"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_comparison_asks_processes_and_goes_on_with_what_an_earlier_run_left(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the processes find the packages
    config = OmegaConf.to_container(OmegaConf.load("conf/rerank.yaml"))
    del config["hydra"]
    config |= {
        "model_name": "tiny",
        "dtype": "float32",
        "systems": ["streamed_pruned", "streamed_margins"],
        "candidates": [4],
        "top_k": [1],
    }
    config |= {"calibration_queries": 2, "report_queries": 1, "max_document_tokens": 12, "repeats": 1}
    results = Comparison(config, tmp_path).results()
    for name in config["systems"]:
        (row,) = results["systems"][name]
        assert row["peak_bytes"] > 0 and row["read_bytes"] > 0 and 0 <= row["agreement"] <= 1
    assert [each["rule"] for each in results["thresholds"]] == ["clusters", "margins"]
    assert len(results["gamma"]) == 1 and results["left_out"] == {}
    monkeypatch.setattr("experiments.rerank.Process", None)  # nothing is asked again
    assert Comparison(config, tmp_path).results() == results
    with pytest.raises(InvalidConfig, match="another config"):
        Comparison(config | {"seed": 1}, tmp_path)
    with pytest.raises(InvalidConfig, match="at least 1 calibration query"):
        Comparison(config | {"report_queries": 0}, tmp_path / "other")
