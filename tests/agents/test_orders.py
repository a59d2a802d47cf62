"""Agents that rank components by calibration losses: what they choose, worked out by hand, and what it costs."""

from dataclasses import replace

import pytest

from agents.driver import run_search
from rap_env.errors import SearchExhausted, UnknownName
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.workload import Workload
from tests.agents.cases import build_agent, by_rule, decided, make_task, names_of, optimum, score_of
from tests.conftest import TOY_WINDOWS

TOKENS = TOY_WINDOWS.numel()


@pytest.fixture
def search(tiny_llm):
    """Runs the agent of a YAML."""

    def run(name: str, llm=tiny_llm, **options):
        return run_search(build_agent(name), make_task(llm, order=None, **options))

    return run


def by_sum(monkeypatch, costs: dict[str, float]) -> None:
    """Calibration loss 3 plus what each dropped component costs."""
    by_rule(monkeypatch, lambda dropped: 3.0 + sum(costs[name] for name in dropped))


def last_is_least(llm) -> dict[str, float]:
    return {name: (8 - position) / 36 for position, name in enumerate(names_of(llm))}


def test_greedy_gsi_walks_the_rankings_order(search, tiny_llm):
    ranking = greedy_sequential_importance(tiny_llm, TOY_WINDOWS)
    result = search("greedy_gsi")
    assert result.policy.parameters() == {"order": list(ranking.order)}
    assert (result.evaluations, result.tokens) == (0, ranking.tokens)


@pytest.mark.parametrize("name", ["greedy_gsi", "greedy_per_byte", "greedy_layers", "milp", "one_shot", "short_gpt"])
def test_every_order_tells_the_seconds_of_what_it_measured(tiny_llm, name):
    task = make_task(tiny_llm, order=None)
    run_search(build_agent(name), task)
    assert task.problem.budget.measured_seconds > 0


def test_one_shot_orders_by_what_each_costs_alone(search, tiny_llm, monkeypatch):
    costs = last_is_least(tiny_llm)
    by_sum(monkeypatch, costs)
    result = search("one_shot")
    assert result.policy.parameters() == {"order": list(reversed(costs))}
    assert result.details["increases"] == pytest.approx(costs)
    assert (result.evaluations, result.tokens) == (0, 9 * TOKENS)


def test_one_shot_is_the_order_of_the_greedy_rules_first_round(search, tiny_llm):
    increases = greedy_sequential_importance(tiny_llm, TOY_WINDOWS, removals=1, exact=True).increases
    assert search("one_shot").policy.parameters()["order"] == sorted(increases, key=increases.get)


def test_milp_is_optimal_for_every_scenario_where_costs_add_up(search, tiny_llm, monkeypatch):
    by_sum(monkeypatch, last_is_least(tiny_llm))
    result = search("milp")
    scenarios = make_task(tiny_llm, workloads=[(1, 16), (1, 128), (4, 512), (16, 2048)], ratios=[0.9, 0.7, 0.5])
    for mask, scenario in zip(decided(result.policy, scenarios.scenarios), scenarios.scenarios, strict=True):
        assert score_of(mask.keep) == pytest.approx(optimum(tiny_llm.shape, scenario))
    assert (result.evaluations, result.tokens) == (0, 9 * TOKENS)


def test_greedy_layers_sees_that_one_layer_stands_in_for_another(search, monkeypatch):
    def loss(dropped: tuple[str, ...]) -> float:
        layers = {int(name[len("layer")]) for name in dropped}
        assert len(dropped) == 2 * len(layers), "only whole layers are tried"
        return sum([1.1, 1.0, 4.0, 5.0][layer] for layer in layers) + 100.0 * ({0, 1} <= layers)

    by_rule(monkeypatch, loss)
    result = search("greedy_layers")
    # Alone layer 0 is second; without layer 1 it would cost 101.1, so layers 2 and 3 go before it.
    names = [f"layer{layer}.{kind}" for layer in (1, 2, 3, 0) for kind in ("attention", "mlp")]
    assert result.policy.parameters() == {"order": names}
    assert result.details["losses"] == pytest.approx([1.0, 5.0, 10.0, 111.1])
    assert (result.evaluations, result.tokens) == (0, (4 + 3 + 2 + 1) * TOKENS)


