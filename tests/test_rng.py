"""Foreign code can't touch our random streams, and a seed fixes all of them."""

import copy
import random

import numpy as np
import pytest
import torch

from rap_env.rng import isolated_rng, seed_everything


@pytest.fixture(autouse=True)
def own_streams():
    """Lets these tests seed and draw; puts the streams of the test run back."""
    states = copy.deepcopy((random.getstate(), np.random.get_state(), torch.get_rng_state()))
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_seeding_fixes_python_numpy_and_torch():
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = draw()
    seed_everything(7)
    assert draw() == expected
    seed_everything(8)
    assert all(ours != theirs for ours, theirs in zip(draw(), expected, strict=True))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 5, 2**63])
def test_seeds_beyond_numpys_32_bits_are_taken(seed):
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first


def test_the_streams_go_on_as_if_the_isolated_code_had_not_run():
    seed_everything(0)
    draw()
    expected = draw()
    seed_everything(0)
    draw()  # leaves the spare value of both `gauss` in place, which must survive too
    with isolated_rng():
        seed_everything(123)
        draw()
    assert draw() == expected


def test_the_streams_are_restored_when_the_body_raises():
    seed_everything(0)
    expected = draw()
    seed_everything(0)
    with pytest.raises(KeyError, match="body"), isolated_rng(5):
        draw()
        raise KeyError("body")
    assert draw() == expected


def test_isolation_with_a_seed_gives_the_body_the_same_draws_each_time():
    seed_everything(99)
    expected = draw()
    bodies = []
    for _ in range(2):
        with isolated_rng(99):
            bodies.append(draw())
    assert bodies == [expected, expected]


def test_isolation_without_a_seed_goes_on_from_the_present_state():
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    with isolated_rng():
        inside = draw()
    assert inside == expected == draw()


def test_isolation_nests():
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with isolated_rng(2):
        outer = draw()
        with isolated_rng(2):
            assert draw() == outer
    assert draw() == expected
