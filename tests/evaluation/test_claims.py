"""Claims: nothing is measured twice, and neither the dead nor the failed keep others from measuring."""

import json
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from rap_env.errors import StoreUnavailable
from rap_env.evaluation import claims, owners
from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.store import ResultStore
from tests.evaluation.store_cases import IDENTITIES, PROCESSES, measure_together, result_of


def measure(indices):
    for index in indices:
        yield index, result_of(index)


def measure_nothing(indices):
    raise AssertionError(f"{indices} are measured elsewhere")
    yield


def claim_and_wait(location, sender) -> None:
    """Stores two results of five that it claimed, and is killed while it measures the third."""
    with ResultStore(location) as store:
        store.claim(IDENTITIES[:5])
        for index in range(2):
            store.put(IDENTITIES[index], result_of(index, worker=1))
        sender.send("claimed")
        time.sleep(600)


def start_owner(location):
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=claim_and_wait, args=(location, sender))
    process.start()
    assert receiver.recv() == "claimed"
    return process


def set_owner(path, owner: list, renewed_seconds_ago: float = 0.0) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE claims SET owner = ?, renewed_at = ?", (json.dumps(owner), time.time() - renewed_seconds_ago)
        )
    connection.close()


def test_what_is_claimed_or_finished_is_not_given_out_again(store):
    store.put(IDENTITIES[0], result_of(0))
    assert store.claim(IDENTITIES[:3]) == [False, True, True]
    assert store.claim(IDENTITIES[:4]) == [False, False, False, True]


def test_a_result_ends_its_claim(store, path):
    assert store.claim(IDENTITIES[:2]) == [True, True]
    store.put(IDENTITIES[0], result_of(0))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM claims").fetchall() == [(1,)]
    connection.close()
    assert store.claim(IDENTITIES[:1]) == [False]


def test_released_claims_are_free_and_others_stay(store):
    store.claim(IDENTITIES[:3])
    store.release(IDENTITIES[1:2])
    assert store.claim(IDENTITIES[:3]) == [False, True, False]


def test_nobody_releases_the_claims_of_another_process(store, path):
    owner = start_owner(path)
    store.release(IDENTITIES[:5])
    assert store.claim(IDENTITIES[:6]) == [False] * 5 + [True]
    owner.kill()
    owner.join()


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_that_want_the_same_at_once_measure_each_exactly_once(path, n_processes):
    measure_together(path, n_processes)


def test_a_killed_process_leaves_its_work_to_others_at_once(store, path):
    owner = start_owner(path)
    assert store.claim(IDENTITIES[:5]) == [False] * 5
    kill_soon = threading.Timer(0.3, owner.kill)  # SIGKILL while this process waits for it

    def measure_and_let_kill(indices):
        if not kill_soon.ident:
            kill_soon.start()
        yield from measure(indices)

    start = time.monotonic()
    results, measured = measured_once(store, IDENTITIES[:7], measure_and_let_kill)
    assert time.monotonic() - start < 5
    assert results == [result_of(index, worker=1 if index < 2 else 0) for index in range(7)]
    assert measured == [5, 6, 2, 3, 4]  # first what nobody held, then what the dead one had not finished
    owner.join()


