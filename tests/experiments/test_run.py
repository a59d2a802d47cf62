"""The smoke experiment runs from a bare cache to a record, goes on after a kill, and refuses bad input in one line."""

import collections
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from experiments.results import summary_table
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy

PROJECT = Path(__file__).parents[2]
SMOKE = "experiment=smoke"
# Without a warm start PPO asks about many masks, so that there is time to kill it between two of them.
LONG = (SMOKE, "agent.warm_start=false", "agent.total_steps=128", "evaluation.limit=16")


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"RAP_CACHE": str(folder / "cache")}
    command = [sys.executable, str(PROJECT / "train.py"), *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finish(process: subprocess.Popen) -> dict:
    """Waits for a run that succeeds, and reads the record that it names."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    path = Path(output.rpartition("record: ")[2].strip())
    return json.loads(path.read_text()) | {"path": path, "output": output}


def evaluations_in(store: Path) -> int:
    """Finished evaluations; importance trials are kept beside them."""
    if not store.is_file():
        return 0
    with sqlite3.connect(store.as_uri() + "?mode=ro", uri=True, timeout=30) as connection:
        identities = connection.execute("SELECT identity FROM evaluations").fetchall()
    connection.close()
    return sum(json.loads(identity)["kind"] == "evaluation" for (identity,) in identities)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def first(folder) -> dict:
    return finish(start(folder, SMOKE))


@pytest.fixture(scope="module")
def second(folder, first) -> dict:
    return finish(start(folder, SMOKE))


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys) -> Callable[[str], str]:
    """Runs train.py in this process on something that it refuses, and returns all that it says."""

    def run(override: str) -> str:
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", f"hydra.run.dir={tmp_path / 'run'}"]
        monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", ["train.py", SMOKE, override, *quiet])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code not in (None, 0)
        said = capsys.readouterr()
        return said.out + said.err + (stopped.value.code if isinstance(stopped.value.code, str) else "")

    return run


def test_record_carries_config_and_provenance(first, folder):
    assert first["path"].is_relative_to(folder)
    assert first["config"]["model"]["name"] == "tiny" and first["config"]["seed"] == 0
    provenance = first["provenance"]
    assert provenance["versions"].keys() >= {"python", "torch", "transformers", "lm_eval", "stable_baselines3"}
    assert provenance["hardware"]["cores"] >= 1
    assert "git" in provenance and len(provenance["model_digest"]) == len(provenance["corpus_digest"]) == 64


def test_record_holds_a_row_for_every_policy_and_scenario(first):
    rows = first["results"]["policies"]
    report = first["config"]["workload"]["report"]
    n_scenarios = len(report["workloads"]) * len(report["budget_ratios"])
    names = {"learned (ppo)", *first["config"]["baselines"]}
    assert collections.Counter(row["policy"] for row in rows) == dict.fromkeys(names, n_scenarios)
    for row in rows:
        assert row["footprint"]["peak_bytes"] == row["footprint"]["weights_bytes"] + row["footprint"]["kv_cache_bytes"]
        assert row["violation"] == (row["footprint"]["peak_bytes"] > row["budget_bytes"])
        assert row["violation"] == (row["policy"] == "dense")
        assert all(0 <= task["acc"] <= 1 and task["items"] == 4 for task in row["tasks"].values())
        assert row["score"] == pytest.approx(sum(task["acc"] for task in row["tasks"].values()) / len(row["tasks"]))
        assert all("_report" in task for task in row["tasks"])
    assert first["results"]["summary"].keys() == names
    assert (
        8 <= first["results"]["ranking"]["evaluations"] <= 8 * 9 // 2
    )  # the lazy rule needs no more than the exact one


def test_policy_beside_the_record_can_be_read(first):
    policy = load_policy(first["path"].parent / "policy")
    row = next(row for row in first["results"]["policies"] if row["policy"] == "learned (ppo)")
    mask = policy.decide(Workload(row["batch_size"], row["prompt_tokens"]), row["budget_bytes"])
    assert [component.name for component in mask.dropped] == row["dropped"]


def test_table_on_the_screen_shows_every_policy(first):
    for name in ("learned (ppo)", *first["config"]["baselines"]):
        assert f" {name} " in first["output"]


def test_scores_by_text_are_not_called_accuracy():
    means = {"budget_gb": 1.0, "footprint_gb": 0.9, "accuracy": -3.5, "reward": -3.6, "violations": 0, "scenarios": 2}
    columns, cells = summary_table({"dense": means})
    assert dict(zip(columns, cells[0], strict=True))["minus the loss"] == "-3.500"
    assert not any("accuracy" in column for column in columns)
    columns, _cells = summary_table({"dense": means | {"smooth_accuracy": 0.5}})
    assert {"accuracy", "smooth accuracy"} <= set(columns)


def test_same_command_again_answers_from_the_store_with_the_same_results(first, second):
    assert all(count > 0 for count in first["results"]["fresh_evaluations"].values())
    assert second["results"]["fresh_evaluations"] == {"search": 0, "report": 0}
    assert second["path"] != first["path"]
    assert second["results"]["policies"] == first["results"]["policies"]
    assert second["results"]["agent"]["evaluations"] == first["results"]["agent"]["evaluations"]


def test_wandb_gets_the_table_and_the_picture_without_network(folder, first, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = finish(start(folder, SMOKE, "tracker=wandb"))
    media = record["path"].parent.glob("wandb/offline-run-*/files/media/**/*")
    assert {path.name.split("_")[0] for path in media if path.is_file()} == {"kept", "summary"}
    assert record["results"]["summary"] == first["results"]["summary"]


def test_killed_run_goes_on_and_repeats_no_finished_evaluation(tmp_path):
    store = tmp_path / "cache" / "results.db"
    process = start(tmp_path, *LONG)
    while not list(tmp_path.glob("cache/training/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    kept = evaluations_in(store)
    assert kept > 0
    record = finish(start(tmp_path, *LONG))
    fresh = record["results"]["fresh_evaluations"]
    assert record["results"]["agent"]["resumed"]
    assert record["results"]["agent"]["steps"] == 128
    assert fresh["search"] > 0, "there was something left to do"
    assert fresh["search"] + fresh["report"] == evaluations_in(store) - kept
    assert fresh["search"] < record["results"]["agent"]["evaluations"]
    assert not list((tmp_path / "cache" / "training").iterdir()), "a finished run leaves no checkpoint"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.tasks=[rap_serch]", "unknown task 'rap_serch'; did you mean rap_search"),
        ("evaluation.report_tasks=[rap_search]", "are reported on as well"),
        ("model.name=tinny", "unknown model or folder 'tinny'; did you mean tiny?"),
        ("agent.algorithm=pppo", "unknown algorithm 'pppo'; did you mean ppo?"),
        ("agent.environment=rap/Prunning-v0", "unknown environment 'rap/Prunning-v0'; did you mean rap/Pruning-v0"),
        ("workload.sampler.budget_ratio=[0.01,0.9]", "no pruning mask fits"),
        ("workload.report.budget_ratios=[0.01]", "no pruning mask fits"),
        ("workload.sampler.batch_size=[8,4]", "batch_size: expected 0 < smallest <= largest; got 8 and 4"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(override, message, refusal):
    said = refusal(override)
    assert said.startswith("error: ") and message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("override", ["agent=pppo", "baselines=[random,pppo]"])
def test_unknown_agent_is_refused_with_the_known_ones_before_any_work(override, refusal):
    said = refusal(override)
    assert "agent/pppo" in said and "maskable_ppo" in said
    assert "Traceback" not in said and "GSI ranking" not in said


def test_exit_code_tells_the_shell_of_a_refusal(tmp_path):
    process = start(tmp_path, SMOKE, "model.name=tinny")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert (output, errors) == ("", "error: unknown model or folder 'tinny'; did you mean tiny?\n")
