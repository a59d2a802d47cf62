"""Random search and local search: what they find where the optimum is known, and the swaps between."""

import itertools

import numpy as np
import pytest

from agents.archive import LocalSearchAgent, swap_one
from agents.driver import run_search
from agents.random_search import RandomSearchAgent
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.scenario import scenario_grid
from rap_env.policies import OrderPolicy, RandomPolicy
from tests.agents.cases import (
    WITHOUT_LIMIT,
    EachCosts,
    build_agent,
    decided,
    fits,
    make_task,
    mean_score,
    names_of,
    optimum,
)

SEARCHES = [RandomSearchAgent, LocalSearchAgent]


def mean_optimum(task) -> float:
    return float(np.mean([optimum(task.problem.shape, scenario) for scenario in task.scenarios]))


@pytest.fixture(scope="module")
def tall_llm():
    return build_tiny_llm(n_layers=12)


@pytest.mark.parametrize("seed", range(3))
def test_more_evaluations_bring_random_search_from_chance_towards_the_optimum(tiny_llm, seed):
    task = make_task(tiny_llm)
    few, many = (run_search(RandomSearchAgent(), make_task(tiny_llm, limit, seed=seed)) for limit in (12, 100))
    chance = np.mean([mean_score(RandomPolicy(tiny_llm.shape, other), task.scenarios) for other in range(20)])
    reached = [mean_score(result.policy, task.scenarios) for result in (few, many)]
    assert chance < reached[0] < reached[1] <= mean_optimum(task)
    assert (few.evaluations, many.evaluations) == (12, 100)


@pytest.mark.parametrize("seed", range(3))
def test_local_search_beats_the_order_that_it_starts_from_and_nears_the_optimum(tiny_llm, seed):
    task = make_task(tiny_llm, 60, seed=seed)
    result = run_search(LocalSearchAgent(), task)
    start = mean_score(OrderPolicy(tiny_llm.shape, names_of(tiny_llm)), task.scenarios)
    reached, best = mean_score(result.policy, task.scenarios), mean_optimum(task)
    assert start + 0.1 < reached <= best and reached > 0.95 * best
    assert result.evaluations == 60


@pytest.mark.parametrize("name", ["archive", "evop", "evopress", pytest.param("surrogate", marks=pytest.mark.slow)])
def test_searches_beat_random_search_in_a_large_space(name, tall_llm, monkeypatch):
    monkeypatch.setattr("agents.surrogate._PREDICTED", 0)
    limit, gained = (100, 0.1) if name == "surrogate" else (160, 0.02)

    def reached(name: str, seed: int) -> float:
        scenarios = {"workloads": [(1, 128), (16, 2048)], "ratios": [0.8, 0.6]}
        task = make_task(tall_llm, limit, EachCosts(), seed=seed, **scenarios)
        return mean_score(run_search(build_agent(name), task).policy, task.scenarios, EachCosts.rule)

    gains = [reached(name, seed) - reached("random_search", seed) for seed in range(3)]
    assert np.mean(gains) > gained


@pytest.mark.parametrize("agent", SEARCHES)
def test_a_search_ends_when_the_model_has_no_new_masks(agent, tiny_llm):
    task = make_task(tiny_llm, WITHOUT_LIMIT)
    result = run_search(agent(), task)
    assert 50 < result.evaluations <= 256
    assert mean_score(result.policy, task.scenarios) == pytest.approx(mean_optimum(task))


@pytest.mark.parametrize("agent", SEARCHES)
def test_without_scenarios_only_local_search_finds_some_to_search_for(agent, tiny_llm):
    task = make_task(tiny_llm, 30, workloads=[])
    result = run_search(agent(), task)
    assert result.evaluations == (30 if agent is LocalSearchAgent else 0)
    grid = make_task(tiny_llm).scenarios
    assert all(fits(mask, tiny_llm.shape, case) for mask, case in zip(decided(result.policy, grid), grid, strict=True))


def test_neighbours_fit_and_differ_by_one_swap_where_bytes_are_equal(tiny_llm):
    shape, generator, order = tiny_llm.shape, np.random.default_rng(0), names_of(tiny_llm)
    (scenario,) = scenario_grid(shape, [(1, 96)], [0.7])  # 96 tokens: attentions and MLPs free the same bytes
    mask, seen = OrderPolicy(shape, order).decide(scenario.workload, scenario.budget_bytes), set()
    for _ in range(200):
        neighbour = swap_one(mask, scenario, shape, order, generator)
        assert fits(neighbour, shape, scenario)
        assert sum(old != new for old, new in zip(mask.keep, neighbour.keep, strict=True)) == 2
        assert len(neighbour.kept) == len(mask.kept)
        seen.add(neighbour)
    assert seen == {mask.drop(kept).restore(gone) for kept, gone in itertools.product(mask.kept, mask.dropped)}


def test_neighbours_fit_where_bytes_differ(tiny_llm, toy_sampler):
    shape, generator = tiny_llm.shape, np.random.default_rng(1)
    for _ in range(100):
        scenario = toy_sampler.sample(shape, generator)
        mask = RandomPolicy(shape, 3).decide(scenario.workload, scenario.budget_bytes)
        assert fits(swap_one(mask, scenario, shape, names_of(tiny_llm), generator), shape, scenario)


@pytest.mark.parametrize("keep", [True, False])
def test_with_nothing_to_swap_a_mask_is_its_own_neighbour(tiny_llm, keep):
    (scenario,) = scenario_grid(tiny_llm.shape, [(1, 96)], [1.0])
    mask = PruningMask(tiny_llm.shape.components, (keep,) * 8)
    assert swap_one(mask, scenario, tiny_llm.shape, [], np.random.default_rng(0)) == mask
