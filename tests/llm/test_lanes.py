"""Lanes change which thread computes what, and nothing in the result."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rap_env.evaluation import perplexity
from rap_env.evaluation.perplexity import token_losses
from rap_env.llm import lanes
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.streams import cut_stream, join_streams
from rap_env.mask import PruningMask, kept_sites

IDS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(0))
TREES = [
    TokenTree((3, 4, 5)),
    TokenTree((7, 8, 9, 10), ((11,), (12, 13))),
    TokenTree((1, 2, 3, 4, 5), ((6, 7),)),
    TokenTree(tuple(range(20, 32))),
]


@pytest.fixture
def two_threads(monkeypatch):
    """Two lanes for whatever there is to compute, on any machine."""
    monkeypatch.setattr(lanes, "_LEAST_TOKENS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "opt", "qwen3"])
def llm(request):
    return build_tiny_llm(request.param)


def without_lanes(work):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [1] * 5, [9, 1, 1], [1, 1, 9], [2, 3, 5, 7, 11, 13], [4] * 12])
def test_cuts_cover_everything_once_and_none_is_empty(sizes, n_parts):
    parts = cut(sizes, n_parts)
    assert 1 <= len(parts) <= n_parts
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(part.start < part.stop for part in parts)


def test_cuts_of_equal_sizes_are_as_equal_as_they_can_be():
    assert cut([1] * 4, 2) == [slice(0, 2), slice(2, 4)]
    assert cut([1] * 12, 3) == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert cut([9, 1, 1], 2) == [slice(0, 1), slice(1, 3)]


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_there_is_a_lane_for_each_thread_if_there_is_enough_for_it_to_do(four_threads):
    cpu = torch.device("cpu")
    assert [n_lanes(tokens, cpu) for tokens in (1, 255, 256, 383, 384, 511, 512, 10**6)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert n_lanes(10**6, torch.device("cuda")) == 1


def test_there_is_one_lane_inside_a_lane_whatever_threads_it_has(four_threads):
    def inside(_part):
        return n_lanes(10**6, torch.device("cpu")), torch.get_num_threads()

    assert in_lanes(inside, [1, 2]) == [(1, 2), (1, 2)]
    assert n_lanes(10**6, torch.device("cpu")) == 4


def finished(work):
    """The result of work that must not wait for ever."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a lane waits for threads of its own pool"
    return results[0]


def test_lanes_inside_lanes_end_for_the_inner_parts_are_worked_on_in_the_outer_lane(two_threads):
    def inner(part):
        return part, threading.current_thread().name

    def outer(part):
        together.wait()  # both threads of the pool are taken
        return in_lanes(inner, [part, part + 1])

    together = threading.Barrier(2, timeout=20)
    nested = finished(lambda: in_lanes(outer, [10, 20]))
    assert [[part for part, _name in parts] for parts in nested] == [[10, 11], [20, 21]]
    assert all(len({name for _part, name in parts}) == 1 for parts in nested), "each outer lane in one thread"


def test_a_model_that_is_run_inside_lanes_gives_the_same(llm, two_threads):
    streams = [llm.open_stream(IDS), llm.open_packed(TREES)[:2]]
    expected = without_lanes(lambda: [llm.run(llm.shape.sites, *stream) for stream in streams])
    results = finished(lambda: in_lanes(lambda stream: llm.run(llm.shape.sites, *stream), streams))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_two_threads_may_use_lanes_at_once(llm, two_threads):
    stream = llm.open_stream(IDS)
    expected = without_lanes(lambda: llm.run(llm.shape.sites, *stream))
    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda _: llm.run(llm.shape.sites, *stream), range(8)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("inference", [True, False])
def test_parts_are_worked_on_side_by_side_and_come_back_in_order(two_threads, inference):
    together = threading.Barrier(2, timeout=20)  # breaks unless both parts are under way at once

    def work(part):
        together.wait()
        return part, threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with torch.inference_mode(inference):
        (first, one, *modes), (second, other, *other_modes) = in_lanes(work, ["a", "b"])
    assert (first, second) == ("a", "b") and one != other
    assert modes == other_modes == [1, inference]
    assert torch.get_num_threads() == 2, "the caller keeps its threads"


