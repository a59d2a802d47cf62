"""Replays: a whole one on a tiny model in real processes, and what its summary makes of what was told."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.report.serving import serving_memory_table, serving_table
from experiments.serving.child import Outcome, Sample
from experiments.serving.summary import summary
from experiments.serving.systems import OnlyKind, System, deciders_of, systems_of
from rap_env.components import ATTENTION
from rap_env.errors import InfeasibleBudget, UnknownName
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import PricedPolicy, save_policy

ROOT = Path(__file__).parents[2]
TINY = [
    *("model=tiny", "model.granularity=group", "widths.n_samples=2", "widths.tokens_per_sample=32"),
    *("calibration.n_samples=2", "calibration.tokens_per_sample=32", "evaluation.search_windows=[2,32]"),
    *("evaluation.report_windows=[2,64]", "token_budget=60000", "workload.search.workloads=[[1,32]]"),
    *("trace.n_requests=5", "trace.requests_per_second=50", "trace.longest_prompt=24", "trace.longest_generated=4"),
    *("memory.reference=[4,24]", "options.patience_seconds=0.2"),
]
SHAPE = build_tiny_llm().shape


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_systems_serve_in_processes_of_their_own_and_who_passes_the_limit_is_killed(tmp_path):
    """The model has 0.6 MB, less than a process's memory wavers by: so the limit is far away, or far below."""

    def run(name: str, share: float, systems: str) -> dict:
        folder = tmp_path / name
        arguments = [*TINY, f"systems=[{systems}]", f"hydra.run.dir={folder}"]
        arguments += ["+evaluation@report.tasks=embedded", "report.tasks.limit=4"]
        memory = ["memory.kind=constant", "~memory.settings", f"+memory.settings={{share: {share}}}"]
        environment = os.environ | {"RAP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "experiments.serve", *arguments, *memory]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert (folder / "serve.png").stat().st_size > 10_000
        return json.loads((folder / "serve.json").read_text())

    found = {"far": run("far", 1000, "greedy,dense_int8"), "near": run("near", 0.01, "greedy")}
    served = found["far"]["results"]["systems"]["greedy"]
    assert (served["served"], served["lost"], served["killed"], served["exit_code"]) == (5, 0, None, 0)
    assert served["loss_over_dense"] == pytest.approx(0.0, abs=1e-3) and served["kept_ratio"] == 1.0
    assert found["far"]["results"]["systems"]["dense_int8"]["loss_over_dense"] != 0.0
    dense_scores = found["far"]["results"]["dense_scores"]
    assert served["scores"] == dense_scores and 0.0 <= dense_scores["tasks"] <= 1.0  # nothing was dropped
    killed = found["near"]["results"]["systems"]["greedy"]
    assert killed["scores"] == {}
    assert "over the limit" in killed["killed"] and killed["served"] == 0
    for record in found.values():
        assert [row[0] for row in serving_table(record).rows] == [row[0] for row in serving_memory_table(record).rows]
    for gone in ("serve.json", "greedy.outcome.json"):  # as if it had been killed while the second one served
        (tmp_path / "far" / gone).unlink()
    again = run("far", 1000, "greedy,dense_int8")["results"]["systems"]
    assert again["dense_int8"] == found["far"]["results"]["systems"]["dense_int8"]
    assert again["greedy"]["seconds"] != served["seconds"] and again["greedy"]["served"] == 5


def sequence(number: int, status: str = "finished", **changes) -> dict:
    told = {"number": number, "arrived_seconds": number, "first_seconds": number + 1.0, "ended_seconds": number + 4.0}
    told |= {"generated_tokens": 4, "log_likelihood": -8.0, "kept_ratio": 0.5, "status": status, "evictions": 1}
    return told | changes


def step(seconds: float, weight_bytes: int, switched: bool, decisions: int = 0, wanted_bytes: int = 90) -> dict:
    told = {"began_seconds": seconds, "decide_seconds": 0.01, "switch_seconds": 0.02, "read_seconds": 0.07}
    told |= {"switched": switched, "needed_bytes": weight_bytes + 5, "budget_bytes": 100, "moved_bytes": 7 * switched}
    told |= {"decisions": decisions, "wanted_bytes": wanted_bytes}
    return {"step": told | {"weight_bytes": weight_bytes}}


def test_a_summary_counts_what_was_told():
    steps = [step(0, 90, False), step(1, 50, True, 1, 60), step(2, 60, True, 1, 60)]  # to 60, by way of what both have
    steps += [step(9, 70, True, 2, 70), step(10, 60, True, 3, 60), step(30, 98, True, 4, 98)]
    lines = [{"baseline_bytes": 1, "activation_bytes": 10}, *steps, sequence(0), sequence(1, log_likelihood=-4.0)]
    lines += [sequence(2, "refused", first_seconds=None), {"seconds": 10.0, "processor_seconds": 4.0, "failures": {}}]
    samples = [Sample(0.0, 200, 20), Sample(0.05, 200, 80), Sample(1.0, 100, 90)]
    outcome = Outcome(0, None, 90, samples, "RLIMIT_DATA", True, 0.1)
    requests = [{"answer": [1, 2, 3, 4]}] * 4
    found = summary({"lines": lines, "outcome": outcome}, requests, [-4.0] * 4, window_seconds=5.0)
    assert [found[name] for name in ("asked", "served", "refused", "lost", "evictions")] == [4, 2, 1, 1, 3]
    assert found["loss_over_dense"] == pytest.approx(0.5)  # one token more than dense, and none
    assert found["tokens_per_second"] == 0.8 and found["goodput"] == pytest.approx(0.4 * (math.exp(-1.0) + 1.0))
    assert found["first_token_seconds"]["p50"] == 1.0 and found["token_seconds"]["p99"] == 1.0
    assert found["switches"] == 4 and found["chatter"] == 1  # 70 to 60 turns back at once; the others do so later
    assert found["decide_share"] == pytest.approx(0.1) and found["switch_share"] == pytest.approx(0.2)
    assert found["moved_bytes"] == 35 and found["most_needed_bytes"] == 113 and found["over_budget_steps"] == 1
    assert found["watchdog"]["used_bytes"] == [80, 90]


def test_a_system_that_was_killed_has_lost_what_it_had_not_ended():
    outcome = Outcome(-9, None, 90, [Sample(0.0, 200, 20), Sample(2.0, 100, 101)], "RLIMIT_DATA", True, 0.1)
    found = summary({"lines": [sequence(0)], "outcome": outcome}, [{"answer": [1] * 4}] * 3, [-4.0] * 3, 5.0)
    assert (found["served"], found["lost"], found["seconds"]) == (1, 2, 2.0) and "switches" not in found


def test_systems_decide_as_they_say(tmp_path):
    costs = {component.name: float(number) for number, component in enumerate(SHAPE.components)}
    folders = {"greedy": save_policy(PricedPolicy(SHAPE, costs), tmp_path / "greedy")}
    work = Workload(2, 64)
    budget = int(0.8 * dense_bytes(SHAPE, work))
    static = Scenario(work, budget)

    def mask(name: str) -> PruningMask:
        (decider,) = deciders_of(systems_of([name], {})[name], SHAPE, folders, static, 4).values()
        return decider.decide(work, budget)

    dense = PruningMask.all_kept(SHAPE)
    assert mask("dense") == dense and mask("static") == mask("greedy") != dense
    assert {row.site.kind for row in mask("weights_only").dropped} == {"mlp"}
    assert {row.site.kind for row in mask("kv_only").dropped} == {"attention"}
    with pytest.raises(InfeasibleBudget):
        OnlyKind(PricedPolicy(SHAPE, costs), ATTENTION).decide(work, int(0.4 * dense_bytes(SHAPE, work)))
    mine = {"mine": System("mine"), "mine_int8": System("mine", weights="int8", kv_cache="int8")}
    assert systems_of(["mine", "mine_int8"], {"mine": "folder"}) == mine
    with pytest.raises(UnknownName, match="unknown system 'denes'; did you mean dense"):
        systems_of(["denes"], {})
