"""EvoP and EvoPress find known optima, spend what they are given and no more, and repeat themselves."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from agents.base import SearchResult, Task
from agents.evop import EvopAgent, two_point_crossover
from agents.evopress import EvopressAgent, mutate
from agents.grains import GRAINS
from rap_env.errors import UnknownName
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.perplexity import PerplexityEvaluator, window_losses
from rap_env.evaluation.store import ResultStore
from rap_env.importance.source import ImportanceSource
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario, scenario_grid
from rap_env.policies import RandomPolicy
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.agents.test_agents import LastIsLeast, mean_score, optimum
from tests.conftest import TOY_WINDOWS, CountingEvaluator

AGENTS = {"evop": EvopAgent, "evopress": EvopressAgent}
EXHAUSTIVE = {
    "evop": {"population": 40, "generations": 20, "mutation": 0.05},
    "evopress": {"generations": 40, "cheap_windows": 0},
}


class Dear(CountingEvaluator):
    """Says that it forwards 320 tokens for each mask: twenty times a window's 16."""

    identity = {"evaluator": "dear"}

    def judge(self, mask) -> Evaluation:
        return replace(super().judge(mask), tokens=320)


def grid_of(llm) -> list[Scenario]:
    return scenario_grid(llm.shape, [(1, 128), (4, 512), (16, 2048)], [0.9, 0.8, 0.7, 0.6])


@pytest.fixture
def grid(tiny_llm) -> list[Scenario]:
    return grid_of(tiny_llm)


@pytest.fixture(scope="module")
def tall_llm():
    """24 components: more masks fit than any of these searches can ask about."""
    return build_tiny_llm(n_layers=12)


@pytest.fixture
def make_task(tiny_llm, toy_sampler, tmp_path):
    """A task in component order, the worst one for `LastIsLeast`, with a problem of its own."""

    def make(limit: int | None = None, seed: int = 0, evaluator=None, llm=tiny_llm, store=None) -> Task:
        problem = PruningProblem(llm, evaluator or LastIsLeast(), store, budget=EvaluationBudget(limit))
        importance = ImportanceSource([component.name for component in llm.shape.components])
        return Task(problem, importance, toy_sampler, grid_of(llm), TOY_WINDOWS, seed, tmp_path / "training")

    return make


def decided(result: SearchResult, grid: list[Scenario]) -> list[PruningMask]:
    return [result.policy.decide(scenario.workload, scenario.budget_bytes) for scenario in grid]


@pytest.mark.parametrize("name", AGENTS)
def test_search_finds_the_optimum_that_random_masks_miss(name, make_task, tiny_llm, grid):
    best = np.mean([optimum(tiny_llm.shape, scenario) for scenario in grid])
    chance = np.mean([mean_score(RandomPolicy(tiny_llm.shape, seed), grid) for seed in range(20)])
    for seed in range(3):
        policy = AGENTS[name](**EXHAUSTIVE[name]).search(make_task(seed=seed)).policy
        assert mean_score(policy, grid) == pytest.approx(best)
    assert chance < 0.9 * best


@pytest.mark.parametrize("grain", ["layer", "equal_counts"])
@pytest.mark.parametrize("name", AGENTS)
def test_counted_grains_find_the_best_of_their_own_masks(name, grain, make_task, tiny_llm, grid):
    task = make_task()
    result = AGENTS[name](grain, **EXHAUSTIVE[name]).search(task)
    for scenario, mask in zip(grid, decided(result, grid), strict=True):
        n_dropped = GRAINS[grain](tiny_llm.shape, scenario).n_dropped
        assert [component.layer for component in mask.dropped] == [
            layer for layer in range(4 - n_dropped, 4) for _kind in range(2)
        ], "the last layers are the least important ones"
    assert result.details["searches"] < len(grid)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", AGENTS)
def test_every_judged_mask_fits_a_scenario_of_the_grid(name, grain, make_task, tiny_llm, grid, monkeypatch):
    task = make_task(60)
    asked, evaluate_many = [], task.problem.evaluate_many
    monkeypatch.setattr(task.problem, "evaluate_many", lambda cases: asked.extend(cases) or evaluate_many(cases))
    AGENTS[name](grain, generations=5).search(task)
    assert asked
    for mask, workload, budget_bytes in asked:
        assert Scenario(workload, budget_bytes) in grid
        assert footprint(tiny_llm.shape, mask, workload).peak_bytes <= budget_bytes


@pytest.mark.parametrize("limit", [1, 7, 40])
@pytest.mark.parametrize("name", AGENTS)
def test_search_spends_its_whole_budget_and_not_more(name, limit, make_task, tall_llm):
    task = make_task(limit, evaluator=CountingEvaluator(), llm=tall_llm)
    result = AGENTS[name]().search(task)
    assert result.evaluations == task.problem.budget.spent == task.problem.fresh_evaluations == limit
    assert result.calibration_tokens == 0, "a first stage that costs more than the judge is left out"


