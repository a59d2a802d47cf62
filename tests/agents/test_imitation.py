"""A network that imitates an importance order decides as the walk along it does, before any mask is evaluated."""

import random
from unittest.mock import patch

import numpy as np
import pytest
import torch

from agents.imitation import imitate_order
from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.observation import observe
from rap_env.policies import OneStepPolicy, OrderPolicy, SequentialPolicy
from rap_env.policies.network import ComponentNetwork

FORMS = [OneStepPolicy, SequentialPolicy]


@pytest.fixture
def order(tiny_llm) -> tuple[str, ...]:
    """Neither the components' own order nor its reverse."""
    names = [component.name for component in tiny_llm.shape.components]
    return tuple(names[index] for index in (5, 0, 3, 6, 1, 7, 2, 4))


@pytest.fixture
def sampler() -> ScenarioSampler:
    return ScenarioSampler(batch_size=(1, 16), prompt_tokens=(128, 2048), budget_ratio=(0.6, 0.95))


@pytest.fixture
def fresh_scenarios(tiny_llm, sampler) -> list[Scenario]:
    """Scenarios that the imitation has not seen."""
    generator = np.random.default_rng(12345)
    return [sampler.sample(tiny_llm.shape, generator) for _ in range(100)]


def imitated(form, shape, order, sampler, seed: int = 0):
    torch.manual_seed(seed)
    network = ComponentNetwork(shape, form.sequential, width=64)
    loss = imitate_order(network, shape, order, sampler, seed)
    assert np.isfinite(loss)
    return form(shape, network, order)


def agreement(policy, reference, scenarios: list[Scenario]) -> float:
    """Share of equal keep-bits."""
    pairs = [
        (policy.decide(s.workload, s.budget_bytes).keep, reference.decide(s.workload, s.budget_bytes).keep)
        for s in scenarios
    ]
    return float(np.mean([np.equal(ours, theirs) for ours, theirs in pairs]))


@pytest.mark.parametrize("form", FORMS)
def test_imitation_decides_as_the_order_walk_does(form, tiny_llm, order, sampler, fresh_scenarios):
    walk = OrderPolicy(tiny_llm.shape, order)
    assert agreement(imitated(form, tiny_llm.shape, order, sampler), walk, fresh_scenarios) >= 0.95


def test_imitation_is_what_makes_the_network_do_so(tiny_llm, order, sampler, fresh_scenarios):
    """The sequential form; in the one-step form the projection onto the budget follows the order by itself."""
    untrained = SequentialPolicy(tiny_llm.shape, ComponentNetwork(tiny_llm.shape, sequential=True), order)
    assert agreement(untrained, OrderPolicy(tiny_llm.shape, order), fresh_scenarios) < 0.8


def test_one_step_network_itself_drops_the_least_and_keeps_the_most_important(
    tiny_llm, order, sampler, fresh_scenarios
):
    """Before any projection; how far the drops reach in between is a soft cut."""
    shape = tiny_llm.shape
    network = ComponentNetwork(shape, sequential=False)
    imitate_order(network, shape, order, sampler, seed=0)
    dense, names = PruningMask.all_kept(shape), [component.name for component in shape.components]
    kept = []
    for scenario in fresh_scenarios:
        entries = observe(shape, scenario, dense, order)
        scores = network({name: torch.from_numpy(entry)[None] for name, entry in entries.items()})[0, : len(order)]
        kept.append((scores.detach().numpy() > 0)[[names.index(order[0]), names.index(order[-1])]])
    least, most = np.mean(kept, axis=0)
    assert least < 0.1 and most > 0.9


@pytest.mark.parametrize("form", FORMS)
def test_imitation_evaluates_no_mask(form, tiny_llm, order, sampler):
    with patch.object(Meter, "ensure_known", side_effect=AssertionError("evaluated a mask")):
        imitated(form, tiny_llm.shape, order, sampler)


@pytest.mark.parametrize("form", FORMS)
def test_imitation_repeats_itself_with_one_seed_and_not_with_another(form, tiny_llm, order, sampler, monkeypatch):
    monkeypatch.setattr("agents.imitation._STEPS", 40, raising=False)  # for speed
    first, twin, other = (imitated(form, tiny_llm.shape, order, sampler, seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], twin[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_imitation_leaves_the_global_random_streams_alone(tiny_llm, order, sampler):
    network = ComponentNetwork(tiny_llm.shape, sequential=False, width=16)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    imitate_order(network, tiny_llm.shape, order, sampler, seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
