"""The archive serves the best evaluated mask that fits, remembers no dominated one, and falls back to the order."""

import itertools

import numpy as np
import pytest

from rap_env.errors import InvalidMask
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint, smallest_bytes
from rap_env.memory.scenario import scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import ArchivePolicy, OrderPolicy

ORDER = [f"layer{i}.{kind}" for i in (2, 0, 3, 1) for kind in ("mlp", "attention")]


def evaluated_masks(shape) -> list[tuple[PruningMask, float]]:
    """Random masks; those that keep more score higher, so that many of them are worth remembering."""
    bits = np.random.default_rng(0).random((60, len(shape.components))) < 0.6
    return [(PruningMask.from_bits(shape, row), float(row.sum())) for row in bits]


def test_every_scenario_gets_the_best_evaluated_mask_that_fits(tiny_llm):
    shape, generator = tiny_llm.shape, np.random.default_rng(1)
    evaluated = [
        (PruningMask.from_bits(shape, bits), float(generator.random()))
        for bits in itertools.product([0, 1], repeat=8)
        if generator.random() < 0.3
    ]
    policy = ArchivePolicy(shape, evaluated, ORDER)
    for scenario in scenario_grid(shape, [(1, 64), (4, 512), (16, 2048)], [0.95, 0.8, 0.6]):
        fitting = [
            (score, mask)
            for mask, score in evaluated
            if footprint(shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes
        ]
        best = max(score for score, _mask in fitting)
        assert (best, policy.decide(scenario.workload, scenario.budget_bytes)) in fitting
    assert len(policy.parameters()["entries"]) < 25 < len(evaluated)


def test_budgets_below_every_entry_follow_the_order(tiny_llm):
    shape, workload = tiny_llm.shape, Workload(2, 96)
    policy = ArchivePolicy(shape, [(PruningMask.all_kept(shape), 1.0)], ORDER)
    budget_bytes = smallest_bytes(shape, workload) + 40_000
    assert policy.decide(workload, budget_bytes) == OrderPolicy(shape, ORDER).decide(workload, budget_bytes)


def test_an_order_that_misses_components_is_refused(tiny_llm):
    with pytest.raises(InvalidMask):
        ArchivePolicy(tiny_llm.shape, [], ORDER[1:])


def test_masks_that_need_no_less_of_either_sum_and_score_no_higher_are_forgotten(tiny_llm):
    dense = PruningMask.all_kept(tiny_llm.shape)
    # Weights 24,576 an MLP and 12,288 an attention, which alone has a KV cache.
    evaluated = [
        (dense.drop("layer0.mlp"), 5.0),
        (dense.drop("layer1.mlp"), 4.0),  # as many bytes of both
        (dense.drop("layer0.attention"), 3.0),  # less KV cache
        (dense.drop("layer0.mlp", "layer1.mlp"), 5.5),  # less of one and no more of the other than the first
        (dense.drop("layer0.attention", "layer1.attention"), 3.0),  # less of both than the one attention's, as good
    ]
    entries = ArchivePolicy(tiny_llm.shape, evaluated, ORDER).parameters()["entries"]
    assert entries == [[["layer0.mlp", "layer1.mlp"], 5.5], [["layer0.attention", "layer1.attention"], 3.0]]
