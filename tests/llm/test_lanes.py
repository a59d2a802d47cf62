"""Lanes change who computes what, and no bit of the result."""

import os
import signal
import threading
import time

import pytest
import torch

from rap_env.evaluation.perplexity import token_losses
from rap_env.llm import lanes
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.streams import cut_stream, join_streams
from rap_env.mask import PruningMask

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


def test_there_is_a_lane_for_each_thread_if_there_is_enough_for_it_to_do():
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    assert n_lanes(10**6, cpu) == threads
    assert n_lanes(1, cpu) == 1
    assert n_lanes(2 * lanes._LEAST_TOKENS - 1, cpu) == 1
    assert n_lanes(10**6, torch.device("cuda")) == 1


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
def test_sequences_in_lanes_are_equal_to_the_bit(llm, two_threads, dropped):
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    hidden, context = llm.open_stream(IDS)
    assert len(cut_stream(hidden, context)) == 2
    expected = without_lanes(lambda: llm.run(mask.kept, hidden, context))
    before = llm.site_executions
    assert torch.equal(llm.run(mask.kept, hidden, context), expected)
    assert llm.site_executions - before == len(mask.kept), "a component in two lanes is run once"
    assert torch.equal(token_losses(llm, expected, IDS), without_lanes(lambda: token_losses(llm, expected, IDS)))


def test_padded_sequences_keep_their_own_attention_masks(llm, two_threads):
    attention_mask = torch.ones_like(IDS)
    for row, padding in enumerate((0, 3, 0, 5, 1)):
        attention_mask[row, :padding] = 0
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden, context = llm.open_stream(IDS, attention_mask=attention_mask, position_ids=positions)
    expected = without_lanes(lambda: llm.run(llm.mask.kept, hidden, context))
    assert torch.equal(llm.run(llm.mask.kept, hidden, context), expected)


def test_packed_trees_in_lanes_are_equal_to_the_bit(llm, two_threads):
    hidden, context, packing = llm.open_packed(TREES)
    parts = cut_stream(hidden, context)
    assert [stream.shape[1] for stream, _context in parts] == [3 + 7 + 7, 12]
    assert torch.equal(join_streams([stream for stream, _context in parts], context), hidden)
    expected = without_lanes(lambda: llm.run(llm.mask.kept, hidden, context))
    assert torch.equal(llm.run(llm.mask.kept, hidden, context), expected)
    assert packing.cut(2) is packing.cut(2), "built once"


def test_masks_in_lanes_are_equal_to_the_bit(llm, two_threads):
    dense = PruningMask.all_kept(llm.shape)
    masks = [dense, dense.drop("layer1.mlp"), dense.drop("layer1.mlp", "layer3.attention"), dense.drop("layer0.mlp")]
    stream = llm.open_stream(IDS)
    expected = without_lanes(lambda: dict(llm.run_masks(masks, *stream)))
    for mask, hidden in llm.run_masks(masks, *stream):
        assert torch.equal(hidden, expected[mask])
