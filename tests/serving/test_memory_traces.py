"""Memory traces: their values, their playing, and what is refused."""

import numpy as np
import pytest

from rap_env.errors import InvalidConfig, UnknownName
from rap_env.serving.memory_traces import MemoryTrace, constant, memory_trace, random_walk, sawtooth, step
from rap_env.serving.readings import RecordedMemory


def test_a_constant_trace_never_moves():
    assert constant(0.5) == MemoryTrace((0.0,), (0.5,))
    assert constant(0.5).share_at(1e9) == constant(0.5).share_at(-1.0) == 0.5


def test_a_step_falls_at_its_time_and_comes_back():
    trace = step(low=0.4, high=1.0, falls_seconds=2.0, rises_seconds=3.0)
    assert [trace.share_at(seconds) for seconds in (0.0, 1.999, 2.0, 2.999, 3.0, 99.0)] == [
        1.0,
        1.0,
        0.4,
        0.4,
        1.0,
        1.0,
    ]
    assert step(0.4, 1.0, 2.0).share_at(99.0) == 0.4


def test_a_sawtooth_falls_evenly_and_jumps_back():
    trace = sawtooth(low=0.4, high=1.0, period_seconds=4.0, duration_seconds=8.0, every_seconds=1.0)
    assert trace.seconds == tuple(range(8))
    np.testing.assert_allclose(trace.shares, [1.0, 0.8, 0.6, 0.4] * 2)


def test_a_random_walk_starts_high_stays_between_its_bounds_and_depends_on_its_seed():
    trace = random_walk(low=0.4, high=1.0, duration_seconds=1000.0, seed=0)
    assert trace.shares[0] == 1.0 and len(trace.shares) == 1000
    assert 0.4 <= min(trace.shares) < 0.45 and 0.95 < max(trace.shares) <= 1.0
    assert 0.03 < np.diff(trace.shares).std() < 0.06
    assert trace == random_walk(0.4, 1.0, 1000.0, seed=0) != random_walk(0.4, 1.0, 1000.0, seed=1)
    assert set(random_walk(0.7, 0.7, 10.0, seed=0).shares) == {0.7}


def test_a_trace_is_played_as_bytes_and_agrees_with_its_limit():
    trace, now = step(0.4, 1.0, 2.0), [0.0]
    played, limit = RecordedMemory(trace.seconds, trace.n_bytes(1000), lambda: now[0]), trace.limit(1000)
    for now[0], expected in ((0.0, 1000), (1.9, 1000), (2.0, 400), (50.0, 400)):
        assert played() == limit(now[0]) == expected


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"kind": "constant"}, constant(1.0)),
        ({"kind": "step", "low": 0, "high": 1, "falls_seconds": 2, "rises_seconds": None}, step(0, 1, 2)),
        (
            {"kind": "sawtooth", "low": 0.1, "high": 1, "period_seconds": 2, "duration_seconds": 9},
            sawtooth(0.1, 1, 2, 9),
        ),
        ({"kind": "random_walk", "low": 0.1, "high": 1, "duration_seconds": 9, "seed": 4}, random_walk(0.1, 1, 9, 4)),
    ],
)
def test_a_config_names_the_kind_and_its_settings(settings, same):
    assert memory_trace(**settings) == same


def test_an_unknown_kind_lists_the_known_ones():
    known = "unknown memory trace 'saw'; known: constant, random_walk, sawtooth, step"
    with pytest.raises(UnknownName, match=known):
        memory_trace("saw")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "constant", "low": 0.1}, "memory trace constant: expected share; got an unexpected keyword"),
        (
            {"kind": "step", "low": 0.1, "high": 1.0},
            "memory trace step: expected low, high, falls_seconds, rises_seconds; ",
        ),
        ({"kind": "constant", "share": "half"}, "memory trace constant: share: expected a number; got 'half'"),
        ({"kind": "constant", "share": -0.1}, "share: expected at least 0"),
        ({"kind": "constant", "share": float("nan")}, "share"),
        ({"kind": "step", "low": 1.0, "high": 0.5, "falls_seconds": 1}, "high: expected at least 1.0; got 0.5"),
        ({"kind": "step", "low": 0.1, "high": 0.5, "falls_seconds": 0}, "expected times that ascend from 0"),
        ({"kind": "step", "low": 0.1, "high": 0.5, "falls_seconds": 2, "rises_seconds": 1}, "ascend"),
        ({"kind": "sawtooth", "low": 0.1, "high": 1, "period_seconds": 0.1, "duration_seconds": 9}, "period_seconds"),
        ({"kind": "sawtooth", "low": 0.1, "high": 1, "period_seconds": 2, "duration_seconds": 0}, "duration_seconds"),
        ({"kind": "random_walk", "low": 0.1, "high": 1, "duration_seconds": 2e6, "seed": 0}, "at most 1000000 values"),
        (
            {"kind": "random_walk", "low": 0.1, "high": 1, "duration_seconds": 2, "seed": 0, "step_share": -1},
            "step_share",
        ),
    ],
)
def test_settings_that_the_kind_does_not_have_are_refused(settings, problem):
    with pytest.raises(InvalidConfig, match=problem):
        memory_trace(**settings)


def test_a_trace_has_one_share_for_each_time():
    with pytest.raises(InvalidConfig, match="got 2 times and 1 shares"):
        MemoryTrace((0.0, 1.0), (1.0,))
