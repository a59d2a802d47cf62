"""Runs whose masks are evaluated by workers, and the benchmark of these: here the workers are in this process."""

import sys

import pytest

from experiments.benchmarks.queueing import Costs, largest, throughput
from experiments.benchmarks.workers import SIZES
from tests.evaluation.worker_cases import FakeRay
from tests.experiments.test_benchmark import results_of  # noqa: F401 - a fixture


@pytest.fixture
def fake_ray(monkeypatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


@pytest.mark.parametrize("granularity", ["block", "group"])
def test_a_run_with_workers_ends_with_the_record_of_one_without(run_here, tmp_path, fake_ray, granularity):
    options = ("agent=random_search", f"model.granularity={granularity}", "token_budget=20000")
    alone = run_here(tmp_path / "alone" / "run", *options)["results"]
    assert fake_ray.started == 0
    helped = run_here(tmp_path / "helped" / "run", *options, "workers=ray")["results"]  # another cache folder
    assert fake_ray.started == 2
    assert helped["search"]["fresh_evaluations"] == alone["search"]["fresh_evaluations"] > 5
    assert helped["anytime"] == alone["anytime"] and helped["dense"] == alone["dense"]
    for key in ("dropped", "search", "reports"):
        assert [row[key] for row in helped["rows"]] == [row[key] for row in alone["rows"]]


def test_a_table_needs_no_workers(run_here, tmp_path, fake_ray):
    run_here(tmp_path / "run", "experiment=table", "agent=random_search", "workers=ray", "token_budget=100000")
    assert fake_ray.started == 0


def test_workers_are_measured_against_one_process(results_of, fake_ray):  # noqa: F811
    results = results_of("workers")
    assert results["identical"] and len(results["task_seconds"]) == 3
    assert all(len(results["seconds"][way]) == 1 for way in ("one worker", "two workers", "one process", "two lanes"))
    store = results["stores"]["sqlite"]
    assert store["result_bytes"] > 100 and store["claim_seconds"] > 0 and store["put_seconds"] > 0
    assert [row["sizes"] for row in results["simulated"]] == [list(SIZES)] * 4


def test_workers_that_never_wait_are_as_fast_as_many_alone():
    costs = Costs([1.0], batch=0.0, store=0.0)
    assert throughput(costs, 1) == pytest.approx(1.0)
    assert throughput(costs, 100) == pytest.approx(100.0, rel=0.1)
    assert largest(costs, 0.9, SIZES) == 1000


def test_one_driver_is_as_fast_as_it_hands_out_and_several_are_as_fast_as_the_store():
    costs = Costs([1.0, 3.0], batch=0.04, store=0.01)  # a batch of 4 takes the driver 0.08 s, the store 0.04 s of these
    assert throughput(costs, 1) == pytest.approx(0.5, rel=0.1)
    assert throughput(costs, 1000) == pytest.approx(4 / 0.08, rel=0.02)
    assert throughput(costs, 1000, workers_each=10) == pytest.approx(4 / 0.04, rel=0.05)
    assert 64 <= largest(costs, 0.9, SIZES) <= 128 < largest(costs, 0.5, SIZES, workers_each=10) <= 256
