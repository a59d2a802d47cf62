"""Agents that rank components from calibration trials: what they choose, worked out by hand, and what it costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.base import Task
from agents.greedy_layers import GreedyLayersAgent
from agents.greedy_per_byte import GreedyPerByteAgent
from agents.milp import MilpAgent
from agents.one_shot import OneShotAgent
from agents.short_gpt import ShortGptAgent
from rap_env.errors import UnknownName
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem
from tests.agents.test_agents import optimum, score_of
from tests.conftest import TOY_WINDOWS, CountingEvaluator
from tests.importance.cases import measure_by_rule

TOKENS = TOY_WINDOWS.numel()


def task_for(llm, workloads=((1, 128), (16, 2048)), windows: torch.Tensor = TOY_WINDOWS, store=None) -> Task:
    """A task without an importance order: none of these agents may need it."""
    grid = scenario_grid(llm.shape, workloads, [0.9, 0.8, 0.7, 0.6, 0.5])
    problem = PruningProblem(llm, CountingEvaluator(), store)
    return Task(problem, None, ScenarioSampler(), grid, windows, seed=0, folder=Path("unused"))


def by_sum(monkeypatch, costs: dict[str, float]) -> None:
    """Calibration loss 3 plus what each dropped component costs."""
    measure_by_rule(monkeypatch, lambda tokens, dropped: 3.0 + sum(costs[name] for name in dropped))


def last_is_least(llm) -> dict[str, float]:
    return {component.name: (8 - position) / 36 for position, component in enumerate(llm.shape.components)}


def test_one_shot_orders_by_what_each_costs_alone(tiny_llm, monkeypatch):
    costs = last_is_least(tiny_llm)
    by_sum(monkeypatch, costs)
    result = OneShotAgent().search(task_for(tiny_llm))
    assert result.policy.parameters() == {"order": list(reversed(costs))}
    assert result.details["increases"] == pytest.approx(costs)
    assert (result.evaluations, result.calibration_tokens) == (0, 9 * TOKENS)


def test_one_shot_is_the_order_of_the_greedy_rules_first_round(tiny_llm):
    increases = greedy_sequential_importance(tiny_llm, TOY_WINDOWS, removals=1, exact=True).increases
    order = OneShotAgent().search(task_for(tiny_llm)).policy.parameters()["order"]
    assert order == sorted(increases, key=increases.get)


def test_milp_is_optimal_for_every_scenario_where_costs_add_up(tiny_llm, monkeypatch):
    by_sum(monkeypatch, last_is_least(tiny_llm))
    task = task_for(tiny_llm, [(1, 16), (1, 128), (4, 512), (16, 2048)])
    result = MilpAgent().search(task)
    for scenario in task.grid:
        mask = result.policy.decide(scenario.workload, scenario.budget_bytes)
        assert score_of(mask.keep) == pytest.approx(optimum(tiny_llm.shape, scenario))
    assert (result.evaluations, result.calibration_tokens) == (0, 9 * TOKENS)


def test_greedy_layers_sees_that_one_layer_stands_in_for_another(tiny_llm, monkeypatch):
    def loss(tokens: int, dropped: tuple[str, ...]) -> float:
        layers = {int(name[len("layer")]) for name in dropped}
        assert len(dropped) == 2 * len(layers), "only whole layers are tried"
        return sum([1.1, 1.0, 4.0, 5.0][layer] for layer in layers) + 100.0 * ({0, 1} <= layers)

    measure_by_rule(monkeypatch, loss)
    progress = []
    task = replace(task_for(tiny_llm), progress=lambda *entry: progress.append(entry))
    result = GreedyLayersAgent().search(task)
    # Alone layer 0 is second; without layer 1 it would cost 101.1, so layers 2 and 3 go before it.
    names = [f"layer{layer}.{kind}" for layer in (1, 2, 3, 0) for kind in ("attention", "mlp")]
    assert result.policy.parameters() == {"order": names}
    assert result.details["losses"] == pytest.approx([1.0, 5.0, 10.0, 111.1])
    assert (result.evaluations, result.calibration_tokens) == (0, (4 + 3 + 2 + 1) * TOKENS)
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_greedy_layers_measures_nothing_twice(tiny_llm, tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        first = GreedyLayersAgent().search(task_for(tiny_llm, store=store))
        before = tiny_llm.site_executions
        again = GreedyLayersAgent().search(task_for(tiny_llm, store=store))
    assert tiny_llm.site_executions == before
    assert again.policy.parameters() == first.policy.parameters()
    assert again.calibration_tokens == first.calibration_tokens


def test_short_gpt_drops_first_what_leaves_the_stream_as_it_is():
    llm = build_tiny_llm(seed=7)
    for layer, modules in ((2, ("attention", "mlp")), (0, ("mlp",))):
        for kind in modules:
            module = decoder_layers(llm.model)[layer].module
            (module.self_attn.o_proj if kind == "attention" else module.mlp.down_proj).weight.zero_()
    task = task_for(llm)
    layers, blocks = (ShortGptAgent(granularity).search(task) for granularity in ("layer", "block"))
    assert layers.policy.parameters()["order"][:2] == ["layer2.attention", "layer2.mlp"]
    assert set(blocks.policy.parameters()["order"][:3]) == {"layer0.mlp", "layer2.attention", "layer2.mlp"}
    assert layers.details["block_influence"][2] == pytest.approx(0.0, abs=1e-6)
    assert [len(result.details["block_influence"]) for result in (layers, blocks)] == [4, 8]
    for result in (layers, blocks):
        assert (result.evaluations, result.calibration_tokens) == (0, TOKENS)
    order = layers.policy.parameters()["order"]
    assert all(order[i].replace("attention", "mlp") == order[i + 1] for i in range(0, 8, 2))


def test_an_unknown_granularity_is_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="unknown granularity 'layers'; did you mean layer"):
        ShortGptAgent("layers")


@pytest.mark.parametrize("exact", [True, False])
def test_greedy_per_byte_drops_mlps_first_on_few_tokens_and_attentions_on_many(tiny_llm, monkeypatch, exact):
    by_sum(monkeypatch, {c.name: 1.0 + c.layer / 100 for c in tiny_llm.shape.components})
    progress = []
    task = task_for(tiny_llm, [(1, 16), (1, 1024), (2, 512)])  # the last two hold equally many tokens
    result = GreedyPerByteAgent(exact=exact).search(replace(task, progress=lambda *entry: progress.append(entry)))
    # 14,336 bytes for an attention and 24,576 for an MLP at 16 tokens; 143,360 and 24,576 at 1,024 tokens.
    mlps, attentions = ([f"layer{layer}.{kind}" for layer in range(4)] for kind in ("mlp", "attention"))
    orders = result.policy.parameters()["orders"]
    assert orders == {"16": mlps + attentions, "1024": attentions + mlps}
    assert progress[0] == (1, 16) and progress[-1] == (16, 16) and progress == sorted(progress)
    assert result.evaluations == 0
    if exact:
        assert result.calibration_tokens == 2 * 36 * TOKENS
    dense = PruningMask.all_kept(tiny_llm.shape)
    for tokens, first in ((20, "layer0.mlp"), (500, "layer0.attention")):  # unseen: the nearest order serves
        workload = Workload(1, tokens)
        assert result.policy.decide(workload, dense_bytes(tiny_llm.shape, workload) - 1) == dense.drop(first)


def test_greedy_per_byte_stops_after_its_removals(tiny_llm, monkeypatch):
    by_sum(monkeypatch, last_is_least(tiny_llm))
    result = GreedyPerByteAgent(removals=2, exact=True).search(task_for(tiny_llm, [(1, 96)]))
    assert result.calibration_tokens == (8 + 7) * TOKENS
    assert result.policy.parameters()["orders"]["96"] == list(reversed(last_is_least(tiny_llm)))
    assert result.details["losses"] == {"96": pytest.approx([3 + 1 / 36, 3 + 3 / 36])}


def test_greedy_per_byte_needs_a_workload(tiny_llm):
    with pytest.raises(ValueError, match="expected orders for one or more numbers of tokens"):
        GreedyPerByteAgent().search(task_for(tiny_llm, []))
