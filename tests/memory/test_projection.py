"""Projections always meet the budget and keep a little of every site; nested ones are nested."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rap_env.components import KINDS, Component, Site
from rap_env.errors import InfeasibleBudget, InvalidConfig, InvalidMask, UnknownName
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.projection import Projection, exact_fractions, nested_order, smallest_width
from rap_env.memory.workload import Workload

ONE_TOKEN = Workload(1, 1)
KINDS_OF_PROJECTION = ("exact", "nested")
SHAPE = build_tiny_llm().shape


def shape_of(*sites: list[tuple[int, int]]):
    """A shape whose sites have parts of (weight bytes, KV bytes per token)."""
    components = []
    for index, parts in enumerate(sites):
        site = Site(index // 2, KINDS[index % 2])
        for part, (weights, kv) in enumerate(parts):
            one = len(parts) == 1
            components.append(
                Component(site.name if one else f"{site.name}.{part}", site, None if one else part, weights, kv)
            )
    return replace(SHAPE, components=tuple(components))


def widths(shape, kind: str, action, free_bytes: int, work: Workload = ONE_TOKEN, **options) -> tuple[int, ...]:
    return Projection(kind, **options).mask(shape, action, work, smallest_bytes(shape, work) + free_bytes).widths


# An attention of 4 parts and an MLP of 10, 100 bytes each; asked for are 200 and 300 bytes.
HAND = shape_of([(100, 0)] * 4, [(100, 0)] * 10)
ASKED = [0.5, -0.3]


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [
        (500, (2, 3)),  # what is asked for
        (900, (3, 6)),  # 400 bytes by headrooms of 200 and 700: fractions 0.722 and 0.611, so 2.89 and 6.11 parts
        (350, (1, 2)),  # 150 from the first: 0.5 parts, rounded to 1; of 1 and 3 parts the MLP has to give one
        (150, (0, 1)),  # 0.4 and 1 parts are too many: below p_min, the one that was rounded up goes
        (0, (0, 0)),
        (1400, (4, 10)),
    ],
)
def test_exact_projection_by_hand(free_bytes, expected):
    assert widths(HAND, "exact", ASKED, free_bytes) == expected


@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [(500, (2, 3)), (900, (4, 5)), (350, (1, 2)), (150, (0, 1)), (0, (0, 0)), (1400, (4, 10))],
)
def test_nested_projection_by_hand(free_bytes, expected):
    # Parts of the attention enter at 0.25, 0.75, 1.25, 1.75 times the fractions, parts of the MLP at 1/6, 3/6, 5/6, ...
    assert widths(HAND, "nested", ASKED, free_bytes) == expected


def test_exact_fractions_take_exactly_the_free_bytes():
    for free_bytes, expected in ((900, (0.5 + 2 / 9, 0.3 + 0.7 * 4 / 9)), (350, (0.125, 0.3)), (300, (0.1, 0.26))):
        fractions = exact_fractions(np.array([0.5, 0.3]), np.array([400, 1000]), free_bytes, 0.1)
        assert fractions == pytest.approx(expected)
        assert 400 * fractions[0] + 1000 * fractions[1] == pytest.approx(free_bytes)


def test_bytes_are_those_of_the_workload():
    # Parts of the attention take 100 bytes of weights and 1 byte for each of 100 cached tokens. 400 + 300 bytes are
    # asked for; 300 more by headrooms of 400 and 700 make 2.55 and 4.91 parts, and 3 and 5 are 100 bytes too many.
    shape = shape_of([(100, 1)] * 4, [(100, 0)] * 10)
    free_bytes = 1000
    for kind, expected in (("exact", (2, 5)), ("nested", (3, 4))):
        assert widths(shape, kind, ASKED, free_bytes, Workload(1, 100)) == expected
        assert sum(n * each for n, each in zip(expected, (200, 100), strict=True)) <= free_bytes
    assert widths(shape, "exact", ASKED, 502) == widths(HAND, "exact", ASKED, 500) == (2, 3), "of one token 2 bytes"


def test_a_site_with_one_part_is_kept_from_one_half_and_keeps_no_minimum():
    shape = shape_of(*([[(100, 0)]] * 4))
    assert widths(shape, "exact", [0.6, 0.6, 0.4, 0.4], 200) == (1, 1, 0, 0)
    assert widths(shape, "exact", [0.45, 0.45, 0.55, 0.55], 200) == (0, 0, 1, 1)
    assert widths(shape, "exact", [0.1, 0.3, 0.2, 0.4], 100) == (0, 0, 0, 1), "0.1 is rounded down, and given back"
    assert widths(shape, "nested", [0.1, 0.3, 0.2, 0.4], 250) == (0, 1, 0, 1)
    assert [smallest_width(n, 0.1) for n in (1, 2, 3, 10, 11, 24, 30)] == [0, 1, 1, 1, 2, 3, 3]


def test_signs_do_not_matter_to_magnitudes_and_do_to_affine_readings():
    assert Projection().fractions([-2.0, 0.5, -0.05], 3).tolist() == [1.0, 0.5, 0.1]
    assert Projection(reading="affine").fractions([-2.0, 0.5, 0.0], 3).tolist() == [0.1, 0.75, 0.5]


part = st.tuples(st.integers(1, 500), st.integers(0, 3))
some_shapes = st.lists(st.lists(part, min_size=1, max_size=12), min_size=2, max_size=8).filter(
    lambda s: len(s) % 2 == 0
)
some_actions = st.lists(st.floats(-3, 3), min_size=8, max_size=8)
loads = st.builds(Workload, st.integers(1, 4), st.integers(1, 300))


@settings(deadline=None, max_examples=150)
@given(some_shapes, some_actions, loads, st.floats(0, 1), st.sampled_from(KINDS_OF_PROJECTION))
def test_every_projection_fits_and_keeps_p_min_where_that_fits(sites, action, work, share, kind):
    shape = shape_of(*sites)
    smallest, dense = smallest_bytes(shape, work), dense_bytes(shape, work)
    budget = smallest + int(share * (dense - smallest))
    action = action[: len(sites)]
    mask = Projection(kind).mask(shape, action, work, budget)
    assert footprint(shape, mask, work).peak_bytes <= budget
    floors = [smallest_width(len(parts), 0.1) for parts in sites]
    if footprint(shape, PruningMask.from_widths(shape, floors), work).peak_bytes <= budget:
        assert all(width >= floor for width, floor in zip(mask.widths, floors, strict=True))
    assert Projection(kind).mask(shape, action, work, dense) == PruningMask.all_kept(shape)
    assert not Projection(kind).mask(shape, action, work, smallest).kept


@settings(deadline=None, max_examples=150)
@given(some_shapes, some_actions, loads, loads, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_nested_masks_of_one_action_are_subsets_of_one_another(sites, action, work, other_work, shares):
    shape, masks = shape_of(*sites), []
    for load, share in zip((work, other_work), shares, strict=True):
        smallest, dense = smallest_bytes(shape, load), dense_bytes(shape, load)
        budget = smallest + int(share * (dense - smallest))
        masks.append(Projection("nested").mask(shape, action[: len(sites)], load, budget).widths)
    smaller, larger = sorted(masks, key=sum)
    assert all(few <= many for few, many in zip(smaller, larger, strict=True))


def test_exact_masks_need_not_be_nested():
    shape = shape_of([(100, 0)] * 10, [(100, 0)] * 10)
    assert widths(shape, "exact", [1.0, 1.0], 1200) == (2, 10)
    assert widths(shape, "exact", [1.0, 1.0], 1000) == (1, 9)
    assert widths(shape, "exact", [0.5, 0.1], 600) == (5, 1) and widths(shape, "exact", [0.5, 0.1], 500) == (4, 1)


@settings(deadline=None, max_examples=50)
@given(some_shapes, some_actions)
def test_dropping_order_walks_down_the_nested_masks(sites, action):
    shape = shape_of(*sites)
    order = Projection("nested").dropping_order(shape, action[: len(sites)])
    mask = PruningMask.all_kept(shape)
    for name in order:
        mask = mask.drop(name)
        assert mask == mask.nested
    assert not mask.kept


def test_parts_below_the_floors_enter_first():
    sites, parts = nested_order(np.array([0.1, 1.0]), np.array([10, 10]), np.array([1, 1]))
    assert (sites[:3].tolist(), parts[:3].tolist()) == ([1, 0, 1], [0, 0, 1])


def test_what_no_projection_can_use_is_refused():
    for action in ([0.5], [0.5] * 3, [0.5, np.nan], [np.inf, 0.5]):
        with pytest.raises(InvalidMask, match="expected 2 finite numbers, one for each site; got"):
            widths(HAND, "exact", action, 500)
    with pytest.raises(InfeasibleBudget, match="no pruning mask fits"):
        widths(HAND, "exact", ASKED, -1)
    with pytest.raises(UnknownName, match="projection 'nestd'; did you mean nested"):
        Projection("nestd")
    with pytest.raises(UnknownName, match="reading of actions 'afine'; did you mean affine"):
        Projection(reading="afine")
    for p_min in (0.0, 1.5, float("nan")):
        with pytest.raises(InvalidConfig, match="p_min: expected a fraction above 0 and at most 1; got"):
            Projection(p_min=p_min)
