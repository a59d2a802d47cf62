"""Bounded memory: no bound changes a score, layers leave as the window moves on, and what damaged files do."""

import io
import itertools
import tempfile

import numpy as np
import psutil
import pytest
import torch

from rap_env.errors import RankingFailed, UnsupportedArchitecture, WeightsUnavailable
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rerank import ClusterRule, MemoryBounds, Reranker
from rap_env.rerank.candidates import Candidates
from rap_env.rerank.rows import cache_rows
from tests.llm.test_weights_files import flip, last_absent_byte
from tests.llm.weights_cases import LARGE, resident_bytes
from tests.rerank.cases import DOCUMENTS, N_LAYERS, QUERY, cranfield_like, tiny

BOUNDS = list(itertools.product([None, 300], [False, True], [None, 0.02, 1.0], [False, True]))


def tied(seed: int = 0) -> SwitchableLLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
    return build_random_llm("llama", {**sizes, "vocab_size": 257, "tie_word_embeddings": True}, seed)


@pytest.fixture(scope="module", params=[tiny, tied], ids=["head of its own", "tied head"])
def model(request):
    return request.param


@pytest.mark.parametrize(("chunk_tokens", "stream_weights", "share", "states_in_file"), BOUNDS)
@pytest.mark.parametrize("decider", [None, ClusterRule(0.05)])
def test_no_bound_changes_a_result(model, tmp_path, decider, chunk_tokens, stream_weights, share, states_in_file):
    expected = Reranker(model(), decider=decider, memory=MemoryBounds(None)).ranking(QUERY, DOCUMENTS, 3)
    bounds = MemoryBounds(chunk_tokens, stream_weights, share, tmp_path, states_in_file)
    reranker = Reranker(model(), decider=decider, memory=bounds)
    for _ in range(2):
        ranking = reranker.ranking(QUERY, DOCUMENTS, 3)
        assert (ranking.ids, ranking.layers) == (expected.ids, expected.layers)
        assert np.abs(np.array(ranking.scores) - expected.scores).max() < 1e-5
    assert bool(list(tmp_path.iterdir())) == (stream_weights or share is not None)


def test_what_is_in_files_changes_no_bit(model, tmp_path):
    expected = Reranker(model()).ranking(QUERY, DOCUMENTS).scores
    bounds = MemoryBounds(1024, True, 0.1, tmp_path, states_in_file=True)
    assert Reranker(model(), memory=bounds).ranking(QUERY, DOCUMENTS).scores == expected


def test_a_masked_model_is_streamed_without_what_its_mask_drops(tmp_path):
    llm, other = tiny(), tiny()
    for one in (llm, other):
        one.apply(one.mask.drop("layer1.attention", "layer2.mlp", "layer4.attention", "layer4.mlp"))
    streaming = Reranker(llm, memory=MemoryBounds(None, True, None, tmp_path))
    assert streaming.ranking(QUERY, DOCUMENTS) == Reranker(other, memory=MemoryBounds(None)).ranking(QUERY, DOCUMENTS)
    walked = [site.name for site in streaming._window.walk()]
    assert len(walked) == 2 * N_LAYERS - 4 and not {"layer1.attention", "layer2.mlp", "layer4.mlp"} & set(walked)


