"""Solving for the budget at hand is exact, also where no order is."""

import itertools

import numpy as np
import pytest

from rap_env.errors import InvalidMask
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.scenario import ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.policies import MilpPolicy

SHORT, LONG = Workload(1, 16), Workload(1, 144)  # an attention frees 14,336 or 30,720 bytes, an MLP 24,576


def costs_of(shape, values) -> dict[str, float]:
    return dict(zip((component.name for component in shape.components), values, strict=True))


def total(costs: dict, mask: PruningMask) -> float:
    return sum(costs[component.name] for component in mask.dropped)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_no_mask_that_fits_is_cheaper(tiny_llm, scale, shift):
    shape, generator = tiny_llm.shape, np.random.default_rng(0)
    everything = [PruningMask.from_bits(shape, bits) for bits in itertools.product((0, 1), repeat=8)]
    sampler = ScenarioSampler((1, 16), (1, 2048), (0.32, 1.0))
    for _ in range(20):
        costs = costs_of(shape, scale * (generator.exponential(size=8) + shift))
        scenario = sampler.sample(shape, generator)
        workload, budget_bytes = scenario.workload, scenario.budget_bytes
        mask = MilpPolicy(shape, costs).decide(workload, budget_bytes)
        fitting = [other for other in everything if footprint(shape, other, workload).peak_bytes <= budget_bytes]
        assert mask in fitting
        assert total(costs, mask) == pytest.approx(min(total(costs, other) for other in fitting), rel=1e-9)


def test_the_choice_by_hand_changes_with_the_workload(tiny_llm):
    shape = tiny_llm.shape
    policy = MilpPolicy(shape, costs_of(shape, [2, 3, 2.5, 9, 9, 9, 9, 9]))
    dense = PruningMask.all_kept(shape)
    # 24,576 bytes are missing: one MLP for 3; or attentions, at 16 tokens two for 4.5, at 144 tokens one for 2.
    assert policy.decide(SHORT, dense_bytes(shape, SHORT) - 24_576) == dense.drop("layer0.mlp")
    assert policy.decide(LONG, dense_bytes(shape, LONG) - 24_576) == dense.drop("layer0.attention")
    # One byte more: at 16 tokens the two attentions (28,672 bytes) are cheaper than the MLP and one of them.
    both = dense.drop("layer0.attention", "layer1.attention")
    assert policy.decide(SHORT, dense_bytes(shape, SHORT) - 24_577) == both


def test_what_the_model_is_better_without_goes_whatever_the_budget(tiny_llm):
    shape = tiny_llm.shape
    policy = MilpPolicy(shape, costs_of(shape, [1, -1, 1, 1, -1e-6, 1, 1, 1]))
    without = PruningMask.all_kept(shape).drop("layer0.mlp", "layer2.attention")
    assert policy.decide(LONG, 10**9) == without
    assert policy.decide(LONG, footprint(shape, without, LONG).peak_bytes) == without


def test_a_component_that_costs_nothing_is_no_trouble(tiny_llm):
    policy = MilpPolicy(tiny_llm.shape, costs_of(tiny_llm.shape, [0.0] * 8))
    assert not policy.decide(LONG, smallest_bytes(tiny_llm.shape, LONG)).kept


def test_costs_of_other_components_and_infinite_ones_are_refused(tiny_llm):
    costs = costs_of(tiny_llm.shape, range(8))
    with pytest.raises(InvalidMask, match="expected a cost for each of the 8 components; got 1 others"):
        MilpPolicy(tiny_llm.shape, {"layer0.mlp": 1.0})
    with pytest.raises(ValueError, match=r"expected finite costs; got .*inf"):
        MilpPolicy(tiny_llm.shape, costs | {"layer0.mlp": float("inf")})
