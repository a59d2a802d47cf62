"""A comparison runs from nothing, writes each search at once, goes on after a kill, and counts what agents ask."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.comparison import Comparison
from experiments.entry import OrderedBudget, anytime, best_so_far, count_violations
from experiments.page import page
from experiments.records import read_record
from rap_env.errors import InfeasibleBudget, SearchExhausted
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy, OrderPolicy

PROJECT = Path(__file__).parents[2]
TINY = (
    *("model=tiny", "max_evaluations=40", "decisions=20", "calibration.tokens_per_sample=24"),
    *("evaluation.search_windows=[2,24]", "evaluation.report_windows=[2,24]"),
    *("+evaluation@report.tasks=embedded", "report.tasks.limit=2"),
    *(f"~agents.{name}" for name in ("dense", "greedy_per_byte", "milp", "archive", "evopress")),
    *("agents.random=2", "agents.ppo=1", "agents.surrogate=1"),
)
NAMES = ["greedy_gsi-0", "ppo-0", "random-0", "random-1", "surrogate-0"]


def compare(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.compare", *TINY, *overrides]
    environment = {"RAP_CACHE": str(folder / "cache"), "PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def records(folder) -> Path:
    """The folder of a finished comparison."""
    done = compare(folder)
    assert done.returncode == 0, done.stderr
    assert "| ppo | 1 |" in done.stdout and "page: " in done.stdout
    return folder / "outputs" / "compare" / "quick"


def test_every_agent_and_seed_has_a_record(records):
    assert sorted(path.stem for path in records.glob("*.json")) == NAMES
    for name in NAMES:
        record = read_record(records / f"{name}.json")
        results = record["results"]
        assert f"{results['agent']}-{results['seed']}" == name
        assert record["config"]["seed"] == results["seed"] and "_target_" in record["config"]["agent"]
        assert len(results["rows"]) == 4 * 3 and results["unseen"] == {"decisions": 20, "violations": 0}
        for row in results["rows"]:
            assert row["reports"].keys() == {"packaged_text", "tasks"} and not row["violation"]
            assert row["footprint"]["peak_bytes"] <= row["budget_bytes"]
            assert row["decision_milliseconds"] > 0
            assert row["score"] == pytest.approx(-next(iter(row["tasks"].values()))["loss"])


def test_everyone_has_the_same_budget_and_its_use_is_recorded(records):
    ppo, greedy = (read_record(records / f"{name}-0.json")["results"] for name in ("ppo", "greedy_gsi"))
    assert 0 < ppo["search"]["evaluations"] <= 40 and greedy["search"]["evaluations"] == 0
    assert ppo["search"]["peak_bytes"] > greedy["search"]["peak_bytes"] > 0, "judging takes memory beside the weights"
    assert greedy["anytime"] == [] and ppo["anytime"][-1][0] == ppo["search"]["evaluations"]
    means = [mean for _step, mean in ppo["anytime"]]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(np.mean([row["best_asked"] for row in ppo["rows"]]))


def test_page_is_what_the_report_makes_of_the_records(records):
    made = page(Comparison.read([records / f"{name}.json" for name in NAMES]))
    assert (records / "page.html").read_text() == made
    assert (records / "tracker" / "regret.plotly.json").is_file()


def test_what_is_finished_is_skipped_and_what_is_missing_comes_from_the_store(folder, records):
    before = {path.name: path.read_bytes() for path in records.glob("*.json")}
    (records / "ppo-0.json").unlink()
    done = compare(folder, "agents.random=3")  # a seed that joins later, too
    assert done.returncode == 0, done.stderr
    again = json.loads((records / "ppo-0.json").read_text())["results"]
    first = json.loads(before.pop("ppo-0.json"))["results"]
    assert {path.name: path.read_bytes() for path in records.glob("*.json") if path.name in before} == before
    assert (records / "random-2.json").is_file()
    assert again["search"]["fresh_evaluations"] == 0 and first["search"]["fresh_evaluations"] > 0
    assert again["anytime"] == first["anytime"]
    assert [row["dropped"] for row in again["rows"]] == [row["dropped"] for row in first["rows"]]


def test_agents_may_be_told_other_scenarios_than_they_are_reported_on(folder, records):
    told = ("+workload.told.workloads=[[2,64]]", "+workload.told.budget_ratios=[0.7]")
    others = (f"agents.{name}=0" for name in ("greedy_gsi", "ppo", "random", "surrogate"))
    done = compare(folder, "name=told", "+agents.evop=1", *others, *told)
    assert done.returncode == 0, done.stderr
    results = read_record(folder / "outputs" / "compare" / "told" / "evop-0.json")["results"]
    assert results["search"]["details"] == {"searches": 1} and len(results["rows"]) == 4 * 3
    assert not any(row["violation"] or row["prompt_tokens"] == 64 for row in results["rows"])


def test_another_comparison_in_the_same_folder_is_refused(folder, records):
    done = compare(folder, "max_evaluations=39")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "of a comparison with another max_evaluations; give this one another `name`" in done.stderr


def test_a_setting_that_no_agent_has_is_refused(folder):
    done = compare(folder, "name=other", "+settings.ppo.total_stepz=3")
    assert done.returncode == 1
    assert "unknown setting of agent 'ppo' 'total_stepz'; did you mean total_steps?" in done.stderr


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    dense = PruningMask.all_kept(tiny_llm.shape)
    return [dense, dense.drop("layer0.attention", "layer0.mlp"), dense.drop("layer3.attention", "layer3.mlp")]


def test_a_budget_remembers_the_order_and_the_largest_batch(toy_problem, masks):
    problem = toy_problem.with_budget(OrderedBudget(3))
    case = (Workload(1, 128), 10**9)
    problem.evaluate(masks[1], *case)
    problem.evaluate_many([(mask, *case) for mask in (masks[1], masks[2], masks[0])])
    assert problem.budget.masks == [masks[1], masks[2], masks[0]] and problem.budget.largest_batch == 2
    with pytest.raises(SearchExhausted):
        problem.evaluate(masks[0].drop("layer1.mlp"), *case)
    assert problem.budget.spent == len(problem.budget.masks) == 3


def test_the_anytime_curve_follows_the_best_mask_that_fits(toy_problem, masks):
    shape, work = toy_problem.shape, Workload(1, 128)
    grid = [Scenario.from_ratio(shape, work, ratio) for ratio in (1.0, 0.9)]
    best = best_so_far([masks[0], masks[2], masks[1]], toy_problem, grid)
    # the dense mask (score 1) fits the first budget only; dropping components 6, 7 leaves 1 - 15/36, 0 and 1 1 - 3/36
    assert best.tolist() == [[1.0, -np.inf], [1.0, pytest.approx(21 / 36)], [1.0, pytest.approx(33 / 36)]]
    assert anytime(best) == [[2, pytest.approx((1 + 21 / 36) / 2)], [3, pytest.approx((1 + 33 / 36) / 2)]]
    assert anytime(best_so_far([], toy_problem, grid)) == []


def test_violations_are_counted_in_scenarios_that_are_the_same_for_all(tiny_llm, toy_sampler):
    class Refuses(DensePolicy):
        def decide(self, workload, budget_bytes):
            raise InfeasibleBudget(budget_bytes, budget_bytes + 1, workload)

    shape = tiny_llm.shape
    order = OrderPolicy(shape, [component.name for component in shape.components])
    assert count_violations(order, toy_sampler, 30) == 0
    assert count_violations(DensePolicy(shape), toy_sampler, 30) == 30
    assert count_violations(Refuses(shape), toy_sampler, 30) == 30
