"""A run's folder belongs to one process at a time, and a dead one loses it."""

import json
import multiprocessing
import os

import pytest

from experiments.recipes.folder import claimed, finished
from experiments.records import write_record
from rap_env.errors import FolderInUse, RecordExists
from rap_env.evaluation.owners import this_process


def claim_of(folder, owner: list, number: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f".claim-{number}").write_text(json.dumps(owner))


def test_folder_is_held_while_a_run_works_and_free_afterwards(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(FolderInUse, match=rf"in use by process {os.getpid()} on "), claimed(tmp_path / "run"):
            raise AssertionError("two runs in one folder")
        assert os.listdir(tmp_path / "run") == [".claim-1"], "the second leaves the first's claim"
    assert os.listdir(tmp_path / "run") == []


def test_folder_is_free_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), claimed(tmp_path):
        raise RuntimeError
    with claimed(tmp_path):
        assert os.listdir(tmp_path) == [".claim-1"]


def test_claim_of_a_dead_process_is_taken_over(tmp_path):
    host, pid, started_at = json.loads(this_process())
    claim_of(tmp_path, [host, pid, started_at - 1000])  # an earlier process that had our id
    with claimed(tmp_path), pytest.raises(FolderInUse, match=rf"process {pid} "), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_claim_of_another_host_stands_until_it_is_removed(tmp_path):
    claim_of(tmp_path, ["elsewhere", 7, 0.0])
    with pytest.raises(FolderInUse, match=r"process 7 on elsewhere.*remove .claim-1 there"), claimed(tmp_path):
        pass
    (tmp_path / ".claim-1").unlink()
    with claimed(tmp_path):
        pass


def _try(folder, ready, results) -> None:
    ready.wait()
    try:
        with claimed(folder):
            results.put(True)
            ready.wait()  # until everybody has tried
    except FolderInUse:
        results.put(False)
        ready.wait()


def test_one_of_many_that_start_at_once_gets_a_dead_ones_folder(tmp_path):
    host, pid, started_at = json.loads(this_process())
    claim_of(tmp_path, [host, pid, started_at - 1000])
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(6), context.Queue()
    racers = [context.Process(target=_try, args=(tmp_path, ready, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    won = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(won) == 1


def test_finished_run_is_known_by_its_config(tmp_path):
    config = {"seed": 0, "agent": {"width": 64}, "tracker": {"project": "a"}, "store": None, "in_flight": 1}
    assert finished(tmp_path, config) is None
    write_record(tmp_path / "record.json", {"config": config, "provenance": {}, "results": {"objective": 0.5}})
    same = config | {"tracker": {}, "store": "other.db", "in_flight": 2}
    assert finished(tmp_path, same) == {"objective": 0.5}
    with pytest.raises(RecordExists, match="of a run with another agent, seed, and records are written once"):
        finished(tmp_path, config | {"seed": 1, "agent": {"width": 32}})