@pytest.mark.skipif(sys.platform == "win32", reason="no zombies there")
def test_a_dead_process_that_its_parent_has_not_waited_for_counts_as_dead(store, path):
    code = """
        import os, sys
        from rap_env.evaluation.store import ResultStore
        ResultStore(sys.argv[1]).claim([{"evaluator": "counting", "item": 0}])
        print("claimed", flush=True)
        sys.stdin.read()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        assert store.claim(IDENTITIES[:1]) == [False]
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert store.claim(IDENTITIES[:1]) == [True]


def test_a_process_id_that_was_given_to_a_later_process_is_not_the_owner(store, path):
    store.claim(IDENTITIES[:1])
    host, pid, started_at = json.loads(owners.this_process())
    set_owner(path, [host, pid, started_at - 3600])
    assert store.claim(IDENTITIES[:1]) == [True]


@pytest.mark.parametrize(("seconds_ago", "is_free"), [(590, False), (610, True)])
def test_a_claim_of_another_host_lasts_ten_minutes(store, path, seconds_ago, is_free):
    store.claim(IDENTITIES[:1])
    set_owner(path, ["another host", 1, 0.0], seconds_ago)
    assert store.claim(IDENTITIES[:1]) == [is_free]


def test_every_result_renews_the_other_claims_of_its_process(store, path):
    store.claim(IDENTITIES[:3])
    set_owner(path, json.loads(owners.this_process()), renewed_seconds_ago=500)
    store.put(IDENTITIES[0], result_of(0))
    with sqlite3.connect(path) as connection:
        ages = [time.time() - renewed_at for (renewed_at,) in connection.execute("SELECT renewed_at FROM claims")]
    connection.close()
    assert len(ages) == 2
    assert max(ages) < 60


def test_claims_are_renewed_while_one_evaluation_lasts_longer_than_the_lease(store, path, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.01)
    renewed = []

    def measure_for_long(indices):
        set_owner(path, json.loads(owners.this_process()), renewed_seconds_ago=500)
        deadline = time.monotonic() + 10
        while not renewed and time.monotonic() < deadline:
            with sqlite3.connect(path) as connection:
                (at,) = connection.execute("SELECT renewed_at FROM claims").fetchone()
            connection.close()
            if time.time() - at < 60:
                renewed.append(at)
        yield from measure(indices)

    measured_once(store, IDENTITIES[:1], measure_for_long)
    assert renewed
    assert not [thread for thread in threading.enumerate() if thread.name == "claims"]


def test_a_claim_of_a_living_process_on_this_host_does_not_lapse(store, path):
    store.claim(IDENTITIES[:1])
    set_owner(path, json.loads(owners.this_process()), renewed_seconds_ago=86400)
    assert store.claim(IDENTITIES[:1]) == [False]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_keeps_what_is_finished_and_frees_the_rest(store, error):
    def fail_at_the_third(indices):
        yield from measure(indices[:2])
        raise error("third")

    with pytest.raises(error, match="third"):
        measured_once(store, IDENTITIES[:5], fail_at_the_third)
    results, measured = measured_once(store, IDENTITIES[:5], measure)
    assert results == [result_of(index) for index in range(5)]
    assert measured == [2, 3, 4]


def test_the_error_that_stopped_the_measuring_is_raised_even_if_the_store_is_lost_too(store, path):
    def lose_the_store(indices):
        store.close()
        path.unlink()
        raise ValueError("first")
        yield

    with pytest.raises(ValueError, match="first"):
        measured_once(store, IDENTITIES[:2], lose_the_store)
    with pytest.raises(StoreUnavailable):
        measured_once(store, IDENTITIES[:2], measure_nothing)


def test_measuring_less_than_was_claimed_is_an_error_and_frees_the_rest(store):
    with pytest.raises(AssertionError, match=r"measured \[0\] of \[0, 1\]"):
        measured_once(store, IDENTITIES[:2], lambda indices: measure(indices[:1]))
    assert store.claim(IDENTITIES[:2]) == [False, True]


def test_threads_of_one_process_measure_each_exactly_once(store, path):
    answers = {}
    barrier = threading.Barrier(4)

    def want_all(worker: int, own: ResultStore) -> None:
        def slowly(indices):
            for index in indices:
                time.sleep(0.005)
                yield index, result_of(index, worker)

        barrier.wait()
        answers[worker] = measured_once(own, IDENTITIES, slowly)

    with ResultStore(path) as second:  # two threads share one store, two the other
        threads = [
            threading.Thread(target=want_all, args=(worker, second if worker % 2 else store)) for worker in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(index for _, measured in answers.values() for index in measured) == list(range(20))
    stored = [store.get(identity) for identity in IDENTITIES]
    assert [results for results, _ in answers.values()] == [stored] * 4


def test_what_the_store_knows_is_not_measured(store):
    for index in range(3):
        store.put(IDENTITIES[index], result_of(index))
    assert measured_once(store, IDENTITIES[:3], measure_nothing) == ([result_of(index) for index in range(3)], [])


def test_results_stand_in_the_order_asked_for_whatever_is_finished_first(store):
    results, measured = measured_once(store, IDENTITIES[:3], lambda indices: measure(indices[::-1]))
    assert results == [result_of(0), result_of(1), result_of(2)]
    assert measured == [2, 1, 0]


def test_without_a_store_everything_is_measured():
    for _ in range(2):
        results, measured = measured_once(None, IDENTITIES[:3], measure)
        assert results == [result_of(0), result_of(1), result_of(2)]
        assert measured == [0, 1, 2]


def test_pauses_between_looks_grow_from_a_twentieth_of_a_second_to_one_second(store, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 7:
            store.put(IDENTITIES[0], result_of(0, worker=1))

    store.claim(IDENTITIES[:1])
    monkeypatch.setattr(claims.time, "sleep", sleep)
    assert measured_once(store, IDENTITIES[:1], measure_nothing) == ([result_of(0, worker=1)], [])
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
