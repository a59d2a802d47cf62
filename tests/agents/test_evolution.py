"""EvoP and EvoPress find known optima, share their tokens among the scenarios, and spend no more."""

import itertools

import numpy as np
import pytest

from agents.driver import evaluated_masks, run_search
from agents.evop import EvopAgent, two_point_crossover
from agents.evopress import EvopressAgent, mutate
from agents.granularity import GRANULARITIES
from rap_env.errors import UnknownName
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION
from rap_env.llm.loading import build_tiny_llm
from rap_env.memory.scenario import scenario_grid
from rap_env.policies import OrderPolicy, RandomPolicy
from rap_env.problem import PruningProblem
from tests.agents.cases import (
    Expensive,
    decided,
    fits,
    make_task,
    mean_score,
    names_of,
    optimum,
)
from tests.conftest import TOY_WINDOWS, CountingEvaluator

AGENTS = {"evop": EvopAgent, "evopress": EvopressAgent}
EXHAUSTIVE = {
    "evop": {"population": 40, "generations": 20, "mutation": 0.05},
    "evopress": {"generations": 40},
}


@pytest.fixture(scope="module")
def tall_llm():
    """24 components: more masks fit than any of these searches can ask about."""
    return build_tiny_llm(n_layers=12)


@pytest.mark.parametrize("name", AGENTS)
def test_search_finds_the_optimum_that_random_masks_miss(name, tiny_llm):
    scenarios = make_task(tiny_llm).scenarios
    best = np.mean([optimum(tiny_llm.shape, scenario) for scenario in scenarios])
    chance = np.mean([mean_score(RandomPolicy(tiny_llm.shape, seed), scenarios) for seed in range(20)])
    for seed in range(3):
        policy = run_search(AGENTS[name](**EXHAUSTIVE[name]), make_task(tiny_llm, seed=seed)).policy
        assert mean_score(policy, scenarios) == pytest.approx(best)
    assert chance < 0.9 * best


@pytest.mark.parametrize("granularity", ["layer", "equal_counts"])
@pytest.mark.parametrize("name", AGENTS)
def test_whole_layers_and_equal_counts_find_the_best_of_their_own_masks(name, granularity, tiny_llm):
    task = make_task(tiny_llm)
    result = run_search(AGENTS[name](granularity, **EXHAUSTIVE[name]), task)
    for scenario, mask in zip(task.scenarios, decided(result.policy, task.scenarios), strict=True):
        n_dropped = GRANULARITIES[granularity](tiny_llm.shape, scenario).key
        assert [component.site.layer for component in mask.dropped] == [
            layer for layer in range(4 - n_dropped, 4) for _kind in range(2)
        ], "the last layers are the least important ones"
    assert result.details["searches"] < len(task.scenarios)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", AGENTS)
def test_every_evaluated_mask_fits_the_scenario_that_it_is_proposed_for(name, granularity, tiny_llm, monkeypatch):
    task, asked = make_task(tiny_llm, 60), []
    evaluate_many = task.problem.evaluate_many
    monkeypatch.setattr(task.problem, "evaluate_many", lambda cases: asked.extend(cases) or evaluate_many(cases))
    run_search(AGENTS[name](granularity, generations=5), task)
    by_need = {(scenario.workload, scenario.budget_bytes): scenario for scenario in task.scenarios}
    assert asked
    assert all(fits(mask, tiny_llm.shape, by_need[needs]) for mask, *needs in asked for needs in [tuple(needs)])
    assert task.archive.keys() == {mask for mask, *_needs in asked}


@pytest.mark.parametrize("limit", [1, 7, 40])
@pytest.mark.parametrize("name", AGENTS)
def test_search_from_random_masks_spends_all_its_tokens_and_not_more(name, limit, tall_llm):
    task = make_task(tall_llm, limit, CountingEvaluator())
    result = run_search(AGENTS[name](), task)
    assert result.tokens == result.evaluations == task.problem.evaluator.calls == limit


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("name", AGENTS)
def test_scenarios_share_the_tokens_equally(name, in_flight, tall_llm):
    task = make_task(tall_llm, 20, CountingEvaluator(), workloads=[(1, 128)], ratios=[0.8, 0.7, 0.6, 0.5])
    run_search(AGENTS[name](), task, in_flight)
    masks = [mask for mask, _tokens in evaluated_masks(task)]
    for number, scenario in enumerate(task.scenarios):
        of_search = masks[5 * number : 5 * number + 5]
        assert all(fits(mask, tall_llm.shape, scenario) for mask in of_search)
        tighter = task.scenarios[number + 1 : number + 2]
        assert not any(fits(mask, tall_llm.shape, next_one) for mask in of_search for next_one in tighter)


