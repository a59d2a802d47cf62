"""Records are written once, whole, and say where they come from."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import records
from experiments.records import git_state, model_provenance, provenance, read_record, write_record
from rap_env.errors import RecordExists
from rap_env.evaluation.identity import ENGINE_VERSION, numeric_platform


@pytest.fixture
def record() -> dict:
    return {"config": {"agent": "ppo"}, "provenance": {"git": None}, "results": {"score": 0.5}}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A package folder in a clean git checkout of its own."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "--no-verify", "-m", "first"]):
        subprocess.run(["git", *command], cwd=package.parent, check=True)
    return package


def test_record_reads_back_what_was_written(tmp_path, record):
    path = write_record(tmp_path / "new" / "folder" / "record.json", record)
    assert path == tmp_path / "new" / "folder" / "record.json"
    assert read_record(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["record.json"], "no draft stays behind"


def test_record_is_stable_readable_json(tmp_path, record):
    reverse = dict(reversed(record.items()))
    first, second = (write_record(tmp_path / f"{i}.json", r).read_text() for i, r in enumerate((record, reverse)))
    assert first == second
    assert first.startswith('{\n  "config": {\n    "agent": "ppo"\n  },\n  "provenance"')
    assert first.endswith("}\n")


def test_record_takes_numpy_values_and_paths(tmp_path, record):
    record["results"] = {
        "float32": np.float32(0.5),
        "int": np.int64(3),
        "bool": np.bool_(True),
        "array": np.arange(4).reshape(2, 2),
        "path": Path("a") / "b",
        "tuple": (1, 2),
        "text": "Français",
    }
    assert read_record(write_record(tmp_path / "r.json", record))["results"] == {
        "float32": 0.5,
        "int": 3,
        "bool": True,
        "array": [[0, 1], [2, 3]],
        "path": str(Path("a") / "b"),
        "tuple": [1, 2],
        "text": "Français",
    }


def test_existing_record_is_never_overwritten(tmp_path, record):
    path = write_record(tmp_path / "r.json", record)
    before = path.read_bytes()
    with pytest.raises(RecordExists, match="written once"):
        write_record(path, record | {"results": {"score": 1.0}})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


def test_one_of_many_racing_writers_wins_with_a_whole_record(tmp_path, record):
    def attempt(writer: int) -> int | None:
        try:
            write_record(tmp_path / "r.json", record | {"results": {"writer": [writer] * 10_000}})
        except RecordExists:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        winners = [writer for writer in pool.map(attempt, range(32)) if writer is not None]
    assert len(winners) == 1
    assert read_record(tmp_path / "r.json")["results"]["writer"] == winners * 10_000
    assert os.listdir(tmp_path) == ["r.json"]


def test_record_is_written_once_on_file_systems_without_links(tmp_path, record, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(records.os, "link", no_links)
    path = write_record(tmp_path / "r.json", record)
    assert read_record(path) == record
    with pytest.raises(RecordExists):
        write_record(path, record)
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), np.array([1.0, math.nan]), -math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, record, value):
    with pytest.raises(ValueError, match="finite numbers only"):
        write_record(tmp_path / "r.json", record | {"results": {"score": value}})
    assert not os.listdir(tmp_path)


def test_values_without_a_json_form_are_refused(tmp_path, record):
    with pytest.raises(TypeError, match="got set"):
        write_record(tmp_path / "r.json", record | {"results": {1, 2}})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("key", ["config", "provenance", "results"])
def test_missing_key_is_named(tmp_path, record, key):
    del record[key]
    with pytest.raises(ValueError, match=f"missing: {key}"):
        write_record(tmp_path / "r.json", record)
    (tmp_path / "old.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"missing: {key}"):
        read_record(tmp_path / "old.json")


def test_provenance_names_versions_hardware_and_time(tmp_path, record):
    found = provenance()
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert set(found["versions"]) >= {"rap-env", "transformers", "lm_eval", "gymnasium", "stable_baselines3"}
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 1e8
    assert found["hardware"]["torch_threads"] == torch.get_num_threads()
    assert found["hardware"]["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["time_utc"])).total_seconds()) < 60
    assert read_record(write_record(tmp_path / "r.json", record | {"provenance": found}))["provenance"] == found


def test_provenance_of_a_model_names_it_and_the_engine(tiny_llm):
    found = model_provenance(tiny_llm, "c" * 64)
    assert found["model_digest"] == tiny_llm.digest and found["tokenizer_digest"] == tiny_llm.tokenizer_digest
    assert found["corpus_digest"] == "c" * 64
    assert found["engine_version"] == ENGINE_VERSION and found["numeric_platform"] == numeric_platform("cpu")


def test_missing_distribution_has_no_version(monkeypatch):
    monkeypatch.setattr(records, "_DISTRIBUTIONS", ("numpy", "surely-not-installed"))
    versions = provenance()["versions"]
    assert versions["surely-not-installed"] is None
    assert versions["numpy"] == np.__version__


def test_git_state_follows_the_package_not_the_working_directory(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    head = subprocess.run(
        ["git", "--git-dir", checkout.parent / ".git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert git_state(checkout) == {"commit": head.stdout.strip(), "dirty": False}


def test_changed_files_make_a_checkout_dirty_and_new_ones_do_not(checkout):
    (checkout / "record.json").write_text("{}")
    assert git_state(checkout)["dirty"] is False
    (checkout / "__init__.py").write_text("changed = True")
    assert git_state(checkout)["dirty"] is True


def test_package_installed_inside_a_foreign_checkout_has_no_git_state(checkout):
    installed = checkout.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed) is None


def test_git_state_is_none_without_checkout_or_git(checkout, tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "no such folder") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None
