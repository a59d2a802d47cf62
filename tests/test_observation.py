"""Observations are pure functions of scenario, mask and order; the numbers here are worked out by hand."""

import math

import numpy as np
import pytest

from rap_env.components import ATTENTION, MLP, Component, Site
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.observation import observation_space, observe, valid_actions


@pytest.fixture
def shape() -> ModelShape:
    """Two layers; an attention weighs 200 bytes and caches 8 for each token, an MLP weighs 400, 1000 bytes stay."""
    components = tuple(
        Component(f"layer{layer}.{kind}", Site(layer, kind), None, weight_bytes, kv_bytes)
        for layer in range(2)
        for kind, weight_bytes, kv_bytes in ((ATTENTION, 200, 8), (MLP, 400, 0))
    )
    return ModelShape(
        model_type="llama",
        hidden_size=8,
        intermediate_size=16,
        query_channels=8,
        kv_channels=4,
        vocab_size=16,
        context_tokens=1024,
        attention_window=None,
        bytes_per_parameter=1,
        fixed_bytes=1000,
        components=components,
    )


ORDER = ("layer1.mlp", "layer0.attention", "layer1.attention", "layer0.mlp")
# 2 sequences of 25 tokens: each attention holds 8 bytes * 50 tokens = 400 bytes of cache.
# Dense: 1000 + 2 * (200 + 400) weights and 2 * 400 cache = 3000. Freed: attention 200 + 400 = 600, MLP 400.
SCENARIO = Scenario(Workload(2, 20, 5), budget_bytes=2400)


def test_entries_of_the_dense_mask_by_hand(shape):
    seen = observe(shape, SCENARIO, PruningMask.all_kept(shape), ORDER)
    assert seen["memory_budget"] == pytest.approx([0.8])
    assert seen["batch_size"] == pytest.approx([0.1])  # log2(2) / log2(1024)
    assert seen["sequence_length"] == pytest.approx([math.log2(25) / 10])
    assert seen["gsi_ranking"] == pytest.approx([1 / 3, 1, 2 / 3, 0])
    assert seen["kept"].tolist() == [1, 1, 1, 1]
    assert seen["footprint"] == pytest.approx([1.0])
    assert seen["component_bytes"] == pytest.approx([0.2, 0.4 / 3, 0.2, 0.4 / 3])


def test_dropping_changes_kept_and_footprint_only(shape):
    dense = PruningMask.all_kept(shape)
    before = observe(shape, SCENARIO, dense, ORDER)
    after = observe(shape, SCENARIO, dense.drop("layer0.attention", "layer1.mlp"), ORDER)
    assert after["kept"].tolist() == [0, 1, 1, 0]
    assert after["footprint"] == pytest.approx([2000 / 3000])
    assert all(np.array_equal(before[name], after[name]) for name in before if name not in ("kept", "footprint"))


def test_footprint_of_nothing_kept_is_what_can_not_be_dropped(shape):
    nothing = PruningMask.from_bits(shape, [0, 0, 0, 0])
    assert observe(shape, SCENARIO, nothing, ORDER)["footprint"] == pytest.approx([1000 / 3000])


def test_every_mask_is_observed_within_the_space_and_in_its_types(shape):
    space = observation_space(shape)
    for number in range(16):
        mask = PruningMask.from_bits(shape, [number >> position & 1 for position in range(4)])
        seen = observe(shape, SCENARIO, mask, ORDER)
        assert space.contains(seen)
        assert {name: entry.dtype for name, entry in seen.items()} == {
            name: part.dtype for name, part in space.spaces.items()
        }


def test_extremes_are_clipped_into_the_space(shape):
    space = observation_space(shape)
    dense = PruningMask.all_kept(shape)
    for scenario in (Scenario(Workload(5000, 1), 10**12), Scenario(Workload(1, 1), 1), Scenario(Workload(1, 1024), 0)):
        assert space.contains(observe(shape, scenario, dense, ORDER))
    assert observe(shape, Scenario(Workload(5000, 1), 10**12), dense, ORDER)["batch_size"] == [1.0]


def test_smallest_batch_and_whole_context_are_the_ends_of_their_scales(shape):
    seen = observe(shape, Scenario(Workload(1, 1024), 10**6), PruningMask.all_kept(shape), ORDER)
    assert (seen["batch_size"].item(), seen["sequence_length"].item()) == (0.0, 1.0)


def test_observations_own_their_arrays(shape):
    dense = PruningMask.all_kept(shape)
    spoilt = observe(shape, SCENARIO, dense, ORDER)
    for entry in spoilt.values():
        entry[...] = 0
    assert observe(shape, SCENARIO, dense, ORDER)["component_bytes"] == pytest.approx([0.2, 0.4 / 3, 0.2, 0.4 / 3])


def test_order_sets_the_ranks(shape):
    seen = observe(shape, SCENARIO, PruningMask.all_kept(shape), ORDER[::-1])
    assert seen["gsi_ranking"] == pytest.approx([2 / 3, 0, 1 / 3, 1])


@pytest.mark.parametrize(
    ("kept", "fits", "expected"),
    [
        ([1, 1, 1], False, [True, True, True, False]),
        ([1, 0, 1], False, [True, False, True, False]),
        ([1, 0, 1], True, [False, False, False, True]),
        ([0, 0, 0], False, [False, False, False, True]),  # nothing else is left to do
    ],
)
def test_kept_components_may_be_dropped_until_the_mask_fits_and_then_only_stopping_is_left(kept, fits, expected):
    allowed = valid_actions(np.array(kept), fits)
    assert allowed.dtype == bool
    assert allowed.tolist() == expected
