"""A sweep's jobs have a record each, whatever launcher runs them; finished ones are skipped."""

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import compare, sweep_report
from experiments.recipes.measure import anytime, best_so_far, count_violations
from experiments.records import read_record
from rap_env.errors import InfeasibleBudget
from rap_env.mask import PruningMask
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy, OrderPolicy

PROJECT = Path(__file__).parents[2]
TINY = (
    *("model=tiny", "token_budget=4000", "decisions=20", "calibration.tokens_per_sample=24", "agent=random_search"),
    *("evaluation.search_windows=[2,24]", "evaluation.report_windows=[2,24]", "seed=0,1,2,3", "tracker=none"),
    "evaluation._target_=tests.experiments.counted.counted_halves",
)
NAMES = [f"random_search-{seed}" for seed in range(4)]
LAUNCHERS = {
    "joblib": ("hydra/launcher=processes",),
    "ray": ("hydra/launcher=ray_cluster", "+hydra.launcher.ray.init.num_cpus=2"),
}


class Swept(types.SimpleNamespace):
    """A finished sweep: its folder, what it said, and a line for each mask that was measured."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS])
def swept(tmp_path_factory, request) -> Swept:
    """The default experiment on two workers at once."""
    if request.param == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is not installed")
    folder = tmp_path_factory.mktemp("compare")
    paths = {"RAP_CACHE": folder / "cache", "MEASURED": folder / "measured", "PYTHONPATH": PROJECT}
    environment = os.environ | {name: str(path) for name, path in paths.items()} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "experiments.compare", *TINY, *LAUNCHERS[request.param]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    measured = (folder / "measured").read_text().splitlines()
    return Swept(folder=folder / "outputs" / "compare" / "family_quick", said=done.stdout, measured=measured)


def test_every_agent_and_seed_has_a_record_in_a_folder_of_its_name(swept):
    assert sorted(path.parent.name for path in swept.folder.glob("*/record.json")) == NAMES
    for seed, name in enumerate(NAMES):
        results = read_record(swept.folder / name / "record.json")["results"]
        assert (results["agent"], results["seed"]) == ("random_search", seed)
        assert len(results["rows"]) == 12 + 4 and results["search"]["evaluations"] > 10


def test_workers_measure_nothing_twice(swept):
    assert len(swept.measured) > 40
    assert len(set(swept.measured)) == len(swept.measured)


def test_sweep_ends_with_the_report_and_its_page(swept):
    assert "| random_search |" in swept.said and f"records: {Path('outputs', 'compare', 'family_quick')}" in swept.said
    assert (swept.folder / "page.html").is_file()


def test_same_sweep_again_does_only_what_is_missing(swept, train_here, monkeypatch):
    records = {name: (swept.folder / name / "record.json") for name in NAMES}
    before = {name: path.read_bytes() for name, path in records.items()}
    first = read_record(records[NAMES[2]])["results"]
    records[NAMES[2]].unlink()
    monkeypatch.setenv("MEASURED", os.devnull)
    monkeypatch.chdir(swept.folder.parents[2])
    said, code = train_here(swept.folder.parents[2] / "cache", "-m", "experiment=family_quick", *TINY)
    assert not code, said
    again = read_record(records.pop(NAMES[2]))["results"]
    assert {name: path.read_bytes() == before[name] for name, path in records.items()} == dict.fromkeys(records, True)
    assert again["search"]["fresh_evaluations"] == 0 and again["anytime"] == first["anytime"]


def test_refused_job_costs_no_other_and_the_sweep_ends_with_an_error(tmp_path, train_here):
    arguments = ("-m", "experiment=smoke", "agent=random", "seed=0,-1,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    said, code = train_here(tmp_path / "cache", *arguments)
    assert code == 1
    assert said.count("error: seed: expected a whole number of at least 0; got -1\n") == 1
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/record.json")) == ["0", "2"]


def test_compare_is_a_multirun_of_train_with_a_small_family_for_a_default(monkeypatch):
    calls = []
    monkeypatch.setattr("train.main", lambda: calls.append(sys.argv[1:]))
    for arguments in ([], ["seed=1"], ["experiment=policies", "seed=1"]):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        compare.main()
    assert calls == [
        ["--multirun", "experiment=family_quick"],
        ["--multirun", "experiment=family_quick", "seed=1"],
        ["--multirun", "experiment=policies", "seed=1"],
    ]


def test_sweep_over_what_may_not_differ_says_why_it_has_no_report(tmp_path, monkeypatch, capsys):
    def refuse(records, page):
        raise ValueError("their evaluation differ")

    monkeypatch.setitem(sys.modules, "experiments.report", types.SimpleNamespace(report_on=refuse))
    monkeypatch.setattr(sweep_report, "read_records", lambda folder: [{}])
    sweep_report.report_sweep(tmp_path)
    assert capsys.readouterr().out == f"no report: their evaluation differ\nrecords: {tmp_path}\n"


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    dense = PruningMask.all_kept(tiny_llm.shape)
    return [dense, dense.drop("layer0.attention", "layer0.mlp"), dense.drop("layer3.attention", "layer3.mlp")]


def test_the_anytime_curve_follows_the_best_mask_that_fits(toy_problem, masks):
    shape, work = toy_problem.shape, Workload(1, 128)
    grid = [Scenario.from_ratio(shape, work, ratio) for ratio in (1.0, 0.9)]
    toy_problem.meter.evaluate(masks)
    best = best_so_far([masks[0], masks[2], masks[1]], toy_problem, grid)
    # the dense mask (score 1) fits the first budget only; dropping components 6, 7 leaves 1 - 15/36, 0 and 1 1 - 3/36
    assert best.tolist() == [[1.0, -np.inf], [1.0, pytest.approx(21 / 36)], [1.0, pytest.approx(33 / 36)]]
    curve = [[70, pytest.approx((1 + 21 / 36) / 2)], [100, pytest.approx((1 + 33 / 36) / 2)]]
    assert anytime(best, [40, 70, 100]) == curve
    assert anytime(best_so_far([], toy_problem, grid), []) == []


def test_anytime_curve_names_only_changes_and_the_last_evaluation():
    best = np.array([[-math.inf], [1.0], [1.0], [2.0], [2.0]])
    assert anytime(best, [1, 2, 3, 4, 5]) == [[2, 1.0], [4, 2.0], [5, 2.0]]


def test_violations_are_counted_in_scenarios_that_are_the_same_for_all(tiny_llm, toy_sampler):
    class Refuses(DensePolicy):
        def decide(self, workload, budget_bytes):
            raise InfeasibleBudget(budget_bytes, budget_bytes + 1, workload)

    shape = tiny_llm.shape
    order = OrderPolicy(shape, [component.name for component in shape.components])
    assert count_violations(order, toy_sampler, 30) == 0
    assert count_violations(DensePolicy(shape), toy_sampler, 30) == 30
    assert count_violations(Refuses(shape), toy_sampler, 30) == 30