@pytest.mark.parametrize("name", AGENTS)
def test_scenarios_share_the_budget_equally(name, make_task, tall_llm):
    spent, done = [], []
    task = replace(
        make_task(20, evaluator=CountingEvaluator(), llm=tall_llm),
        progress=lambda *now: done.append(now),
        log=lambda step, metrics: spent.append(step),
    )
    far_apart = scenario_grid(tall_llm.shape, [(1, 128)], [0.8, 0.7, 0.6, 0.5])
    AGENTS[name]().search(replace(task, grid=far_apart))
    assert spent == [5, 10, 15, 20]
    assert done == sorted(done) and {(of_scenario, 20) for of_scenario in spent} <= set(done)


@pytest.mark.parametrize("name", AGENTS)
def test_used_up_budget_and_empty_grid_leave_the_importance_order(name, make_task, grid):
    for task in (make_task(0), replace(make_task(), grid=[])):
        result = AGENTS[name]().search(task)
        assert result.evaluations == 0
        assert decided(result, grid) == decided(AGENTS[name]().search(make_task(0)), grid)


@pytest.mark.parametrize("name", AGENTS)
def test_seed_decides_the_search_and_a_killed_one_repeats_itself_from_the_store(name, make_task, tall_llm, tmp_path):
    class Killed(Exception):
        pass

    class Killer(Dear):
        def judge(self, mask):
            if self.calls > 8:
                raise Killed
            return super().judge(mask)

    def task_with(evaluator, seed: int = 0, store=None) -> Task:
        return make_task(24, seed, evaluator, tall_llm, store)

    store = ResultStore(tmp_path / "results.db")
    with pytest.raises(Killed):
        AGENTS[name](generations=10).search(task_with(Killer(), store=store))
    task, twin, other = task_with(Dear(), store=store), task_with(Dear()), task_with(Dear(), seed=1)
    result, again, _another = (AGENTS[name](generations=10).search(each) for each in (task, twin, other))
    assert result == replace(again, policy=result.policy)
    assert result.policy.parameters() == again.policy.parameters()
    assert task.problem.budget.asked == twin.problem.budget.asked != other.problem.budget.asked
    assert task.problem.fresh_evaluations == result.evaluations - 8


def test_first_stage_pays_for_the_tokens_that_it_forwards(make_task, tall_llm):
    result = EvopressAgent().search(make_task(40, evaluator=Dear(), llm=tall_llm))
    cheap, full = result.calibration_tokens / 16, result.evaluations
    assert cheap == int(cheap) and cheap > full
    assert 39 < full + cheap / 20 <= 40


def test_first_stage_lets_the_lowest_calibration_losses_pass(make_task, tall_llm):
    task = make_task(4, evaluator=Dear(), llm=tall_llm)
    scenario = task.grid[3]
    EvopressAgent(generations=0).search(replace(task, grid=[scenario]))
    generator, grain = np.random.default_rng(0), GRAINS["block"](tall_llm.shape, scenario)
    masks = list(dict.fromkeys(grain.mask(grain.random(generator)) for _ in range(64)))
    # Of 4 evaluations the first tells what one costs, and 2 are kept for the survivors: 1 pays for 20 candidates.
    losses = {mask: loss for mask, (loss,) in window_losses(tall_llm, TOY_WINDOWS[:1], masks[:20])}
    passed = sorted(losses, key=losses.__getitem__)[:2]
    assert task.problem.budget.asked == {mask.digest for mask in (masks[0], *passed)}


@pytest.mark.parametrize("name", AGENTS)
def test_greedy_start_is_never_worse_than_the_importance_order(name, make_task, tiny_llm, grid):
    evaluator = PerplexityEvaluator(TOY_WINDOWS, "toy")
    task = make_task(24, evaluator=evaluator)
    result = AGENTS[name](start="greedy").search(task)
    order = decided(AGENTS[name](start="greedy").search(make_task(0)), grid)
    free = PruningProblem(tiny_llm, evaluator)

    def scores(masks: list[PruningMask]) -> np.ndarray:
        cases = [(mask, each.workload, each.budget_bytes) for mask, each in zip(masks, grid, strict=True)]
        return np.array([outcome.score for outcome in free.evaluate_many(cases)])

    assert (scores(decided(result, grid)) >= scores(order)).all()


def test_mutation_swaps_within_a_kind_and_trades_only_where_bytes_decide(tiny_llm, grid):
    generator = np.random.default_rng(0)
    scenario = grid[2]
    for name, traded in (("block", True), ("equal_counts", False), ("layer", False)):
        grain = GRAINS[name](tiny_llm.shape, scenario)
        parent = grain.random(generator)
        children = [mutate(parent, grain, generator) for _ in range(50)]
        counts = {tuple(np.bincount(grain.kinds[~child], minlength=2)) for child in children}
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
        with pytest.raises(UnknownName, match="unknown grain 'blok'; did you mean block"):
            agent(grain="blok")
        with pytest.raises(UnknownName, match="unknown start 'gready'; did you mean greedy"):
            agent(start="gready")
    with pytest.raises(ValueError, match=r"survivors of at least 1 .* got 32, 0 and 1"):
        EvopressAgent(survivors=0)
    with pytest.raises(ValueError, match="expected a tournament of 1 to 2 members, the population; got 3"):
        EvopAgent(population=2)
