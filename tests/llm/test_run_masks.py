"""Many masks over one stream: to the bit what each gives alone, and what they share in front is run once."""

import collections
import math
import random
import weakref

import pytest
import torch

from rap_env.errors import InvalidMask
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.mask import PruningMask

TREES = [TokenTree((9, 8, 7)), TokenTree((1, 2), ((3,), (4, 5))), TokenTree((6, 7, 8), ((9,), (10, 11)))]
WINDOWS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "opt"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request, family):
    return build_tiny_llm(family, dtype=request.param)


@pytest.fixture(params=["packed", "windows"])
def stream(request, llm) -> tuple[torch.Tensor, dict]:
    """The residual stream in front of the first component, and its context."""
    return llm.open_packed(TREES)[:2] if request.param == "packed" else llm.open_stream(WINDOWS)


@pytest.fixture
def executions(monkeypatch) -> list[str]:
    """The kinds of all components that are run, in order."""
    run, kinds = DecoderLayer.run, []

    def count(self, kind, hidden, context):
        kinds.append(kind)
        return run(self, kind, hidden, context)

    monkeypatch.setattr(DecoderLayer, "run", count)
    return kinds


def mask_of(shape, bits: str) -> PruningMask:
    return PruningMask.from_bits(shape, [int(bit) for bit in bits])


def random_masks(shape, n: int, seed: int) -> list[PruningMask]:
    rng, n_bits = random.Random(seed), len(shape.components)
    return [mask_of(shape, f"{code:0{n_bits}b}") for code in rng.sample(range(2**n_bits), n)]


def special_masks(shape) -> list[PruningMask]:
    """Everything dropped, everything kept, and masks that are equal up to the last bit."""
    return [mask_of(shape, bits) for bits in ("00000000", "11111111", "11111110", "00000001", "01101010", "01101011")]


def edges(masks, start: int = 0) -> set[tuple[bool, ...]]:
    """Distinct beginnings of the keep-bits that end with a kept component: each has to be run once, and no more."""
    return {mask.keep[start : end + 1] for mask in masks for end in range(start, len(mask.keep)) if mask.keep[end]}


def assert_equal_to_each_alone(llm, masks, hidden, context, start: int = 0) -> None:
    results = list(llm.run_masks(masks, hidden, context, start))
    assert sorted(mask.keep for mask, _ in results) == sorted(mask.keep for mask in masks), "each mask once"
    for mask, stream in results:
        kept = [component for component in llm.shape.components[start:] if mask.keeps(component)]
        assert torch.equal(stream, llm.run(kept, hidden, context))


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_give_to_the_bit_what_each_gives_alone(llm, stream, seed):
    masks = random_masks(llm.shape, 3 + 5 * seed, seed)
    before = stream[0].clone()
    assert_equal_to_each_alone(llm, masks, *stream)
    assert torch.equal(stream[0], before), "the stream in front is not written to"


def test_masks_that_part_first_last_or_nowhere_give_what_each_gives_alone(llm, stream):
    masks = special_masks(llm.shape)
    assert_equal_to_each_alone(llm, masks, *stream)
    for mask in masks:
        assert_equal_to_each_alone(llm, [mask], *stream)
    results = dict(llm.run_masks(masks, *stream))
    assert torch.equal(results[masks[0]], stream[0]), "with everything dropped nothing is added to the stream"
    assert len({tuple(result.flatten().tolist()) for result in results.values()}) == len(masks)


def test_results_equal_the_switched_models_forward(llm):
    masks = special_masks(llm.shape) + random_masks(llm.shape, 6, seed=9)
    for mask, stream in llm.run_masks(dict.fromkeys(masks), *llm.open_stream(WINDOWS)):
        with llm.pruned(mask):
            assert torch.equal(llm.logits(stream), llm.model(WINDOWS).logits)


@pytest.mark.parametrize("start", [1, 4, 7, 8])
def test_from_a_later_start_the_bits_in_front_are_taken_as_done(llm, stream, start, executions):
    embedded, context = stream
    hidden = llm.run(llm.shape.components[:start:2], embedded, context)
    masks = random_masks(llm.shape, 12, seed=start)  # they differ in front of the start, too
    executions.clear()
    assert len(list(llm.run_masks(masks, hidden, context, start))) == 12
    assert len(executions) == len(edges(masks, start))
    assert_equal_to_each_alone(llm, masks, hidden, context, start)


