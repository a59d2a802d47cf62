"""Many masks over one stream: exactly what each gives alone, and what they share in front is run once."""

import collections
import math
import random
import weakref

import pytest
import torch

from rap_env.errors import InvalidMask
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.held import HeldStreams
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.mask import PruningMask, kept_sites

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
    """The residual stream in front of the first site, and its context."""
    return llm.open_packed(TREES)[:2] if request.param == "packed" else llm.open_stream(WINDOWS)


@pytest.fixture
def executions(monkeypatch) -> list[str]:
    """The kinds of all sites that are run, in order."""
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


def edges(masks) -> set[tuple[bool, ...]]:
    """Distinct beginnings of the keep-bits that end with a kept site: each has to be run once, and no more."""
    return {mask.keep[: end + 1] for mask in masks for end in range(len(mask.keep)) if mask.keep[end]}


def assert_equal_to_each_alone(llm, masks, hidden, context, held=None) -> None:
    results = list(llm.run_masks(masks, hidden, context, held))
    assert sorted(mask.keep for mask, _ in results) == sorted(mask.keep for mask in masks), "each mask once"
    for mask, stream in results:
        kept = [component.site for component in llm.shape.components if mask.keeps(component)]
        assert torch.equal(stream, llm.run(kept, hidden, context))


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_give_exactly_what_each_gives_alone(llm, stream, seed):
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
            upstreams = llm.model(WINDOWS).logits
        tolerance = 0.1 if llm.dtype == torch.bfloat16 else 0.0  # see rap_env.llm.kernels
        torch.testing.assert_close(llm.logits(stream), upstreams, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_held_streams_give_exactly_what_each_mask_gives_alone(llm, stream, seed):
    held, everything = HeldStreams(llm, *stream), special_masks(llm.shape) + random_masks(llm.shape, 12, seed)
    for near in everything[:6]:  # from call to call the held mask moves, forwards and backwards
        held.move_to(near)
        assert_equal_to_each_alone(llm, dict.fromkeys([near, *everything]), *stream, held=held)


@pytest.mark.parametrize(
    ("held_bits", "bits"),
    [
        ("11111111", "01111111"),  # they part at site 0,
        ("11011011", "11011010"),  # at the last one,
        ("11011011", "11011011"),  # or nowhere: the held mask itself
        ("00000000", "00000000"),
        ("00000000", "00000001"),
        ("00001111", "10001111"),
    ],
)
def test_a_mask_starts_where_it_parts_from_the_held_one(tiny_llm, executions, held_bits, bits):
    stream = tiny_llm.open_packed(TREES)[:2]
    held_mask, mask = mask_of(tiny_llm.shape, held_bits), mask_of(tiny_llm.shape, bits)
    held = HeldStreams(tiny_llm, *stream)
    held.move_to(held_mask)
    list(tiny_llm.run_masks([held_mask], *stream, held=held))
    assert len(executions) == len(held_mask.kept)
    executions.clear()
    ((_, result),) = tiny_llm.run_masks([mask], *stream, held=held)
    parted = next((site for site in range(8) if held_bits[site] != bits[site]), 8)
    assert len(executions) == bits[parted:].count("1")
    assert torch.equal(result, tiny_llm.run(kept_sites(mask), *stream))


def test_held_streams_are_run_no_further_than_asked_and_kept_as_far_as_they_stay_true(tiny_llm, executions):
    stream = tiny_llm.open_stream(WINDOWS)
    held = HeldStreams(tiny_llm, *stream)
    assert executions == [] and torch.equal(held.first, stream[0])
    site, _ = held.in_front_of_parting(mask_of(tiny_llm.shape, "11110111"))
    assert (site, len(executions)) == (4, 4)
    held.in_front_of_parting(mask_of(tiny_llm.shape, "11011111"))
    assert len(executions) == 4, "an earlier site costs nothing more"
    held.move_to(mask_of(tiny_llm.shape, "11101111"))
    executions.clear()
    site, in_front = held.in_front_of_parting(mask_of(tiny_llm.shape, "11101110"))
    assert (site, len(executions)) == (7, 3), "sites 4 to 6, for the first three were held and site 3 is dropped"
    kept = kept_sites(mask_of(tiny_llm.shape, "11101110"))
    assert torch.equal(in_front, tiny_llm.run(kept, *stream))


def test_masks_of_another_model_can_not_be_held(tiny_llm):
    held = HeldStreams(tiny_llm, *tiny_llm.open_stream(WINDOWS))
    with pytest.raises(InvalidMask, match="over the 8 components of random-llama; got one over 4 others"):
        held.move_to(PruningMask.all_kept(build_tiny_llm(n_layers=2).shape))


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


def test_masks_that_differ_in_the_last_site_share_all_others(tiny_llm, executions):
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
        ["1" * n + "0" * (8 - n) for n in range(8)],  # one mask parts from all others at each site: by dropping,
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
def test_masks_of_the_embedded_model_give_exactly_what_each_gives_alone(embedded_llm):
    dense = PruningMask.all_kept(embedded_llm.shape)
    dropped = [(), ("layer29.mlp",), ("layer8.attention",), ("layer8.attention", "layer20.mlp")]
    masks, stream = [dense.drop(*names) for names in dropped], embedded_llm.open_packed(TREES)[:2]
    assert_equal_to_each_alone(embedded_llm, masks, *stream)
    held = HeldStreams(embedded_llm, *stream)
    for near in masks[1:]:
        held.move_to(near)
        assert_equal_to_each_alone(embedded_llm, masks, *stream, held=held)