def test_a_chunk_bounds_the_tokens_that_a_layer_runs_over():
    llm, attention, mlp = tiny(), [], []
    layer = llm.model.model.layers[0]
    layer.input_layernorm.register_forward_pre_hook(lambda _module, inputs: attention.append(inputs[0].shape[:2]))
    layer.mlp.register_forward_pre_hook(lambda _module, inputs: mlp.append(inputs[0].shape[:2]))
    documents = [chr(97 + number) * 100 for number in range(6)]
    reranker = Reranker(llm, memory=MemoryBounds(chunk_tokens=400))
    reranker.rank(QUERY, documents)
    n_tokens = int(reranker.token_counts(QUERY, documents).sum())
    assert attention[0] == mlp[0]  # the prefix
    two_documents = (1, 2 * n_tokens // 6 // 128 * 128 + 128)
    assert attention[1:] == 3 * [two_documents] and two_documents[1] <= 400
    n_blocks = -(-n_tokens // 128)
    assert mlp[1:] == n_blocks // 2 * [(2, 128)] + n_blocks % 2 * [(1, 128)]


@pytest.fixture(params=[1, 2])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("states_in_file", [False, True])
def test_lanes_read_chunks_side_by_side(tmp_path, n_threads, states_in_file):
    expected = Reranker(tiny(), memory=MemoryBounds(None)).score_path(QUERY, DOCUMENTS)
    bounds = MemoryBounds(300, True, 0.1, tmp_path, states_in_file)
    assert np.abs(Reranker(tiny(), memory=bounds).score_path(QUERY, DOCUMENTS) - expected).max() < 1e-5


def test_requests_of_any_length_are_read_in_few_shapes(n_threads):
    llm, seen = tiny(), set()
    for module in llm.model.model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _module, inputs: seen.add(inputs[0].shape[:-1].numel()))
    reranker = Reranker(llm, decider=ClusterRule(0.05), memory=MemoryBounds(chunk_tokens=300))
    for length in range(1, 200, 13):
        reranker.rank(QUERY, ["a" * length, "b" * (2 * length), "c" * 7], 1)
    assert {128, 256} <= seen
    assert len([n_rows for n_rows in seen if n_rows % 128]) == 1  # the prefix, which is the same each time


def test_the_weights_of_one_site_are_there_while_it_runs(tmp_path):
    llm = tiny()
    reranker = Reranker(llm, memory=MemoryBounds(None, True, None, tmp_path))
    assert llm.resident.kept == ()
    sites = []
    for site in reranker._window.walk():
        sites.append(site)
        assert [component.name for component in llm.resident.kept] == [site.name]
    assert sites == list(llm.shape.sites) and llm.resident.kept == ()


def test_a_window_that_is_left_early_keeps_nothing(tmp_path):
    llm = tiny()
    reranker = Reranker(llm, decider=ClusterRule(0), memory=MemoryBounds(None, True, None, tmp_path))
    assert max(reranker.ranking(QUERY, DOCUMENTS, 1).layers) < N_LAYERS
    assert llm.resident.kept == ()


def resident_of(folder) -> dict[str, int]:
    """Bytes in memory of each mapped file in a folder, by its name."""
    maps = psutil.Process().memory_maps(grouped=True)
    return {one.path.rpartition("/")[2]: one.rss for one in maps if one.path.startswith(str(folder))}


def test_resident_memory_is_that_of_one_layer_and_the_cached_rows(tmp_path):
    sizes = {**LARGE, "vocab_size": 40_000, "tie_word_embeddings": True}
    llm = build_random_llm("llama", sizes)  # 16 layers of 10.5 MB and an embedding of 82 MB
    layer_bytes, embedding_bytes = (4 * 512 * 512 + 3 * 512 * 1024) * 4, 40_000 * 512 * 4
    documents = cranfield_like(4, 20)
    expected, whole = Reranker(llm).ranking(QUERY, documents), resident_bytes()
    reranker = Reranker(llm, memory=MemoryBounds(256, True, 0.1, tmp_path))
    assert reranker.ranking(QUERY, documents) == expected
    # The C library may keep some of what other tests had; the files are counted to the page below.
    assert whole - resident_bytes() > 0.6 * (16 * layer_bytes + 0.9 * embedding_bytes)
    assert len(resident_of(tmp_path)) == 2 and sum(resident_of(tmp_path).values()) < 1e5
    at_rest, above, mapped = resident_bytes(), [], []
    with torch.inference_mode():
        for _layer, _candidates in reranker._read(QUERY, documents):
            above.append(resident_bytes() - at_rest)
            mapped.append(sum(resident_of(tmp_path).values()))
    assert max(mapped) < layer_bytes + 1e5  # after a layer: its MLP, and the next attention
    assert max(above) < 3 * layer_bytes  # with activations, and what the C library takes beside them


def test_rows_used_last_stay_and_others_are_read_again(tmp_path):
    llm = build_tiny_llm()
    table = llm.model.get_input_embeddings().weight.detach().clone()
    cached = cache_rows(llm, 3 / 257, tmp_path)  # three rows
    assert cached is llm.model.get_input_embeddings()

    def read(*tokens: int) -> int:
        before = cached.rows_read
        assert torch.equal(cached(torch.tensor([tokens, tokens])), table[list(tokens)].expand(2, -1, -1))
        return cached.rows_read - before

    assert read(5, 6, 5) == 2
    assert read(6, 5) == 0
    assert read(7) == 1  # 5, 6 and 7 are here
    assert read(5) == 0
    assert read(8) == 1  # in the place of 6
    assert read(5, 7, 8) == 0
    assert read(6) == 1
    assert read(1, 2, 3, 4, 5) in (4, 5)  # more than there is room for
    assert read(*range(257)) >= 254
    assert read(254, 255, 256) == 0


def test_a_mapped_embedding_leaves_the_model_as_it_was_for_others(model, tmp_path):
    llm, tokens = model(), torch.arange(20)[None]
    with torch.inference_mode():
        before, digest = llm.model(tokens).logits, llm.digest
        cache_rows(llm, 0.1, tmp_path)
        assert torch.equal(llm.model(tokens).logits, before)
    del llm.digest
    assert llm.digest == digest


def test_a_quantised_embedding_is_refused(tmp_path):
    llm = tiny()
    llm.quantise("int8")
    with pytest.raises(UnsupportedArchitecture, match="that is not quantised; random-llama is on cpu"):
        Reranker(llm, memory=MemoryBounds(None, False, 0.1, tmp_path))


@pytest.mark.parametrize("options", [{"chunk_tokens": 0}, {"embedding_share": 0.0}, {"embedding_share": 1.5}])
def test_bounds_that_leave_no_room_are_refused(options):
    with pytest.raises(RankingFailed, match=r"expected chunks of at least 1|above 0 and at most 1"):
        MemoryBounds(**options)


def test_a_file_damaged_in_the_middle_of_a_request_is_told_and_the_next_is_answered_when_it_is_whole(
    tmp_path, monkeypatch
):
    reranker = Reranker(tiny(), memory=MemoryBounds(300, True, 0.1, tmp_path))
    expected = reranker.ranking(QUERY, DOCUMENTS)
    store, run, n_runs = reranker._window._store, Candidates.run, itertools.count()
    place = last_absent_byte(store)

    def run_and_damage(self, site):
        run(self, site)
        if next(n_runs) == 2:
            flip(store.memory.path, place)

    monkeypatch.setattr(Candidates, "run", run_and_damage)
    for _ in range(2):  # in the middle, and as long as it is damaged
        with pytest.raises(WeightsUnavailable, match="are not those that were written"):
            reranker.rank(QUERY, DOCUMENTS)
        assert reranker.llm.resident.kept == ()
    flip(store.memory.path, place)
    assert reranker.ranking(QUERY, DOCUMENTS) == expected


def test_a_damaged_file_of_the_embedding_is_told_and_the_next_request_is_answered_when_it_is_whole(tmp_path):
    reranker = Reranker(tiny(), memory=MemoryBounds(300, False, 0.02, tmp_path))
    expected = reranker.ranking(QUERY, DOCUMENTS)
    (path,) = tmp_path.iterdir()
    flip(path, 5000)
    with pytest.raises(WeightsUnavailable, match="are not those that were written"):
        reranker.rank(QUERY, DOCUMENTS)
    flip(path, 5000)
    assert reranker.ranking(QUERY, DOCUMENTS) == expected


def test_files_that_are_removed_are_missed_by_nobody_who_has_them_open(tmp_path):
    reranker = Reranker(tiny(), memory=MemoryBounds(300, True, 0.02, tmp_path))
    expected = reranker.ranking(QUERY, DOCUMENTS)
    for path in tmp_path.iterdir():
        path.unlink()
    assert reranker.ranking(QUERY, DOCUMENTS) == expected


def test_a_request_that_fails_leaves_a_streamed_model_ready_for_the_next(tmp_path):
    reranker = Reranker(tiny(), decider=ClusterRule(1e9), memory=MemoryBounds(300, True, 0.1, tmp_path))
    expected = reranker.ranking(QUERY, DOCUMENTS, 2)
    norm = reranker.llm.model.model.norm.weight
    before = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(RankingFailed, match="after layer 0"):
        reranker.rank(QUERY, DOCUMENTS, 2)
    assert reranker.llm.resident.kept == ()
    norm.data.copy_(before)
    assert reranker.ranking(QUERY, DOCUMENTS, 2) == expected


class _FullDisk(io.FileIO):
    """Takes any size, as a sparse file does, and no byte."""

    def __init__(self, **_options) -> None:
        super().__init__("/dev/full", "r+")

    def truncate(self, size=None) -> int:
        return size


def test_states_in_a_file_leave_nothing_behind_and_a_full_disk_ends_one_request(tmp_path, monkeypatch):
    reranker = Reranker(tiny(), memory=MemoryBounds(300, folder=tmp_path, states_in_file=True))
    expected = reranker.ranking(QUERY, DOCUMENTS)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", _FullDisk)
        with pytest.raises(RankingFailed, match=f"can't be kept in a file in {tmp_path}: .*No space left"):
            reranker.ranking(QUERY, DOCUMENTS)
    assert reranker.ranking(QUERY, DOCUMENTS) == expected and not list(tmp_path.iterdir())
