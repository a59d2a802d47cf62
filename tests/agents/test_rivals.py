"""Searches that judge masks: what they find where the optimum is known, and how they end."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from agents.archive import ArchiveAgent, swap_one
from agents.base import SearchResult, Task
from agents.judging import Judging
from agents.random_search import RandomSearchAgent
from rap_env.evaluation.store import ResultStore
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import scenario_grid
from rap_env.policies import OrderPolicy, RandomPolicy
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.agents.test_agents import LastIsLeast, masks, mean_score, optimum
from tests.conftest import TOY_WINDOWS

SEARCHES = [RandomSearchAgent, ArchiveAgent]


@pytest.fixture
def task(tiny_llm, toy_sampler, tmp_path) -> Callable[..., Task]:
    """Makes a task whose given order is the wrong way round, for a problem with a limit and a store."""
    grid = scenario_grid(tiny_llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])
    importance = ImportanceSource([component.name for component in tiny_llm.shape.components])

    def make(limit: int | None, seed: int = 0, store: ResultStore | None = None, evaluator=None) -> Task:
        problem = PruningProblem(tiny_llm, evaluator or LastIsLeast(), store, budget=EvaluationBudget(limit))
        return Task(problem, importance, toy_sampler, grid, TOY_WINDOWS, seed, tmp_path)

    return make


def mean_optimum(task: Task) -> float:
    return float(np.mean([optimum(task.problem.shape, scenario) for scenario in task.grid]))


def same(left: SearchResult, right: SearchResult) -> bool:
    return left.policy.parameters() == right.policy.parameters() and left.evaluations == right.evaluations


@pytest.mark.parametrize("seed", range(3))
def test_more_evaluations_bring_random_search_from_chance_towards_the_optimum(task, seed):
    few, many = (RandomSearchAgent().search(task(limit, seed)) for limit in (12, 100))
    grid, shape = task(1).grid, task(1).problem.shape
    chance = np.mean([mean_score(RandomPolicy(shape, seed), grid) for seed in range(20)])
    assert chance < mean_score(few.policy, grid) < mean_score(many.policy, grid) <= mean_optimum(task(1))
    assert (few.evaluations, many.evaluations) == (12, 100)


@pytest.mark.parametrize("seed", range(3))
def test_local_search_beats_the_order_that_it_starts_from_and_nears_the_optimum(task, seed):
    given = task(60, seed)
    result = ArchiveAgent().search(given)
    start = mean_score(OrderPolicy(given.problem.shape, given.importance.static), given.grid)
    best = mean_optimum(given)
    assert start + 0.1 < mean_score(result.policy, given.grid) <= best
    assert mean_score(result.policy, given.grid) > 0.95 * best
    assert result.evaluations == given.problem.budget.spent == 60


@pytest.mark.parametrize("agent", SEARCHES)
def test_without_any_limit_a_search_ends_when_the_model_has_no_new_masks(agent, task):
    given = task(None)
    result = agent().search(given)
    assert 50 < result.evaluations <= 256
    assert mean_score(result.policy, given.grid) == pytest.approx(mean_optimum(given))


@pytest.mark.parametrize("agent", SEARCHES)
def test_a_search_asks_for_no_more_than_it_may(agent, task):
    for limit, evaluations, expected in [(20, None, 20), (20, 7, 7), (7, 20, 7), (None, 7, 7), (20, 0, 0), (0, 5, 0)]:
        given = task(limit)
        assert agent(evaluations).search(given).evaluations == expected
        assert given.problem.evaluator.calls == given.problem.budget.spent == expected


@pytest.mark.parametrize("agent", SEARCHES)
def test_a_search_that_may_judge_nothing_still_serves_every_scenario(agent, task):
    given = task(0)
    for mask, scenario in zip(masks(agent().search(given).policy, given.grid), given.grid, strict=True):
        assert footprint(given.problem.shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes


@pytest.mark.parametrize("agent", SEARCHES)
def test_a_killed_search_repeats_itself_from_the_stored_evaluations(agent, task, tmp_path):
    class Killed(Exception):
        pass

    class Deadly(LastIsLeast):
        def judge(self, mask):
            if self.calls > 23:
                raise Killed
            return super().judge(mask)

    whole = agent().search(task(40))
    with ResultStore(tmp_path / "results.db") as store:
        with pytest.raises(Killed):
            agent().search(task(40, store=store, evaluator=Deadly()))
        again = task(40, store=store)
        assert same(agent().search(again), whole)
    assert again.problem.evaluator.calls == 40 - 23


@pytest.mark.parametrize("agent", SEARCHES)
def test_what_others_asked_is_neither_counted_nor_left_out(agent, task):
    given, scenario = task(30), task(30).grid[0]
    given.problem.evaluate(PruningMask.all_kept(given.problem.shape), scenario.workload, scenario.budget_bytes)
    assert agent().search(given).evaluations == 29
    assert given.problem.budget.spent == 30


def test_judging_is_cut_where_the_evaluations_end(task):
    given = task(5)
    scenario, dense = given.grid[-1], PruningMask.all_kept(given.problem.shape)
    nested = [dense.drop(*given.importance.static[:n]) for n in range(4, 9)]
    given.problem.evaluate(nested[3], scenario.workload, scenario.budget_bytes)
    log, progress = [], []
    given = replace(given, log=lambda *entry: log.append(entry), progress=lambda *entry: progress.append(entry))
    judging = Judging(given, evaluations=3)
    assert judging.judge([(mask, scenario) for mask in (nested[0], nested[1])]) == 2
    # One more may be asked about: the third. The fourth was asked about before, so it is free; the fifth is too many.
    assert judging.judge([(mask, scenario) for mask in nested]) == 2
    assert set(judging.rewards) == set(nested[:4]) and judging.spent == judging.allowed == 3
    # Dropping the first 4, 5, 6 and 7 of 8 costs 26, 30, 33 and 35 of 36.
    assert [judging.rewards[mask] for mask in nested[:4]] == pytest.approx([10 / 36, 6 / 36, 3 / 36, 1 / 36])
    assert log == [(2, {"reward": pytest.approx(8 / 36)}), (3, {"reward": pytest.approx(2 / 36)})]
    assert progress == [(2, 3), (3, 3)]
    assert judging.judge([(nested[4], scenario)]) == 0 and judging.judge([]) == 0


def test_judging_remembers_rewards_not_scores(tiny_llm, task):
    given = task(5)
    problem = PruningProblem(tiny_llm, LastIsLeast(), reward_weights={"accuracy": 0.5, "smooth_accuracy": 0.25})
    judging, mask = Judging(replace(given, problem=problem)), PruningMask.all_kept(tiny_llm.shape).drop("layer0.mlp")
    judging.judge([(mask, given.grid[0])])
    assert judging.rewards == {mask: pytest.approx(0.75 * 29 / 36)}


def test_a_negative_number_of_evaluations_is_refused(task):
    with pytest.raises(ValueError, match="expected at least 0 evaluations; got -1"):
        RandomSearchAgent(-1).search(task(5))


def test_neighbours_fit_and_differ_by_one_swap_where_bytes_are_equal(tiny_llm):
    shape, generator = tiny_llm.shape, np.random.default_rng(0)
    order = [component.name for component in shape.components]
    (scenario,) = scenario_grid(shape, [(1, 96)], [0.7])  # 96 tokens: attentions and MLPs free the same bytes
    mask, seen = OrderPolicy(shape, order).decide(scenario.workload, scenario.budget_bytes), set()
    for _ in range(200):
        neighbour = swap_one(mask, scenario, shape, order, generator)
        assert footprint(shape, neighbour, scenario.workload).peak_bytes <= scenario.budget_bytes
        changed = {
            c.name for c, old, new in zip(shape.components, mask.keep, neighbour.keep, strict=True) if old != new
        }
        assert len(changed) == 2 and len(neighbour.kept) == len(mask.kept)
        seen.add(neighbour)
    assert len(seen) == len(mask.kept) * len(mask.dropped)  # every pair


def test_neighbours_fit_where_bytes_differ(tiny_llm, toy_sampler):
    shape, generator = tiny_llm.shape, np.random.default_rng(1)
    order = [component.name for component in shape.components]
    for _ in range(100):
        scenario = toy_sampler.sample(shape, generator)
        mask = RandomPolicy(shape, 3).decide(scenario.workload, scenario.budget_bytes)
        neighbour = swap_one(mask, scenario, shape, order, generator)
        assert footprint(shape, neighbour, scenario.workload).peak_bytes <= scenario.budget_bytes


@pytest.mark.parametrize("keep", [True, False])
def test_with_nothing_to_swap_a_mask_is_its_own_neighbour(tiny_llm, keep):
    shape = tiny_llm.shape
    (scenario,) = scenario_grid(shape, [(1, 96)], [1.0])
    mask = PruningMask(shape.components, (keep,) * 8)
    assert swap_one(mask, scenario, shape, [], np.random.default_rng(0)) == mask


def test_searches_differ_by_seed_only(task):
    for agent in SEARCHES:
        results = [agent().search(task(40, seed)) for seed in (0, 0, 1)]
        assert same(results[0], results[1])
        assert not all(same(*pair) for pair in itertools.combinations(results, 2))
