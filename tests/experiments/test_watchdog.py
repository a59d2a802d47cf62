"""Which limit is in force when one that falls has grace."""

import pytest

from experiments.serving.watchdog import LimitInForce


def in_force(grace_seconds, looks):
    limit = LimitInForce(grace_seconds)
    return [limit.look(seconds, limit_bytes) for seconds, limit_bytes in looks]


def test_a_limit_that_rises_is_in_force_at_once():
    assert in_force(1.0, [(0.0, 5), (0.1, 7), (0.2, 9)]) == [5, 7, 9]


def test_a_limit_that_falls_is_in_force_after_the_grace_and_the_time_to_the_look_before():
    looks = [(0.0, 9), (1.0, 5), (1.9, 5), (2.1, 5), (2.2, 5)]
    assert in_force(1.0, looks) == [9, 9, 9, 9, 5]  # the look at 2.1 judges from 1.9 on, where 9 was still allowed


def test_a_limit_that_rises_in_between_does_not_extend_a_higher_one_from_before():
    looks = [(0.0, 9), (1.0, 3), (1.5, 5), (2.0, 5), (2.1, 5), (2.6, 5)]
    assert in_force(1.0, looks) == [9, 9, 9, 9, 5, 5]


@pytest.mark.parametrize("late", [0.05, 0.5, 5.0])
def test_a_look_that_comes_late_judges_by_the_limit_of_the_look_before(late):
    assert in_force(0.0, [(0.0, 9), (0.01, 9), (0.01 + late, 4), (0.02 + late, 4)]) == [9, 9, 9, 4]


def test_the_limit_in_force_is_the_largest_of_the_time_it_should_cover():
    limits = [(3 * i) % 17 for i in range(60)]
    looks = [(i / 10, limit) for i, limit in enumerate(limits)]
    for got, i in zip(in_force(0.5, looks), range(60), strict=True):
        first = max(0, i - 6)  # 0.5 s before the look before
        assert got == max(limits[first : i + 1])
