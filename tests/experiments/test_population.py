"""The part `population` on text, whose evaluations have no plan of requests."""

import numpy as np
import pytest
import torch

from experiments.benchmarks.population import _together, offspring
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.mask import PruningMask


@pytest.mark.parametrize("kind", [PerplexityEvaluator, DivergenceEvaluator])
def test_masks_are_compared_together_and_one_by_one(tiny_llm, kind):
    windows = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    parent = PruningMask.all_kept(tiny_llm.shape).drop("layer1.mlp", "layer2.attention")
    masks = offspring(parent, 4, 1, np.random.default_rng(0))
    steps = []
    results = _together(tiny_llm, kind(windows, "text"), [masks], lambda result: steps.append(result) or result)
    assert results["identical"] and len(steps) == 2
    assert results["masks"] == 4
    assert results["shared_executions_ratios"][0] > 1.0
    assert results["one_by_one_flops_per_second"][0] > 0.0
