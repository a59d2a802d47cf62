"""The result store between processes: many writers, kill -9, forks, and a real PostgreSQL if one is installed."""

import json
import os
import pickle
import random
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest
import sqlalchemy as sa

from rap_env.errors import StoreDamaged, StoreUnavailable
from rap_env.evaluation.store import ResultStore, identity_digest
from tests.evaluation.store_cases import IDENTITY, RESULT, kill, measure_together, run_eight_writers, start_writer


def test_a_second_process_hits(store, path):
    store.put(IDENTITY, RESULT)
    code = """
        import json, sys
        from rap_env.evaluation.store import ResultStore
        with ResultStore(sys.argv[1]) as store:
            print(json.dumps(store.get(json.loads(sys.argv[2]))))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(path), json.dumps(IDENTITY)]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == RESULT


def test_eight_processes_create_and_write_at_once_without_loss(tmp_path):
    run_eight_writers(tmp_path / "new" / "results.db", n_results=200)
    assert os.listdir(tmp_path / "new") == ["results.db"]


def test_eight_processes_create_at_once_without_hard_links(tmp_path):
    run_eight_writers(tmp_path / "new" / "results.db", n_results=80, links=False)
    assert os.listdir(tmp_path / "new") == ["results.db"]


def test_nothing_reported_as_finished_is_lost_by_kill_9(path):
    moments = random.Random(0)
    n_finished = 0
    for first in (0, 2, 4):
        writers = [start_writer(path, first), start_writer(path, first + 1)]
        for _, reports in writers:
            reports.recv()
        time.sleep(moments.uniform(0.05, 0.3))
        for process, _ in writers:
            kill(process)
        with ResultStore(path) as store:
            for worker, (_, reports) in enumerate(writers, start=first):
                last = 0
                try:
                    while True:
                        last = reports.recv()
                except EOFError:
                    reports.close()
                n_finished += last + 1
                for i in range(last + 1):
                    assert store.get({"worker": worker, "i": i}) == {"i": i, "values": [i / 7] * 50}
            # A writer may have died between its commit and its report.
            assert n_finished <= len(store) <= n_finished + first + 2
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT digest, identity, result FROM evaluations").fetchall()
    connection.close()
    for digest, identity, result in rows:
        assert identity_digest(json.loads(identity)) == digest
        assert json.loads(result)["i"] == json.loads(identity)["i"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_keeps_what_it_writes_after_the_parent_closed(path):
    code = """
        import os, sys
        from rap_env.evaluation.store import ResultStore
        store = ResultStore(sys.argv[1])
        store.put({"by": "parent"}, {"value": 0})
        closed, say_closed = os.pipe()
        written, say_written = os.pipe()
        if os.fork() == 0:
            store.put({"by": "child"}, {"value": 1})
            os.write(say_written, b"x")
            os.read(closed, 1)
            store.put({"by": "child, later"}, {"value": 2})
            os._exit(0)  # closing nothing, as a killed child would
        os.read(written, 1)
        store.get({"by": "parent"})
        store.close()
        os.write(say_closed, b"x")
        assert os.wait()[1] == 0
        assert len(store) == 3, len(store)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True)
    with ResultStore(path) as store:
        assert store.get({"by": "child, later"}) == {"value": 2}


def test_a_pickled_store_opens_the_same_file_from_another_folder(store, tmp_path, monkeypatch):
    store.put(IDENTITY, RESULT)
    data = pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pickle.loads(data) as copy:
        assert copy.get(IDENTITY) == RESULT


def test_postgresql_keeps_results_exactly(database_url):
    with ResultStore(database_url) as store, pickle.loads(pickle.dumps(store)) as second:
        assert store.get(IDENTITY) is None
        store.put(IDENTITY, RESULT)
        store.put(IDENTITY, {"later": 1})
        assert second.get(IDENTITY) == RESULT
        assert len(second) == 1


def test_postgresql_takes_eight_writers_at_once(database_url):
    run_eight_writers(database_url, n_results=80)


def test_postgresql_connections_that_were_cut_are_replaced(database_url, administer):
    with ResultStore(database_url) as store:
        store.put(IDENTITY, RESULT)
        administer("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'd%%'")
        assert store.get(IDENTITY) == RESULT


def test_postgresql_with_another_table_of_that_name_is_refused(database_url):
    engine = sa.create_engine(sa.make_url(database_url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE evaluations (score REAL)")
    with pytest.raises(StoreDamaged, match=r"other columns \(score\)") as raised:
        ResultStore(database_url)
    assert "secret" not in str(raised.value)


def test_postgresql_with_a_store_of_the_first_schema_is_refused(database_url):
    with ResultStore(database_url) as store, store._database.connection() as connection:
        connection.exec_driver_sql("DROP TABLE claims")
    with pytest.raises(StoreDamaged, match=r"has schema version 1, and this rap-env reads only 2; .*: move it away"):
        ResultStore(database_url)


def test_postgresql_gives_each_of_twenty_evaluations_to_one_of_three_processes(database_url):
    measure_together(database_url, n_processes=3)


def test_postgresql_whose_table_vanished_is_damaged(database_url):
    with ResultStore(database_url) as store:
        with store._database.connection() as connection:
            connection.exec_driver_sql("DROP TABLE evaluations")
        with pytest.raises(StoreDamaged, match="does not exist"):
            store.get(IDENTITY)


def test_postgresql_that_does_not_answer_is_unavailable(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)
    with pytest.raises(StoreUnavailable, match="can't be used now: connection"):
        ResultStore(f"postgresql+psycopg://rap@/results?host={tmp_path}")


def test_a_missing_postgresql_driver_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreUnavailable, match=r"pip install 'rap-env\[postgresql\]'"):
        ResultStore("postgresql+psycopg://rap@localhost/results")
