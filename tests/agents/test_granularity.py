"""A grain's masks fit their scenario and waste nothing, at the grain's own exactness."""

import numpy as np
import pytest

from agents.grains import GRAINS, Grain, check_known, grains_of
from rap_env.errors import UnknownName
from rap_env.mask import ATTENTION, KINDS, PruningMask
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


def peak_bytes(shape, mask: PruningMask, scenario: Scenario) -> int:
    return footprint(shape, mask, scenario.workload).peak_bytes


def drawn(grain: Grain) -> list[PruningMask]:
    generator = np.random.default_rng(0)
    wishes = (generator.random(len(grain.bits)) < generator.random() for _ in range(30))
    return [grain.mask(grain.repair(wish, generator)) for wish in wishes]


@pytest.mark.parametrize("name", GRAINS)
def test_repaired_masks_fit(name, tiny_llm, grid):
    for scenario in grid:
        for mask in drawn(GRAINS[name](tiny_llm.shape, scenario)):
            assert peak_bytes(tiny_llm.shape, mask, scenario) <= scenario.budget_bytes


def test_blocks_leave_no_room_for_another_component(tiny_llm, grid):
    for scenario in grid:
        for mask in drawn(GRAINS["block"](tiny_llm.shape, scenario)):
            for component in mask.dropped:
                assert peak_bytes(tiny_llm.shape, mask.restore(component), scenario) > scenario.budget_bytes


@pytest.mark.parametrize("name", ["layer", "equal_counts"])
def test_counted_grains_drop_exactly_the_smallest_number_that_fits(name, tiny_llm, grid):
    shape = tiny_llm.shape
    for scenario in grid:
        # what dropping whole layers from the front takes, found by trying
        sizes = [
            peak_bytes(shape, PruningMask.from_bits(shape, [0] * 2 * n + [1] * (8 - 2 * n)), scenario) for n in range(5)
        ]
        smallest = next(n for n, size in enumerate(sizes) if size <= scenario.budget_bytes)
        for mask in drawn(GRAINS[name](shape, scenario)):
            kinds = [component.kind for component in mask.dropped]
            assert [kinds.count(kind) for kind in KINDS] == [smallest, smallest]


def test_layers_go_whole_and_equal_counts_need_not(tiny_llm, grid):
    def layers(mask: PruningMask, kind: str) -> set[int]:
        return {component.layer for component in mask.dropped if component.kind == kind}

    by_layer, by_count = (drawn(GRAINS[name](tiny_llm.shape, grid[-1])) for name in ("layer", "equal_counts"))
    assert all(layers(mask, ATTENTION) == layers(mask, "mlp") for mask in by_layer)
    assert any(layers(mask, ATTENTION) != layers(mask, "mlp") for mask in by_count)


def test_a_vector_that_is_allowed_already_stays(tiny_llm, grid):
    generator = np.random.default_rng(0)
    for name in GRAINS:
        grain = GRAINS[name](tiny_llm.shape, grid[1])
        allowed = grain.random(generator)
        assert np.array_equal(grain.repair(allowed, generator), allowed)


def test_greedy_start_is_the_walk_along_the_importance_order(tiny_llm, grid):
    order = [component.name for component in reversed(tiny_llm.shape.components)]
    for scenario in grid:
        grain = GRAINS["block"](tiny_llm.shape, scenario)
        policy = OrderPolicy(tiny_llm.shape, order)
        assert grain.mask(grain.greedy(order)) == policy.decide(scenario.workload, scenario.budget_bytes)
    layers = GRAINS["layer"](tiny_llm.shape, grid[-1])
    assert layers.greedy(order).tolist() == [True] * (4 - layers.n_dropped) + [False] * layers.n_dropped


def test_with_room_for_everything_everything_is_kept(tiny_llm):
    work = Workload(1, 128)
    for name in GRAINS:
        grain = GRAINS[name](tiny_llm.shape, Scenario(work, dense_bytes(tiny_llm.shape, work)))
        assert set(drawn(grain)) == {PruningMask.all_kept(tiny_llm.shape)}


def test_scenarios_that_allow_the_same_masks_are_one_search(tiny_llm, grid):
    assert len(grains_of("block", tiny_llm.shape, [*grid, *grid])) == 12
    counts = [grain.n_dropped for grain in grains_of("layer", tiny_llm.shape, grid)]
    assert sorted(counts) == sorted(set(counts)) and 1 < len(counts) < 12


def test_an_unknown_grain_is_refused_with_the_known_ones():
    assert check_known("grain", "layer", GRAINS) == "layer"
    with pytest.raises(UnknownName, match="grain 'layers'; did you mean layer"):
        check_known("grain", "layers", GRAINS)