def test_a_single_part_is_worked_on_by_the_caller(two_threads):
    assert in_lanes(lambda part: (part, threading.current_thread()), ["a"]) == [("a", threading.current_thread())]


def test_threads_that_begin_later_have_as_many_threads_as_the_caller(two_threads):
    in_lanes(lambda part: part, [1, 2])
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_lanes_of_its_own(two_threads):
    together = threading.Barrier(2, timeout=20)
    in_lanes(lambda part: together.wait(), [1, 2])  # both threads of the pool have begun
    child = os.fork()
    if child == 0:  # nothing of pytest may run in here
        os._exit(in_lanes(lambda part: part, [3, 4]) != [3, 4])
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_an_error_in_a_lane_reaches_the_caller(two_threads):
    with pytest.raises(ZeroDivisionError):
        in_lanes(lambda part: 1 // part, [1, 0])


@pytest.mark.parametrize("dropped", [(), ("layer0.attention", "layer2.mlp")])
def test_sequences_in_lanes_are_exactly_equal(llm, two_threads, dropped, monkeypatch):
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    hidden, context = llm.open_stream(IDS)
    parts = cut_stream(hidden, context)
    each = [without_lanes(lambda part=part: llm.run(kept_sites(mask), *part)) for part in parts]
    assert len(each) == 2
    before = llm.site_executions
    together = llm.run(kept_sites(mask), hidden, context)
    assert torch.equal(together, join_streams(each, context))
    assert llm.site_executions - before == len(mask.kept), "a site in two lanes is run once"
    losses = token_losses(llm, together, IDS)
    # Other numbers of rows round otherwise with AVX2, where the libraries have other kernels for them.
    bound = 1e-5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 0.0
    whole = without_lanes(lambda: llm.run(kept_sites(mask), hidden, context))
    torch.testing.assert_close(together, whole, rtol=0, atol=bound)
    of_whole = without_lanes(lambda: token_losses(llm, together, IDS))
    torch.testing.assert_close(losses, of_whole, rtol=0, atol=bound)
    monkeypatch.setattr(perplexity, "in_lanes", lambda work, own: without_lanes(lambda: [work(part) for part in own]))
    assert torch.equal(token_losses(llm, together, IDS), losses)


def test_padded_sequences_keep_their_own_attention_masks(llm, two_threads):
    attention_mask = torch.ones_like(IDS)
    for row, padding in enumerate((0, 3, 0, 5, 1)):
        attention_mask[row, :padding] = 0
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden, context = llm.open_stream(IDS, attention_mask=attention_mask, position_ids=positions)
    expected = without_lanes(lambda: llm.run(llm.shape.sites, hidden, context))
    assert torch.equal(llm.run(llm.shape.sites, hidden, context), expected)


def test_packed_trees_in_lanes_are_exactly_equal(llm, two_threads):
    hidden, context, packing = llm.open_packed(TREES)
    parts = cut_stream(hidden, context)
    assert [stream.shape[1] for stream, _context in parts] == [3 + 7 + 7, 12]
    assert torch.equal(join_streams([stream for stream, _context in parts], context), hidden)
    expected = without_lanes(lambda: llm.run(llm.shape.sites, hidden, context))
    assert torch.equal(llm.run(llm.shape.sites, hidden, context), expected)
    assert packing.cut(2) is packing.cut(2), "built once"


def test_masks_in_lanes_are_exactly_equal(llm, two_threads):
    dense = PruningMask.all_kept(llm.shape)
    masks = [dense, dense.drop("layer1.mlp"), dense.drop("layer1.mlp", "layer3.attention"), dense.drop("layer0.mlp")]
    stream = llm.open_stream(IDS)
    expected = without_lanes(lambda: dict(llm.run_masks(masks, *stream)))
    for mask, hidden in llm.run_masks(masks, *stream):
        assert torch.equal(hidden, expected[mask])
