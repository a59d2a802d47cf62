"""Where sites have parts: searches and policies keep the first parts of each site; what rankings by price say."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from agents.archive import swap_one
from agents.driver import run_search
from agents.evopress import mutate
from agents.granularity import Granularity
from agents.widths import FlapAgent, TwoSspAgent, UniformAgent
from rap_env.components import MLP, Site
from rap_env.errors import InvalidMask, SearchExhausted
from rap_env.llm import parts
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.prepared import Preparation
from rap_env.llm.shape import ModelShape
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import MilpPolicy, OrderPolicy
from tests.agents.cases import EachCosts, build_agent, decided, fits, make_task, own_agents


class FortyTokens(EachCosts):
    """Few evaluations for as many tokens as rankings take."""

    def tokens(self, llm) -> int:
        return 40


@pytest.fixture
def grouped(monkeypatch) -> SwitchableLLM:
    """The tiny model with 2 parts in each attention and 4 in each MLP."""
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 16)
    tiny = build_tiny_llm()
    llm = SwitchableLLM(tiny.model, tiny.tokenizer, tiny.name, "group")
    scores = {row.name: float(1 + row.site.layer) / (1 + row.part) for row in llm.shape.components}
    llm.preparation = Preparation(tokens=7, scores={"flap": scores})
    return llm


@pytest.fixture(autouse=True)
def few_predictions(monkeypatch):
    monkeypatch.setattr("agents.surrogate._PREDICTED", 8)


@pytest.mark.parametrize("name", own_agents())
def test_masks_of_every_agent_keep_first_parts_and_fit(name, grouped):
    task = make_task(grouped, evaluator=FortyTokens(), limit=2000)
    result = run_search(build_agent(name), task)
    for mask, scenario in zip(decided(result.policy, task.scenarios), task.scenarios, strict=True):
        assert len(mask.widths) == len(grouped.shape.sites)
        assert name == "dense" or fits(mask, grouped.shape, scenario)
    assert all(len(mask.widths) == 8 for mask in task.archive)


def test_a_search_pays_for_the_order_of_parts(grouped):
    task = make_task(grouped, 6)
    with pytest.raises(SearchExhausted, match="7 more were asked for"):
        run_search(build_agent("uniform"), task)
    task = make_task(grouped, 7)
    assert run_search(build_agent("uniform"), task).tokens == 7


@pytest.mark.parametrize(("limit", "curves"), [(25 + 12, 25), (25 + 11, 21), (21 + 11, 17), (17, 17)])
def test_evolution_from_curves_leaves_an_evaluation_for_each_scenario_but_keeps_two_levels(limit, curves, grouped):
    task = make_task(grouped, limit)
    build_agent("evopress_single_sites").begin(task)
    assert len(task.scenarios) == 12 and task.problem.budget.spent == curves


def scenario_of(shape, ratio: float) -> Scenario:
    dense = footprint(shape, PruningMask.all_kept(shape), Workload(1, 64)).peak_bytes
    return Scenario(Workload(1, 64), int(ratio * dense))


def test_neighbours_move_parts_between_two_sites(grouped):
    shape, generator = grouped.shape, np.random.default_rng(0)
    order = [row.name for row in shape.components][::-1]
    scenario = scenario_of(shape, 0.8)
    space = Granularity(shape, scenario)
    mask = OrderPolicy(shape, order).decide(scenario.workload, scenario.budget_bytes)
    others = {swap_one(mask, scenario, shape, order, generator) for _ in range(60)}
    mutants = {space.mask(mutate(np.array(mask.keep), space, generator)) for _ in range(60)}
    for neighbour in others | mutants:
        assert fits(neighbour, shape, scenario)
        moved = np.abs(np.subtract(neighbour.widths, mask.widths)).sum()
        assert moved <= 12
    assert len(others) > 10 and len(mutants) > 10


def test_uniform_widths_are_equal_in_all_sites_and_wishes_scale_them(grouped):
    shape = grouped.shape
    space = Granularity(shape, scenario_of(shape, 0.75))
    uniform = space.mask(space.uniform())
    widths = np.array(uniform.widths).reshape(-1, 2)  # of attentions and MLPs
    assert np.ptp(widths[:, 0]) <= 1 and np.ptp(widths[:, 1]) <= 1
    assert space.mask(space.in_proportion(np.ones(8))) == uniform
    wish = np.ones(8)
    wish[3] = 0.05
    assert space.mask(space.in_proportion(wish)).widths[3] == 0


def test_uniform_mlps_leave_attentions_alone(grouped):
    task = make_task(grouped)
    agent = UniformAgent(attentions=False)
    agent.begin(task)
    scenario = scenario_of(grouped.shape, 0.8)
    mask = agent.policy().decide(scenario.workload, scenario.budget_bytes)
    assert mask.dropped and {row.site.kind for row in mask.dropped} == {MLP}


def test_flap_standardises_scores_within_a_site_and_needs_them(grouped, tiny_llm):
    task = make_task(grouped)
    agent = FlapAgent()
    agent.begin(task)
    prices = agent.prices(grouped.shape.components)
    of_first_mlp = [prices[row.name] for row in grouped.shape.components if row.site.name == "layer0.mlp"]
    values = np.array([1.0, 1 / 2, 1 / 3, 1 / 4])
    assert np.allclose(of_first_mlp, (values - values.mean()) / values.std())
    other_mlp = [prices[row.name] for row in grouped.shape.components if row.site.name == "layer3.mlp"]
    assert np.allclose(of_first_mlp, other_mlp), "the scale of a layer's scores says nothing"
    with pytest.raises(InvalidMask, match="granularity 'group' in order"):
        FlapAgent().begin(make_task(tiny_llm))


@pytest.mark.parametrize(("sparsity", "n_attentions"), [(0.25, 2), (0.375, 4), (0.5, 8)])
def test_two_ssp_drops_as_many_attentions_as_the_paper(sparsity, n_attentions, monkeypatch):
    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    shape = ModelShape.from_config(config, torch.bfloat16, "group")
    monkeypatch.setattr(TwoSspAgent, "_greedy", lambda _self, sites: sites)
    agent = TwoSspAgent()
    agent.task = SimpleNamespace(problem=SimpleNamespace(shape=shape))
    policy, work = OrderPolicy(shape, agent.rank()), Workload(1, 1)
    dense = footprint(shape, PruningMask.all_kept(shape), work).peak_bytes
    prunable = sum(row.weight_bytes for row in shape.components)
    mask = policy.decide(work, int(dense - sparsity * prunable))
    widths = np.array(mask.widths).reshape(30, 2)
    assert abs((widths[:, 0] == 0).sum() - n_attentions) <= 1 and set(widths[:, 0]) <= {0, 1, 2, 3}
    assert np.ptp(widths[:, 1]) <= 1


@pytest.mark.parametrize("group_channels", [16, 24])  # 4 parts of an MLP, or 3, the first one smaller
@pytest.mark.parametrize("drawn", [lambda rng, n: rng.random(n), lambda rng, n: rng.integers(0, 4, n)])
def test_milp_keeps_first_parts_at_the_least_cost(monkeypatch, group_channels, drawn):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", group_channels)
    tiny = build_tiny_llm()
    shape = SwitchableLLM(tiny.model, tiny.tokenizer, tiny.name, "group").shape
    values = drawn(np.random.default_rng(3), len(shape.components)).tolist()
    costs = {row.name: float(cost) for row, cost in zip(shape.components, values, strict=True)}
    policy, scenario = MilpPolicy(shape, costs), scenario_of(shape, 0.9)
    mask = policy.decide(scenario.workload, scenario.budget_bytes)
    total = sum(costs[row.name] for row in mask.dropped)
    numbers = [len(bits) for _site, bits in mask.kept_parts]
    best = np.inf
    for widths in itertools.product(*(range(n, max(-1, n - 3), -1) for n in numbers)):
        other = PruningMask.from_widths(shape, widths)
        cost = sum(costs[row.name] for row in other.dropped)
        if cost < best and fits(other, shape, scenario):
            best = cost
    assert mask.widths and total <= best + 1e-9


def test_milp_does_not_reach_a_cheap_part_but_through_those_behind_it(grouped):
    costs = {row.name: 100.0 for row in grouped.shape.components}
    first, second = ([row.name for row in grouped.shape.components if row.site == Site(n, MLP)] for n in (0, 1))
    costs |= dict(zip(first, (9.0, 1.0, 4.0, 3.0), strict=True)) | dict(zip(second, (9.0, 9.0, 1.0, 5.0), strict=True))
    dense = PruningMask.all_kept(grouped.shape)
    cheapest = dense.drop(*second[2:])  # 6, where the first site's two last ones cost 7, those in front of its last 5
    budget_bytes = footprint(grouped.shape, cheapest, Workload(1, 16)).peak_bytes
    assert MilpPolicy(grouped.shape, costs).decide(Workload(1, 16), budget_bytes) == cheapest
