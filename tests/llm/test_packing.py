"""Packed token trees are attended to as if every branch alone followed its context, and leave no trace."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rap_env.components import Site
from rap_env.llm.loading import build_random_llm, build_tiny_llm
from rap_env.llm.packing import PACKED_ATTENTION, Packing, TokenTree
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rng import isolated_rng

CPU = torch.device("cpu")
SMALL = TokenTree((5, 6), ((7, 8), (9,)))
TREES = [
    TokenTree((1,)),
    TokenTree((2,), ((3,),)),
    TokenTree((4, 5)),
    TokenTree((1, 2, 3, 4, 5)),
    TokenTree((1, 2), ((3, 4), (5,))),
    TokenTree((9,), ((8,), (7,), (6,), (5,))),
    TokenTree((1, 2, 3), ((4, 5, 6, 7), (8, 9), (4,))),
    TokenTree(tuple(range(20, 32))),
    TokenTree(tuple(range(40, 52))),
]


def paths_of(tree: TokenTree) -> list[list[int]]:
    """For each sequence that a tree stands for, where its tokens lie in the tree."""
    trunk, end = list(range(len(tree.context))), len(tree.context)
    paths = [trunk]
    for branch in tree.branches:
        paths.append([*trunk, *range(end, end + len(branch))])
        end += len(branch)
    return paths


def visible_by_hand(tree: TokenTree, window: int | None) -> set[tuple[int, int]]:
    """Pairs (token, token that it may attend to), collected sequence by sequence."""
    return {
        (path[here], path[there])
        for path in paths_of(tree)
        for here in range(len(path))
        for there in range(here + 1)
        if window is None or here - there < window
    }


def visible_in(trees: list[TokenTree], window: int | None) -> torch.Tensor:
    """Where attention weights are not zero [N, N]: equal scores spread over all that is seen, unit values show it."""
    packing = Packing(trees, CPU, window)
    n = len(packing.tokens)
    zeros = torch.zeros(1, 1, n, n)
    return packing.attend(zeros, zeros, torch.eye(n)[None, None], None)[0, :, 0] > 0


def attention_of_sequence(query, key, value, window, scale) -> torch.Tensor:
    """Plain causal attention of one sequence, written out, [heads, T, size] each; key and value have fewer heads."""
    repeats, length = len(query) // len(key), query.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 0).double() for tensor in (key, value))
    back = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (back < 0) | (back >= (window or length))
    scores = (query.double() @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def test_a_tree_lists_the_context_then_the_branches():
    tree = TokenTree((5, 6, 7), ((8,), (9, 10)))
    assert len(tree) == 6
    assert tree.tokens == [5, 6, 7, 8, 9, 10]
    assert tree.positions == [0, 1, 2, 3, 3, 4]
    assert tree.segments == [0, 0, 0, 1, 2, 2]


def test_a_tree_without_branches_is_a_plain_sequence():
    tree = TokenTree((5, 6, 7))
    assert (len(tree), tree.tokens, tree.positions, tree.segments) == (3, [5, 6, 7], [0, 1, 2], [0, 0, 0])


def test_packed_trees_lie_end_to_end():
    packing = Packing([TokenTree((1, 2)), TokenTree((3,), ((4,),)), SMALL], CPU)
    assert packing.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert packing.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2]
    assert packing.starts == [0, 2, 4]


def test_a_branch_sees_the_context_and_itself_only():
    rows = ["10000", "11000", "11100", "11110", "11001"]  # tokens 5 6 | 7 8 | 9
    assert visible_in([SMALL], None).int().tolist() == [[int(bit) for bit in row] for row in rows]
    narrow = ["10000", "11000", "01100", "00110", "01001"]  # each sees two tokens of its sequence, itself included
    assert visible_in([SMALL], 2).int().tolist() == [[int(bit) for bit in row] for row in narrow]


@pytest.mark.parametrize("window", [None, 1, 2, 4, 12, 100])
def test_what_is_visible_is_what_the_sequences_one_by_one_would_see(window):
    expected, start = set(), 0
    for tree in TREES:
        expected |= {(start + here, start + there) for here, there in visible_by_hand(tree, window)}
        start += len(tree)
    assert {tuple(pair) for pair in visible_in(TREES, window).nonzero().tolist()} == expected


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_packed_attention_equals_attention_of_each_sequence(window, scale, key_heads):
    generator, n, size = torch.Generator().manual_seed(0), sum(map(len, TREES)), 8
    query = torch.randn(1, 4, n, size, generator=generator)
    key, value = torch.randn(2, 1, key_heads, n, size, generator=generator)
    attended = Packing(TREES, CPU, window).attend(query, key, value, scale)
    assert attended.shape == (1, n, 4, size)
    start = 0
    for tree in TREES:
        for path in paths_of(tree):
            where = [start + index for index in path]
            parts = [tensor[0, :, where] for tensor in (query, key, value)]
            expected = attention_of_sequence(*parts, window, size**-0.5 if scale is None else scale)
            actual = attended[0, where].transpose(0, 1).double()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        start += len(tree)


@pytest.fixture(scope="module", params=["llama", "opt", "qwen2", "qwen3", "mistral", "sliding window"])
def llm(request):
    if request.param != "sliding window":
        return build_tiny_llm(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build_random_llm(
        "mistral", {**sizes, "num_hidden_layers": 4, "vocab_size": 257, "sliding_window": 4, "initializer_range": 0.2}
    )


def random_trees() -> list[TokenTree]:
    rng = random.Random(0)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(rng.randint(1, longest)))

    trees = [TokenTree(tokens(12), tuple(tokens(5) for _ in range(rng.randint(0, 4)))) for _ in range(12)]
    return sorted([*trees, trees[3], TokenTree(trees[3].context)], key=len)


@torch.inference_mode()
def test_a_packed_stream_has_the_logits_of_each_sequence(llm):
    trees = random_trees()
    hidden, context, packing = llm.open_packed(trees)
    assert hidden.shape == (1, sum(map(len, trees)), 32)
    logits = llm.logits(llm.run(llm.shape.sites, hidden, context))[0]
    for tree, start in zip(trees, packing.starts, strict=True):
        for path in paths_of(tree):
            plain = llm.model(torch.tensor([[tree.tokens[index] for index in path]])).logits[0]
            torch.testing.assert_close(logits[[start + index for index in path]], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "max_window_layers",
    [
        0,
        4,
    ],
)
@torch.inference_mode()
def test_a_window_counts_only_where_the_layers_slide(max_window_layers):
    config = AutoConfig.for_model(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=max_window_layers,  # layers from here on slide: all four, or none
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vocab_size=257,
        initializer_range=0.2,
    )
    with isolated_rng(0):
        llm = SwitchableLLM(AutoModelForCausalLM.from_config(config), None, "qwen2")
    hidden, context, _ = llm.open_packed([TokenTree(tuple(range(20)))])
    packed = llm.logits(llm.run(llm.shape.sites, hidden, context))
    torch.testing.assert_close(packed, llm.model(torch.arange(20)[None]).logits, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_trees_do_not_feel_what_they_are_packed_with(llm):
    trees = random_trees()
    hidden, context, packing = llm.open_packed(trees)
    together = llm.run(llm.shape.sites, hidden, context)[0]
    for tree, start in zip(trees, packing.starts, strict=True):
        hidden, context, _ = llm.open_packed([tree])
        alone = llm.run(llm.shape.sites, hidden, context)[0]
        torch.testing.assert_close(together[start : start + len(tree)], alone, rtol=0, atol=2e-5)


def test_the_models_own_attention_and_config_are_never_changed_by_a_packed_stream(llm):
    config, seen = llm.model.config, []
    layer = (llm.model.model.decoder if llm.shape.model_type == "opt" else llm.model.model).layers[0]
    before, state = layer.self_attn, dict(vars(layer.self_attn))
    probe = layer.self_attn.register_forward_hook(
        lambda module, *_: seen.append((module is before, config._attn_implementation))
    )
    usual = config._attn_implementation
    llm.run([Site(0, "attention")], *llm.open_packed([SMALL])[:2])
    llm.run([Site(0, "attention")], *llm.open_stream(torch.tensor([[1, 2, 3]])))
    probe.remove()
    assert usual != PACKED_ATTENTION and seen == [(False, usual), (True, usual)]
    assert layer.self_attn is before and vars(before) == state


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
@torch.inference_mode()
def test_packed_attention_reads_the_models_own_weights(name):
    llm = build_tiny_llm()
    attention, stream = llm.model.model.layers[0].self_attn, llm.open_packed([SMALL])[:2]
    before = llm.run([Site(0, "attention")], *stream)
    getattr(attention, name).weight.data.mul_(2)  # in place,
    changed = llm.run([Site(0, "attention")], *stream)
    weight = getattr(attention, name).weight
    setattr(attention, name, torch.nn.Linear(*reversed(weight.shape), bias=False).requires_grad_(False))  # or replaced
    replaced = llm.run([Site(0, "attention")], *stream)
    assert not torch.equal(before, changed) and not torch.equal(changed, replaced)


def test_the_model_is_as_before_after_an_exception_in_a_packed_stream(llm):
    def fail(*_):
        raise ZeroDivisionError("in the middle of a packed forward")

    tokens = torch.arange(24).reshape(2, 12)
    before = llm.model(tokens).logits
    hidden, context, _ = llm.open_packed([SMALL])
    layer = (llm.model.model.decoder if llm.shape.model_type == "opt" else llm.model.model).layers[1]
    handle = layer.self_attn.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        llm.run(llm.shape.sites, hidden, context)
    handle.remove()
    assert torch.equal(llm.model(tokens).logits, before)


def test_upstreams_forward_is_exactly_the_same_before_and_after_packed_runs(llm):
    tokens = torch.arange(24).reshape(2, 12)
    padding = torch.ones_like(tokens)
    padding[0, 9:] = 0
    before = [llm.model(tokens).logits, llm.model(tokens, attention_mask=padding).logits]
    hidden, context, _ = llm.open_packed(random_trees())
    first = llm.run(llm.shape.sites, hidden, context)
    after = [llm.model(tokens).logits, llm.model(tokens, attention_mask=padding).logits]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(llm.run(llm.shape.sites, hidden, context), first)