@pytest.mark.parametrize("n", [1, 2, 9, 40, 256])
def test_what_masks_share_in_front_is_run_once(tiny_llm, executions, n):
    masks, before = random_masks(tiny_llm.shape, n, seed=n), tiny_llm.site_executions
    assert len(list(tiny_llm.run_masks(masks, *tiny_llm.open_packed(TREES)[:2]))) == n
    assert len(executions) == len(edges(masks)) <= sum(len(mask.kept) for mask in masks)
    assert tiny_llm.site_executions - before == len(executions)


def test_all_masks_of_a_model_need_one_run_for_each_inner_node_of_the_tree(tiny_llm, executions):
    masks = random_masks(tiny_llm.shape, 256, seed=0)
    assert len(list(tiny_llm.run_masks(masks, *tiny_llm.open_stream(WINDOWS)))) == 256
    assert len(executions) == 1 + 2 + 4 + 8 + 16 + 32 + 64 + 128


def test_masks_that_differ_in_the_last_component_share_all_others(tiny_llm, executions):
    masks = [mask_of(tiny_llm.shape, bits) for bits in ("11011011", "11011010")]
    list(tiny_llm.run_masks(masks, *tiny_llm.open_stream(WINDOWS)))
    assert len(executions) == 6


def test_each_mask_is_given_as_soon_as_it_is_known(tiny_llm, executions):
    done = []
    for mask, _ in tiny_llm.run_masks(random_masks(tiny_llm.shape, 30, seed=2), *tiny_llm.open_stream(WINDOWS)):
        done.append(mask)
        assert len(executions) == len(edges(done))
    assert len(done) == 30


@pytest.mark.parametrize(
    "bits",
    [
        ["1" * n + "0" * (8 - n) for n in range(8)],  # one mask parts from all others at each component: by dropping,
        ["0" * n + "1" * (8 - n) for n in range(8)],  # by keeping,
        ["01" * 4, "10" * 4, *("0" * n + "10" + "0" * (6 - n) for n in range(6))],  # or by either
        [f"{code:08b}" for code in range(256)],
    ],
)
def test_no_more_streams_are_held_than_the_logarithm_of_the_number_of_masks(tiny_llm, monkeypatch, bits):
    run, results, alive = DecoderLayer.run, [], []

    def watch(self, kind, hidden, context):
        alive.append(sum(result() is not None for result in results))
        result = run(self, kind, hidden, context)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(DecoderLayer, "run", watch)
    masks = [mask_of(tiny_llm.shape, mask_bits) for mask_bits in bits]
    collections.deque(tiny_llm.run_masks(masks, *tiny_llm.open_stream(WINDOWS)), maxlen=0)  # keeps no result
    assert len(alive) == len(edges(masks))
    assert max(alive) <= 1 + math.log2(len(masks))  # what is held, and what is read


def test_the_applied_mask_does_not_matter_and_stays(tiny_llm):
    masks = random_masks(tiny_llm.shape, 8, seed=3)
    expected = dict(tiny_llm.run_masks(masks, *tiny_llm.open_packed(TREES)[:2]))
    applied = mask_of(tiny_llm.shape, "00110101")
    with tiny_llm.pruned(applied):
        results = dict(tiny_llm.run_masks(masks, *tiny_llm.open_packed(TREES)[:2]))
        assert tiny_llm.mask == applied
    assert all(torch.equal(results[mask], expected[mask]) for mask in masks)


def test_no_masks_run_nothing(tiny_llm, executions):
    assert list(tiny_llm.run_masks([], *tiny_llm.open_stream(WINDOWS))) == []
    assert executions == []


def test_a_mask_of_another_model_is_refused_before_anything_is_run(tiny_llm, executions):
    foreign = PruningMask.all_kept(build_tiny_llm(n_layers=2).shape)
    masks = [PruningMask.all_kept(tiny_llm.shape), foreign]
    with pytest.raises(InvalidMask, match="over the 8 components of random-llama; got one over 4 others"):
        next(tiny_llm.run_masks(masks, *tiny_llm.open_stream(WINDOWS)))
    assert executions == []
    tiny_llm.check(masks[0])
    with pytest.raises(InvalidMask, match="got one over 4 others"):
        tiny_llm.check(foreign)


@pytest.mark.llm
def test_masks_of_the_embedded_model_give_to_the_bit_what_each_gives_alone(embedded_llm):
    dense = PruningMask.all_kept(embedded_llm.shape)
    dropped = [(), ("layer29.mlp",), ("layer8.attention",), ("layer8.attention", "layer20.mlp")]
    masks = [dense.drop(*names) for names in dropped]
    assert_equal_to_each_alone(embedded_llm, masks, *embedded_llm.open_packed(TREES)[:2])