def test_a_search_ends_where_there_is_no_other_mask_and_the_next_begins(tiny_llm):
    task = make_task(tiny_llm, 100, workloads=[(1, 128)], ratios=[0.9, 0.6])
    run_search(EvopressAgent("layer", generations=20), task)
    dropped = [len(mask.dropped) // 2 for mask, _tokens in evaluated_masks(task)]
    # One of four layers goes, then three: four masks each, far less than the first search's half of the tokens.
    assert dropped == [1] * 4 + [3] * 4


@pytest.mark.parametrize("name", AGENTS)
def test_without_tokens_or_scenarios_the_order_is_the_policy(name, tiny_llm):
    scenarios = make_task(tiny_llm).scenarios
    expected = decided(OrderPolicy(tiny_llm.shape, names_of(tiny_llm)), scenarios)
    for task in (make_task(tiny_llm, 0), make_task(tiny_llm, 50, workloads=[])):
        result = run_search(AGENTS[name](start="greedy"), task)
        assert result.evaluations == 0 and decided(result.policy, scenarios) == expected


def test_first_stage_pays_for_the_tokens_that_it_forwards(tall_llm):
    task = make_task(tall_llm, 40 * 320, Expensive())
    result = run_search(EvopressAgent(), task)
    cheap = result.tokens - 320 * result.evaluations
    assert cheap % 16 == 0 and cheap / 16 > result.evaluations
    assert 39 * 320 < result.tokens <= 40 * 320


def test_first_stage_lets_the_lowest_calibration_losses_pass(tall_llm):
    # Of four evaluations two are kept for the survivors; the others pay for 40 candidates at 16 tokens each.
    task = make_task(tall_llm, 4 * 320, Expensive(), workloads=[(16, 2048)], ratios=[0.6])
    run_search(EvopressAgent(generations=0), task)
    generator, space = np.random.default_rng(0), GRANULARITIES["component"](tall_llm.shape, task.scenarios[0])
    generator.permutation(24)  # the agent's own order comes first
    masks = list(dict.fromkeys(space.mask(space.random(generator)) for _ in range(64)))[:40]
    evaluator = PerplexityEvaluator(TOY_WINDOWS[:1], CALIBRATION)
    scores = {mask: evaluation.score for mask, evaluation in evaluator.evaluate_many(tall_llm, masks)}
    assert {mask for mask, _tokens in evaluated_masks(task)} == set(sorted(scores, key=scores.get)[-2:])
    assert task.problem.budget.spent == 4 * 320


@pytest.mark.parametrize("name", AGENTS)
def test_greedy_start_is_never_worse_than_the_order(name, tiny_llm):
    evaluator = PerplexityEvaluator(TOY_WINDOWS, "toy")
    task = make_task(tiny_llm, 24 * 32, evaluator)
    result = run_search(AGENTS[name](start="greedy", generations=20), task)
    free = PruningProblem(tiny_llm, evaluator)

    def scores(policy) -> np.ndarray:
        evaluations = free.meter.evaluate(decided(policy, task.scenarios))
        return np.array([evaluation.score for evaluation in evaluations])

    start = scores(OrderPolicy(tiny_llm.shape, names_of(tiny_llm)))
    assert (scores(result.policy) >= start).all()
    assert name == "evop" or (scores(result.policy) > start).any(), "one mutation in a thousand bits may change nothing"


def test_mutation_swaps_within_a_kind_and_trades_only_where_bytes_decide(tiny_llm):
    generator = np.random.default_rng(0)
    (scenario,) = scenario_grid(tiny_llm.shape, [(1, 128)], [0.7])
    for name, traded in (("component", True), ("equal_counts", False), ("layer", False)):
        space = GRANULARITIES[name](tiny_llm.shape, scenario)
        parent = space.random(generator)
        children = [mutate(parent, space, generator) for _ in range(50)]
        counts = {tuple(np.bincount(space.labels[~child], minlength=2)) for child in children}
        assert (len(counts) > 1) == traded
        assert any((child != parent).any() for child in children)


def test_crossover_takes_one_stretch_from_the_father():
    mother, father, generator = np.zeros(8, dtype=bool), np.ones(8, dtype=bool), np.random.default_rng(0)
    children = [two_point_crossover(mother, father, generator) for _ in range(300)]
    runs = [[bit for bit, _group in itertools.groupby(child)] for child in children]
    assert all(run.count(True) == 1 for run in runs)
    assert {int(child.sum()) for child in children} == set(range(1, 9)) and not mother.any()


def test_arguments_that_make_no_sense_are_refused():
    for agent in AGENTS.values():
        with pytest.raises(UnknownName, match="unknown granularity 'componet'; did you mean component"):
            agent(granularity="componet")
        with pytest.raises(UnknownName, match="unknown start 'gready'; did you mean greedy"):
            agent(start="gready")
    with pytest.raises(ValueError, match=r"survivors of at least 1 .* got 32, 0 and 1"):
        EvopressAgent(survivors=0)
    with pytest.raises(ValueError, match="expected a tournament of 1 to 2 members, the population; got 3"):
        EvopAgent(population=2)
