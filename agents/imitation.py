"""Warm start: before any mask is evaluated, a policy network learns to do what the greedy order does."""

import numpy as np
import torch
from torch.nn import functional

from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.observation import observe
from rap_env.policies import OrderPolicy
from rap_env.policies.network import ComponentNetwork

_SCENARIOS, _STEPS, _BATCH, _LEARNING_RATE = 256, 400, 64, 3e-3
_SOFTNESS = 0.05  # width of the soft cut, as a fraction of the components


def imitate_order(
    network: ComponentNetwork, shape, order: tuple[str, ...], sampler: ScenarioSampler, seed: int
) -> float:
    """Fits a network to the walk along an order; costs no evaluation.

    The one-step form learns the keep-bits that the walk ends with, the sequential form each of its steps.

    Args:
        network: Trained in place.
        shape: The model.
        order: Component names, the first to go first.
        sampler: Draws the scenarios to learn on.
        seed: Seed of scenarios and batches.

    Returns:
        The last batch's loss.
    """
    if network.sequential:
        examples_of, loss_of = _sequential_examples, functional.cross_entropy
    else:
        examples_of, loss_of = _one_step_examples, functional.binary_cross_entropy_with_logits
    generator = np.random.default_rng(seed)
    scenarios = (sampler.sample(shape, generator) for _ in range(_SCENARIOS))
    examples = [example for scenario in scenarios for example in examples_of(shape, scenario, order)]
    observations = {
        name: torch.from_numpy(np.stack([observation[name] for observation, _ in examples])) for name in examples[0][0]
    }
    targets = torch.from_numpy(np.stack([target for _, target in examples]))
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        batch = torch.from_numpy(generator.integers(len(examples), size=_BATCH))
        scores = network({name: entry[batch] for name, entry in observations.items()})[:, : network.n_actions]
        loss = loss_of(scores, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def _one_step_examples(shape, scenario: Scenario, order: tuple[str, ...]) -> list:
    """Keep-probabilities around the cut of the walk: soft, so that the agent still tries other masks near it."""
    mask = OrderPolicy(shape, order).decide(scenario.workload, scenario.budget_bytes)
    rank = np.array([order.index(component.name) for component in shape.components])
    cut = 1 + max((order.index(component.name) for component in mask.dropped), default=-1)
    probabilities = 1.0 / (1.0 + np.exp(-(rank + 0.5 - cut) / (_SOFTNESS * len(order))))
    return [(observe(shape, scenario, PruningMask.all_kept(shape), order), probabilities.astype(np.float32))]


def _sequential_examples(shape, scenario: Scenario, order: tuple[str, ...]) -> list:
    last = OrderPolicy(shape, order).decide(scenario.workload, scenario.budget_bytes)
    mask, examples = PruningMask.all_kept(shape), []
    position = {component.name: index for index, component in enumerate(shape.components)}
    for name in (name for name in order if not last.keeps(name)):
        examples.append((observe(shape, scenario, mask, order), np.int64(position[name])))
        mask = mask.drop(name)
    examples.append((observe(shape, scenario, mask, order), np.int64(len(shape.components))))
    return examples
