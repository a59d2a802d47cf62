"""What the store's tests share: an identity, a result, and many writers at once."""

import errno
import multiprocessing
import os
import sqlite3
import time
from pathlib import Path

import pytest

from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.store import ResultStore

# Fresh processes like spawned ones, but the imports of the package are paid for once.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["tests.evaluation.store_cases"])
IDENTITY = {
    "kind": "harness",
    "model": "5f" * 32,
    "revision": "main",
    "dtype": "float32",
    "mask": {"n_components": 4, "dropped": ["layer0.mlp"]},
    "tasks": ["arc_easy", "hellaswag"],
    "limit": 100,
    "versions": {"torch": "2.6.0", "lm_eval": "0.4.12"},
}
RESULT = {"accuracy": {"arc_easy": 0.1 + 0.2}, "items": [True, None, "é"]}


def filled_store(path: Path, rows: int = 200) -> bytes:
    with ResultStore(path) as store:
        connection = sqlite3.connect(path)
        connection.executemany(
            "INSERT INTO evaluations VALUES (?, ?, ?, ?)", [(f"{i:064}", "{}", "x" * 500, "") for i in range(rows)]
        )
        connection.commit()
        connection.close()
        assert len(store) == rows
    return path.read_bytes()


def refuse_links(monkeypatch, code: int = errno.EPERM) -> None:
    def no_links(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)


def write_many(location, worker: int, n_results: int, barrier, links: bool) -> None:
    if not links:
        refuse_links(pytest.MonkeyPatch())
    barrier.wait()
    with ResultStore(location) as store:  # eight processes create it at once
        for i in range(n_results):
            store.put({"worker": worker, "i": i}, {"value": worker + i / 7})
            if i % 20 == 0:
                store.put({"shared": i}, {"value": i / 3})


def run_eight_writers(location, n_results: int, links: bool = True) -> None:
    barrier = PROCESSES.Barrier(8)
    workers = [PROCESSES.Process(target=write_many, args=(location, n, n_results, barrier, links)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    with ResultStore(location) as store:
        assert len(store) == 8 * n_results + n_results // 20
        for worker in range(8):
            for i in range(n_results):
                assert store.get({"worker": worker, "i": i}) == {"value": worker + i / 7}
        assert store.get({"shared": 60}) == {"value": 20.0}


def report_writes(location, worker: int, reports) -> None:
    with ResultStore(location) as store:
        for i in range(10**9):
            store.put({"worker": worker, "i": i}, {"i": i, "values": [i / 7] * 50})
            reports.send(i)


def start_writer(location, worker: int):
    reports, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=report_writes, args=(location, worker, sender))
    process.start()
    sender.close()
    return process, reports


def kill(process) -> None:
    process.kill()  # SIGKILL
    process.join()
    process.close()


IDENTITIES = [{"evaluator": "counting", "item": i} for i in range(20)]


def result_of(index: int, worker: int = 0) -> dict:
    return {"value": index / 7, "measured_by": worker}


def measure_twenty(location, worker: int, barrier, sender, seconds: float) -> None:
    """Wants all twenty identities in an order of its own, and sends results and what it measured."""
    items = [*range(worker, 20), *range(worker)]

    def measure(indices):
        for index in indices:
            time.sleep(seconds)
            yield index, result_of(items[index], worker)

    with ResultStore(location) as store:
        barrier.wait()
        results, measured = measured_once(store, [IDENTITIES[item] for item in items], measure)
        sender.send((dict(zip(items, results, strict=True)), [items[index] for index in measured]))


def measure_together(location, n_processes: int) -> None:
    """Lets processes want the same at once: everything is measured once, and all of them have all results."""
    ResultStore(location).close()
    barrier = PROCESSES.Barrier(n_processes)
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(n_processes)]
    workers = [
        PROCESSES.Process(target=measure_twenty, args=(location, worker, barrier, sender, 0.01))
        for worker, (_, sender) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    answers = [receiver.recv() for receiver, _ in pipes]
    for worker in workers:
        worker.join()
    measured_by = {item: worker for worker, (_, measured) in enumerate(answers) for item in measured}
    assert sum(len(measured) for _, measured in answers) == len(measured_by) == 20
    expected = {item: result_of(item, measured_by[item]) for item in range(20)}
    assert [results for results, _ in answers] == [expected] * n_processes
    with ResultStore(location) as store:
        assert [store.get(identity) for identity in IDENTITIES] == list(expected.values())
        assert not any(store.claim(IDENTITIES))
