"""Width policies of other models as a beginning: layers by their place in the depth, contexts by their point."""

import numpy as np
import pytest
import torch

from agents.driver import run_search
from agents.model_gradient import ModelGradientAgent
from agents.transfer import transferred_fractions
from agents.width_scaling import SCALED
from rap_env.errors import PolicyUnreadable
from rap_env.evaluation.table import load_tables
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.policies import DensePolicy, WidthPolicy, save_policy
from rap_env.policies.width import WidthNetwork
from tests.agents.cases import decided
from tests.agents.test_family_surrogate import BETWEEN, grouped  # noqa: F401 - a fixture
from tests.agents.test_model_gradient import task_of

SAMPLER = ScenarioSampler((1, 16), (128, 512), (0.7, 0.95))
POINTS = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()


def linear_policy(shape, scale: float = 0.3) -> WidthPolicy:
    """A random linear policy that is squashed, as the agent ends as."""
    torch.manual_seed(0)
    network = WidthNetwork(len(shape.sites), layers=(), squashed=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return WidthPolicy(shape, network, SCALED)


def asked_by(source: WidthPolicy, kind: str) -> np.ndarray:
    """Its fractions at the points [5, layers]."""
    contexts = [SAMPLER.at(source.shape, point) for point in POINTS]
    asked = np.array([source.fractions(each.workload, each.budget_bytes) for each in contexts])
    return asked[:, [site.kind == kind for site in source.shape.sites]]


def test_layers_get_what_lies_at_the_same_place_of_the_other_model(grouped):  # noqa: F811
    shape = load_tables().shape  # 30 layers, of which each of the small model's stands for as many
    source, (each, rest) = linear_policy(shape), divmod(30, grouped.shape.n_layers)
    assert rest == 0
    found = transferred_fractions(source, grouped.shape, SAMPLER, POINTS)
    for column, site in zip(found.T, grouped.shape.sites, strict=True):
        known, first = asked_by(source, site.kind), site.layer * each
        middle = known[:, first + (each - 1) // 2 : first + each // 2 + 1].mean(1)
        assert np.allclose(column, middle)


def test_a_deeper_model_gets_what_lies_between_and_the_ends_at_its_ends(grouped):  # noqa: F811
    source, shape, n_layers = linear_policy(grouped.shape), load_tables().shape, grouped.shape.n_layers
    found = transferred_fractions(source, shape, SAMPLER, POINTS)
    for column, site in zip(found.T, shape.sites, strict=True):
        known, place = asked_by(source, site.kind), (site.layer + 0.5) / 30 * n_layers - 0.5
        below = max(0, int(place)) if place < n_layers - 1 else n_layers - 1
        part = min(max(place - below, 0.0), 1.0)
        above = min(below + 1, n_layers - 1)
        assert np.allclose(column, (1 - part) * known[:, below] + part * known[:, above])


def test_the_agent_begins_as_the_policy_of_the_same_model(grouped, tmp_path):  # noqa: F811
    source = linear_policy(grouped.shape)
    folder = save_policy(source, tmp_path / "source")
    grid = scenario_grid(grouped.shape, *BETWEEN)
    found, plain = (run_search(ModelGradientAgent(start=start), task_of(grouped, 0)) for start in (str(folder), None))
    assert decided(found.policy, grid) == decided(source, grid) != decided(plain.policy, grid)


def test_policies_that_have_no_widths_are_refused(grouped, tmp_path):  # noqa: F811
    folder = save_policy(DensePolicy(grouped.shape), tmp_path / "dense")
    with pytest.raises(PolicyUnreadable, match="expected a policy of widths to begin as; got one of kind 'dense'"):
        run_search(ModelGradientAgent(start=str(folder)), task_of(grouped, 0))
    with pytest.raises(PolicyUnreadable, match="no such folder"):
        ModelGradientAgent(start=str(tmp_path / "none"))
