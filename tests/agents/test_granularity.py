"""A granularity's masks fit their scenario and waste nothing, at the granularity's own exactness."""

import dataclasses

import numpy as np
import pytest

from agents.granularity import GRANULARITIES, Granularity, by_layer, distinct_searches
from rap_env.components import ATTENTION, KINDS, Component
from rap_env.errors import UnknownName, check_known
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


def peak_bytes(shape, mask: PruningMask, scenario: Scenario) -> int:
    return footprint(shape, mask, scenario.workload).peak_bytes


def in_parts(shape, parts: int):
    """The same model with every MLP in several components of equal cost."""
    rows = []
    for row in shape.components:
        n = parts if row.site.kind == "mlp" else 1
        names = [f"{row.name}.{part}" for part in range(n)] if n > 1 else [row.name]
        rows += [
            Component(name, row.site, part, row.weight_bytes // n, row.kv_bytes_per_token)
            for part, name in enumerate(names)
        ]
    return dataclasses.replace(shape, components=tuple(rows))


def drawn(space: Granularity) -> list[PruningMask]:
    generator = np.random.default_rng(0)
    wishes = (generator.random(len(space.bits)) < generator.random() for _ in range(30))
    return [space.mask(space.repair(wish, generator)) for wish in wishes]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_repaired_masks_fit(name, parts, tiny_llm, grid):
    shape = in_parts(tiny_llm.shape, parts)
    for scenario in grid:
        for mask in drawn(GRANULARITIES[name](shape, scenario)):
            assert peak_bytes(shape, mask, scenario) <= scenario.budget_bytes


@pytest.mark.parametrize("parts", [1, 4])
def test_components_leave_no_room_for_another(parts, tiny_llm, grid):
    shape = in_parts(tiny_llm.shape, parts)
    for scenario in grid:
        for mask in drawn(GRANULARITIES["component"](shape, scenario)):
            for component in mask.dropped:
                assert peak_bytes(shape, mask.restore(component), scenario) > scenario.budget_bytes


@pytest.mark.parametrize("name", ["layer", "equal_counts"])
def test_whole_layers_and_equal_counts_drop_exactly_the_smallest_number_that_fits(name, tiny_llm, grid):
    shape = tiny_llm.shape
    for scenario in grid:
        # what dropping whole layers from the front takes, found by trying
        sizes = [
            peak_bytes(shape, PruningMask.from_bits(shape, [0] * 2 * n + [1] * (8 - 2 * n)), scenario) for n in range(5)
        ]
        smallest = next(n for n, size in enumerate(sizes) if size <= scenario.budget_bytes)
        space = GRANULARITIES[name](shape, scenario)
        assert space.key == smallest
        for mask in drawn(space):
            kinds = [component.site.kind for component in mask.dropped]
            assert [kinds.count(kind) for kind in KINDS] == [smallest, smallest]


def test_equal_counts_drop_as_many_layers_worth_of_every_cost(tiny_llm, grid):
    space = GRANULARITIES["equal_counts"](in_parts(tiny_llm.shape, 4), grid[0])
    assert space.key == 1, "a tenth of the bytes is less than a layer's"
    for mask in drawn(space):
        kinds = [component.site.kind for component in mask.dropped]
        assert [kinds.count(kind) for kind in KINDS] == [1, 4]


def test_layers_go_whole_and_equal_counts_need_not(tiny_llm, grid):
    def layers(mask: PruningMask, kind: str) -> set[int]:
        return {component.site.layer for component in mask.dropped if component.site.kind == kind}

    by_layer, by_count = (drawn(GRANULARITIES[name](tiny_llm.shape, grid[-1])) for name in ("layer", "equal_counts"))
    assert all(layers(mask, ATTENTION) == layers(mask, "mlp") for mask in by_layer)
    assert any(layers(mask, ATTENTION) != layers(mask, "mlp") for mask in by_count)


def test_bits_have_the_same_label_where_they_cost_the_same(tiny_llm, grid):
    blocks, layers = (GRANULARITIES[name](tiny_llm.shape, grid[0]) for name in ("component", "layer"))
    attention, mlp = blocks.labels[:2]
    assert attention != mlp and blocks.labels.tolist() == [attention, mlp] * 4
    assert len(set(layers.labels)) == 1
    thinner = [
        dataclasses.replace(row, weight_bytes=row.weight_bytes // 2) if row.name == "layer2.mlp" else row
        for row in tiny_llm.shape.components
    ]
    uneven = GRANULARITIES["layer"](dataclasses.replace(tiny_llm.shape, components=tuple(thinner)), grid[0])
    assert uneven.labels[2] not in uneven.labels[[0, 1, 3]] and len(set(uneven.labels[[0, 1, 3]])) == 1


def test_a_vector_that_is_allowed_already_stays(tiny_llm, grid):
    generator = np.random.default_rng(0)
    for space in (GRANULARITIES[name](tiny_llm.shape, grid[1]) for name in GRANULARITIES):
        allowed = space.random(generator)
        assert np.array_equal(space.repair(allowed, generator), allowed)


def test_greedy_start_is_the_walk_along_the_importance_order(tiny_llm, grid):
    order = [component.name for component in reversed(tiny_llm.shape.components)]
    for scenario in grid:
        space = GRANULARITIES["component"](tiny_llm.shape, scenario)
        policy = OrderPolicy(tiny_llm.shape, order)
        assert space.mask(space.greedy(order)) == policy.decide(scenario.workload, scenario.budget_bytes)
    layers = GRANULARITIES["layer"](tiny_llm.shape, grid[-1])
    assert layers.greedy(order).tolist() == [True] * (4 - layers.key) + [False] * layers.key


def test_with_room_for_everything_everything_is_kept(tiny_llm):
    work = Workload(1, 128)
    for name in GRANULARITIES:
        space = GRANULARITIES[name](tiny_llm.shape, Scenario(work, dense_bytes(tiny_llm.shape, work)))
        assert set(drawn(space)) == {PruningMask.all_kept(tiny_llm.shape)}


def test_scenarios_that_allow_the_same_masks_are_one_search(tiny_llm, grid):
    assert len(distinct_searches("component", tiny_llm.shape, [*grid, *grid])) == 12
    # 96 tokens: all components free the same bytes, 12 % of the model's; so do all layers, at any length.
    equal = scenario_grid(tiny_llm.shape, [(1, 96), (2, 48)], [0.9, 0.8])
    assert len(distinct_searches("component", tiny_llm.shape, equal)) == 2
    counts = [space.key for space in distinct_searches("layer", tiny_llm.shape, grid)]
    assert sorted(counts) == sorted(set(counts)) and 1 < len(counts) < 12


def test_an_unknown_name_is_refused_with_the_known_ones():
    assert check_known("granularity", "layer", GRANULARITIES) == "layer"
    with pytest.raises(UnknownName, match="granularity 'layers'; did you mean layer"):
        check_known("granularity", "layers", GRANULARITIES)


def test_whole_layers_hold_their_components_in_model_order(tiny_llm):
    layers = by_layer(tiny_llm.shape.components)
    assert [[c.name for c in layer] for layer in layers] == [[f"layer{i}.attention", f"layer{i}.mlp"] for i in range(4)]
    assert by_layer(()) == []
