"""The smoke experiment runs from a bare cache to a record, goes on after a kill, and refuses bad input in one line."""

import collections
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SMOKE = "experiment=smoke"
# Without a warm start PPO asks about many masks, so that there is time to kill it between two of them.
LONG = (SMOKE, "agent.warm_start=false", "agent.total_steps=256", "evaluation.limit=24")
REFUSED = {
    "unknown task": ("evaluation.tasks=[rap_serch]", "unknown task 'rap_serch'; did you mean rap_search"),
    "unknown agent": ("agent=pppo", "Could not find 'agent/pppo'"),
    "unknown model": ("model.name=tinny", "unknown model or folder 'tinny'; did you mean tiny?"),
    "overlap": ("evaluation.report_tasks=[rap_search]", "would report on an item that"),
    "baseline": ("baselines=[densee]", "agent/densee"),
}


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


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and error output of every refused command; they run side by side."""
    folder = tmp_path_factory.mktemp("refused")
    processes = {name: start(folder, SMOKE, override) for name, (override, _) in REFUSED.items()}
    outputs = {name: process.communicate(timeout=240)[1] for name, process in processes.items()}
    return {name: (process.returncode, outputs[name]) for name, process in processes.items()}


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
    names = {"learned", *first["config"]["baselines"]}
    assert collections.Counter(row["policy"] for row in rows) == dict.fromkeys(names, n_scenarios)
    for row in rows:
        assert row["footprint"]["peak_bytes"] == row["footprint"]["weights_bytes"] + row["footprint"]["kv_cache_bytes"]
        assert row["violation"] == (row["footprint"]["peak_bytes"] > row["budget_bytes"])
        assert row["violation"] == (row["policy"] == "dense")
        assert all(0 <= task["acc"] <= 1 and task["items"] == 4 for task in row["tasks"].values())
        assert row["score"] == pytest.approx(sum(task["acc"] for task in row["tasks"].values()) / len(row["tasks"]))
        assert all("_report" in task for task in row["tasks"])
    assert first["results"]["summary"].keys() == names
    assert first["results"]["ranking"]["evaluations"] == 8 * 9 // 2


def test_policy_beside_the_record_can_be_read(first):
    from rap_env.memory.workload import Workload
    from rap_env.policies import load_policy

    policy = load_policy(first["path"].parent / "policy")
    row = next(row for row in first["results"]["policies"] if row["policy"] == "learned")
    mask = policy.decide(Workload(row["batch_size"], row["prompt_tokens"]), row["budget_bytes"])
    assert [component.name for component in mask.dropped] == row["dropped"]


def test_table_on_the_screen_shows_every_policy(first):
    for name in ("learned", *first["config"]["baselines"]):
        assert f" {name} " in first["output"]


def test_same_command_again_answers_from_the_store_with_the_same_results(first, second):
    assert all(count > 0 for count in first["results"]["fresh_evaluations"].values())
    assert second["results"]["fresh_evaluations"] == {"search": 0, "report": 0}
    assert second["path"] != first["path"]
    assert second["results"]["policies"] == first["results"]["policies"]
    assert second["results"]["agent"]["evaluations"] == first["results"]["agent"]["evaluations"]


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
    assert record["results"]["agent"]["steps"] == 256
    assert fresh["search"] > 0, "there was something left to do"
    assert fresh["search"] + fresh["report"] == evaluations_in(store) - kept
    assert fresh["search"] < record["results"]["agent"]["evaluations"]
    assert not list((tmp_path / "cache" / "training").iterdir()), "a finished run leaves no checkpoint"


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_ends_with_one_clear_message(name, refusals):
    code, errors = refusals[name]
    assert code != 0
    assert REFUSED[name][1] in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["unknown task", "unknown model", "overlap"])
def test_our_own_refusals_are_one_line(name, refusals):
    (line,) = [line for line in refusals[name][1].splitlines() if "Error" in line or "error" in line]
    assert line.startswith("error: ")
    assert line == refusals[name][1].strip().splitlines()[-1]


def test_refused_input_costs_no_work(refusals):
    assert all("GSI ranking" not in errors for name, (_, errors) in refusals.items() if name != "baseline")
