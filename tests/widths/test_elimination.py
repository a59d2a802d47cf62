"""Elimination: what it says each input costs is what least squares lose, computed another way."""

import pytest
import torch

from rap_env.errors import CompensationFailed
from rap_env.widths.elimination import eliminate
from tests.widths.test_compensation import drawn

NEARLY_NONE = 1e-12  # of a ridge
SIZES = [(1, 1), (1, 4), (1, 5), (3, 1), (4, 2)]  # inputs that go together, and how many such groups in a step


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def least_error(weight: torch.Tensor, inputs: torch.Tensor, kept: list[int]) -> float:
    """Summed over outputs, mean over tokens: what the best matrix over some inputs misses of the dense outputs."""
    dense = inputs @ weight.T
    fitted = inputs[:, kept] @ torch.linalg.lstsq(inputs[:, kept], dense).solution if kept else torch.zeros_like(dense)
    return (dense - fitted).square().sum().item() / len(inputs)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_the_first_to_go_is_the_one_without_which_least_squares_lose_least(weight, size):
    inputs = drawn(64).double()
    order, costs = eliminate(weight, gram_of(inputs), size, 1, NEARLY_NONE)
    groups = [list(range(first, first + size)) for first in range(0, 12, size)]
    errors = [least_error(weight, inputs, [i for i in range(12) if i not in group]) for group in groups]
    assert order[0].item() == min(range(len(groups)), key=errors.__getitem__)
    assert costs[groups[order[0]]].sum().item() == pytest.approx(min(errors), rel=1e-6)


@pytest.mark.parametrize(("size", "at_once"), SIZES)
def test_costs_add_up_to_the_least_squares_error_after_each_removal(weight, size, at_once):
    inputs = drawn(64).double()
    order, costs = eliminate(weight, gram_of(inputs), size, at_once, NEARLY_NONE)
    assert sorted(order.tolist()) == list(range(12 // size))
    kept, spent = list(range(12)), 0.0
    for group in order.tolist():
        for channel in range(group * size, group * size + size):
            kept.remove(channel)
            spent += costs[channel].item()
        assert spent == pytest.approx(least_error(weight, inputs, kept), rel=1e-6)


def test_one_by_one_is_greedy(weight):
    inputs = drawn(64).double()
    order, _ = eliminate(weight, gram_of(inputs), 1, 1, NEARLY_NONE)
    kept = list(range(12))
    for channel in order.tolist():
        without = {one: least_error(weight, inputs, [i for i in kept if i != one]) for one in kept}
        assert channel == min(without, key=without.__getitem__)
        kept.remove(channel)


def test_copies_of_an_input_go_first_and_cost_nothing(weight):
    inputs = drawn(64).double()
    inputs[:, 7] = inputs[:, 2]
    order, costs = eliminate(weight, gram_of(inputs), 1, 1, 1e-9)
    assert order[0].item() in (2, 7) and costs[order[0]] < 1e-6 * costs.sum()


def test_the_order_is_the_same_each_time_also_of_equals():
    weight, gram = torch.ones(2, 12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    order, costs = eliminate(weight, gram, 1, 5)
    again = eliminate(weight, gram, 1, 5)
    assert order.tolist() == list(range(12)) and torch.equal(order, again[0]) and torch.equal(costs, again[1])
    assert torch.allclose(costs, torch.full_like(costs, 2 * 1.01))  # with the default ridge


def test_singular_second_moments_are_refused(weight):
    with pytest.raises(CompensationFailed, match=r"of 12 channels are singular with a ridge of 0\.0"):
        eliminate(weight, gram_of(drawn(5).double()), 1, 1, 0.0)