def test_greedy_layers_goes_as_far_as_its_tokens_go(tiny_llm, monkeypatch):
    by_rule(monkeypatch, lambda dropped: sum([1.1, 1.0, 4.0, 2.0][int(name[len("layer")])] for name in dropped))
    task = make_task(tiny_llm, order=None, limit=(4 + 3 + 1) * TOKENS)
    result = run_search(build_agent("greedy_layers"), task)
    names = [f"layer{layer}.{kind}" for layer in (1, 0, 3, 2) for kind in ("attention", "mlp")]
    assert result.policy.parameters() == {"order": names} and len(result.details["losses"]) == 2
    assert result.tokens == (4 + 3) * TOKENS, "a third round of 2 is beyond it"
    with pytest.raises(SearchExhausted):
        run_search(build_agent("greedy_layers"), make_task(tiny_llm, order=None, limit=3 * TOKENS))


def test_short_gpt_drops_first_what_leaves_the_stream_as_it_is(search):
    llm = build_tiny_llm(seed=7)
    for layer, modules in ((2, ("attention", "mlp")), (0, ("mlp",))):
        for kind in modules:
            module = decoder_layers(llm.model)[layer].module
            (module.self_attn.o_proj if kind == "attention" else module.mlp.down_proj).weight.zero_()
    layers, blocks = search("short_gpt", llm), search("short_gpt_blocks", llm)
    order = layers.policy.parameters()["order"]
    assert order[:2] == ["layer2.attention", "layer2.mlp"]
    assert all(order[i].replace("attention", "mlp") == order[i + 1] for i in range(0, 8, 2))
    assert set(blocks.policy.parameters()["order"][:3]) == {"layer0.mlp", "layer2.attention", "layer2.mlp"}
    assert layers.details["block_influence"][2] == pytest.approx(0.0, abs=1e-6)
    assert [len(result.details["block_influence"]) for result in (layers, blocks)] == [4, 8]
    assert [(result.evaluations, result.tokens) for result in (layers, blocks)] == [(0, TOKENS)] * 2


def test_an_unknown_granularity_is_refused_with_the_known_ones():
    with pytest.raises(Exception, match="unknown granularity 'layers'; did you mean layer") as caught:
        build_agent("short_gpt", granularity="layers")
    assert isinstance(caught.value.__cause__, UnknownName)


@pytest.mark.parametrize("exact", [True, False])
def test_greedy_per_byte_drops_mlps_first_on_few_tokens_and_attentions_on_many(search, tiny_llm, monkeypatch, exact):
    by_sum(monkeypatch, {c.name: 1.0 + c.site.layer / 100 for c in tiny_llm.shape.components})
    # Of these three workloads the last two hold equally many tokens.
    result = search("greedy_per_byte", exact=exact, workloads=[(1, 16), (1, 1024), (2, 512)])
    # 14,336 bytes for an attention and 24,576 for an MLP at 16 tokens; 143,360 and 24,576 at 1,024 tokens.
    mlps, attentions = ([f"layer{layer}.{kind}" for layer in range(4)] for kind in ("mlp", "attention"))
    assert result.policy.parameters()["orders"] == {"16": mlps + attentions, "1024": attentions + mlps}
    assert result.evaluations == 0
    if exact:
        # 1 + 36 masks for an order; both evaluate the dense mask, all single drops, layer 0 whole, and the empty mask.
        assert result.tokens == (2 * 37 - 1 - 8 - 1 - 1) * TOKENS
    dense = PruningMask.all_kept(tiny_llm.shape)
    for tokens, first in ((20, "layer0.mlp"), (500, "layer0.attention")):  # held out: the nearest order serves
        workload = Workload(1, tokens)
        assert result.policy.decide(workload, dense_bytes(tiny_llm.shape, workload) - 1) == dense.drop(first)


def test_greedy_per_byte_ranks_as_far_as_the_task_says(search, tiny_llm, monkeypatch):
    by_sum(monkeypatch, last_is_least(tiny_llm))
    result = search("greedy_per_byte", exact=True, removals=2, workloads=[(1, 96)])
    assert result.tokens == (1 + 8 + 7) * TOKENS
    assert result.policy.parameters()["orders"]["96"] == list(reversed(last_is_least(tiny_llm)))
    assert result.details["losses"] == {"96": pytest.approx([3 + 1 / 36, 3 + 3 / 36])}


def test_greedy_per_byte_needs_a_workload(search):
    with pytest.raises(ValueError, match="expected orders for one or more numbers of tokens"):
        search("greedy_per_byte", workloads=[])


def test_rankings_report_the_tokens_that_they_have_spent(tiny_llm):
    progress = []
    task = replace(make_task(tiny_llm, 10**6, order=None), progress=lambda *entry: progress.append(entry))
    result = run_search(build_agent("greedy_gsi"), task)
    assert len(progress) == 8 and progress == sorted(progress) and progress[-1] == (result.tokens, 10**6)
