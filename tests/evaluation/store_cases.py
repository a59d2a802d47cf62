"""What the store's tests share: an identity, a result, and many writers at once."""

import multiprocessing
import os

from rap_env.evaluation.store import ResultStore

# Fresh processes like spawned ones, but the imports of the package are paid for once.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["tests.evaluation.store_cases", "rap_env.evaluation.store"])
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


def write_many(location, worker: int, n_results: int, barrier) -> None:
    barrier.wait()
    with ResultStore(location) as store:  # eight processes create it at once
        for i in range(n_results):
            store.put({"worker": worker, "i": i}, {"value": worker + i / 7})
            if i % 20 == 0:
                store.put({"shared": i}, {"value": i / 3})


def run_eight_writers(location, n_results: int) -> None:
    barrier = PROCESSES.Barrier(8)
    workers = [PROCESSES.Process(target=write_many, args=(location, n, n_results, barrier)) for n in range(8)]
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
