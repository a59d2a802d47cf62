"""Trees behind a prefix that is read once, trees that leave a stream, and streams in chunks."""

import pytest
import torch

from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.packing import Packing, SharedPrefix, TokenTree
from rap_env.llm.streams import context_of
from rap_env.mask import kept_sites
from tests.llm.test_packing import CPU, paths_of

PREFIX = (100, 101, 102, 103, 104, 105)
TREES = [
    TokenTree((1,)),
    TokenTree((3, 4, 5)),
    TokenTree((6, 7, 8)),
    TokenTree((1, 2), ((3, 4), (5,))),
    TokenTree(tuple(range(20, 32))),
]


@pytest.fixture(scope="module", params=["llama", "opt", "qwen3", "sliding window"])
def llm(request):
    if request.param != "sliding window":
        return build_tiny_llm(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build_random_llm(
        "mistral", {**sizes, "num_hidden_layers": 4, "vocab_size": 257, "sliding_window": 4, "initializer_range": 0.2}
    )


def open_behind(llm, trees=TREES):
    """The prefix's stream, and that of trees behind it."""
    window = llm.shape.attention_window
    prefix = SharedPrefix(PREFIX, llm.device, window)
    return llm.open_packed(prefix), llm.open_packed(Packing(trees, llm.device, window, prefix))


def behind_positions(llm, packing: Packing, n_rows: int | None = None):
    """The context of trees behind the prefix, out of that of one long sequence."""
    _, context, _ = llm.open_packed([TokenTree(tuple(range(100, 120)))])
    return context_of(context, packing, packing.end if n_rows is None else n_rows)


def run_layer(llm, layer: int, opened, behind):
    sites = [site for site in kept_sites(llm.mask) if site.layer == layer]
    return llm.run(sites, *opened[:2]), [llm.run(sites, *stream) for stream in behind]


@torch.inference_mode()
def test_trees_behind_a_prefix_have_the_logits_of_whole_sequences(llm):
    prefix, (hidden, context, packing) = open_behind(llm)
    assert packing.positions[0] == len(PREFIX)
    for layer in range(4):
        before, (hidden,) = run_layer(llm, layer, prefix, [(hidden, context)])
        prefix = before, prefix[1]
    logits = llm.logits(hidden)[0]
    for tree, start in zip(TREES, packing.starts, strict=True):
        for path in paths_of(tree):
            tokens = [*PREFIX, *(tree.tokens[index] for index in path)]
            plain = llm.model(torch.tensor([tokens])).logits[0, len(PREFIX) :]
            torch.testing.assert_close(logits[[start + index for index in path]], plain, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_what_stays_when_trees_leave_between_layers_is_computed_as_if_nobody_had_left(llm):
    prefix, (hidden, context, packing) = open_behind(llm)
    before, (hidden,) = run_layer(llm, 0, prefix, [(hidden, context)])
    _, (everything,) = run_layer(llm, 1, (before, prefix[1]), [(hidden, context)])
    left = packing.select([1, 3])
    rows = [*range(1, 4), *range(7, 12)]  # by hand: trees 1 and 3 of lengths 1, 3, 3, 5, 12
    assert left.positions.tolist() == [6, 7, 8, 6, 7, 8, 9, 8]
    _, (some,) = run_layer(llm, 1, (before, prefix[1]), [(hidden[:, rows], behind_positions(llm, left))])
    bound = 2e-6 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1e-6
    torch.testing.assert_close(some, everything[:, rows], rtol=0, atol=bound)


@torch.inference_mode()
def test_chunks_compute_what_the_stream_as_a_whole_does(llm):
    prefix, (hidden, context, packing) = open_behind(llm)
    chunks = packing.chunks(4)
    assert [part.end for _, part in chunks] == [4, 3, 5, 12]  # trees of lengths 1, 3 | 3 | 5 | 12
    streams = [(hidden[:, rows], behind_positions(llm, part)) for rows, part in chunks]
    _, (whole, *parts) = run_layer(llm, 0, prefix, [(hidden, context), *streams])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_chunks_that_reach_into_the_next_one_or_behind_the_last_tree_compute_the_same(llm):
    prefix, (hidden, context, packing) = open_behind(llm)
    parts = packing.chunks(4, step=8)
    assert [rows for rows, _ in parts] == [slice(0, 8), slice(4, 12), slice(7, 15), slice(12, 28)]
    longer = torch.nn.functional.pad(hidden, (0, 0, 0, 7))
    streams = [(longer[:, rows], behind_positions(llm, part, rows.stop - rows.start)) for rows, part in parts]
    _, (whole, *read) = run_layer(llm, 0, prefix, [(hidden, context), *streams])
    own = [part[:, : packed.end] for part, (_, packed) in zip(read, parts, strict=True)]
    torch.testing.assert_close(torch.cat(own, 1), whole, rtol=0, atol=1e-5)


def test_a_stream_of_one_tree_can_be_selected_and_cut():
    packing = Packing([TokenTree((1, 2))], CPU).select([0])
    assert packing.tokens.tolist() == [1, 2] and [part for part, _ in packing.chunks(1)] == [slice(0, 2)]


def test_a_prefix_has_to_be_read_before_what_stands_behind_it():
    prefix = SharedPrefix(PREFIX, CPU)
    states = torch.zeros(1, 1, 1, 2)
    with pytest.raises(AssertionError, match="read the prefix first"):
        Packing([TokenTree((1,))], CPU, None, prefix).attend(states, states, states, None)
