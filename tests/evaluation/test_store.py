"""The result store: exact answers, many writers, kill -9, damaged files, and a real PostgreSQL if one is installed."""

import glob
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from rap_env.errors import StoreDamaged
from rap_env.evaluation import store as store_module
from rap_env.evaluation.store import ResultStore, StoreUnavailable, identity_digest

# Fresh processes like spawned ones, but the imports of the package are paid for once.
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload([__name__, "rap_env.evaluation.store"])
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


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with ResultStore(path) as opened:
        yield opened


# --- one process


def test_a_stored_result_comes_back_equal(store):
    assert store.get(IDENTITY) is None
    store.put(IDENTITY, RESULT)
    assert store.get(IDENTITY) == RESULT
    assert len(store) == 1


def test_floats_come_back_bit_equal(store):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 2.0**53 + 2]
    store.put(IDENTITY, {"values": values})
    assert [value.hex() for value in store.get(IDENTITY)["values"]] == [value.hex() for value in values]


def test_the_digest_is_sha256_of_canonical_json_in_any_key_order():
    expected = hashlib.sha256(b'{"a":1,"b":[true,null]}').hexdigest()
    assert identity_digest({"a": 1, "b": [True, None]}) == identity_digest({"b": [True, None], "a": 1}) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"mask": {"n_components": 4, "dropped": []}},
        {"limit": 101},
        {"limit": None},
        {"versions": {"torch": "2.6.1", "lm_eval": "0.4.12"}},
        {"tasks": ["hellaswag", "arc_easy"]},
        {"kind": "perplexity"},
    ],
    ids=str,
)
def test_an_identity_that_differs_in_one_field_is_a_miss(store, change):
    store.put(IDENTITY, RESULT)
    assert store.get(IDENTITY | change) is None


def test_the_first_result_of_an_identity_stays(store):
    store.put(IDENTITY, {"accuracy": 0.5})
    store.put(IDENTITY, {"accuracy": 0.75})
    assert store.get(IDENTITY) == {"accuracy": 0.5}
    assert len(store) == 1


@pytest.mark.parametrize(
    "result",
    [{"a": float("nan")}, {"a": [1.0, float("inf")]}, {"a": (1, 2)}, {3: 0.5}, {"a": object()}],
    ids=["nan", "infinity", "tuple", "integer key", "object"],
)
def test_a_result_that_json_would_change_is_refused_before_writing(store, result):
    with pytest.raises(ValueError, match=r"expected (a result of finite JSON values|lists and string keys)"):
        store.put(IDENTITY, result)
    assert len(store) == 0


def test_nan_in_an_identity_is_refused(store):
    for action in (store.get, identity_digest, lambda identity: store.put(identity, RESULT)):
        with pytest.raises(ValueError, match="expected an identity of finite JSON values"):
            action({"limit": float("nan")})


def test_an_empty_store_is_not_false(store):
    assert len(store) == 0
    assert store


def test_closing_twice_is_harmless_and_using_a_closed_store_opens_it_again(store):
    store.put(IDENTITY, RESULT)
    store.close()
    store.close()
    assert store.get(IDENTITY) == RESULT


def test_a_url_and_a_path_name_the_same_store_and_folders_are_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ResultStore("sqlite:///deep/er/results.db") as by_url:
        by_url.put(IDENTITY, RESULT)
    with ResultStore("deep/er/results.db") as by_path:
        assert by_path.get(IDENTITY) == RESULT
    assert os.listdir("deep/er") == ["results.db"]  # no temporary file stays


def test_signs_that_mean_something_in_a_url_are_plain_in_a_path(tmp_path):
    with ResultStore(tmp_path / "50%20 ?mode=ro#é.db") as store:
        store.put(IDENTITY, RESULT)
    assert os.listdir(tmp_path) == ["50%20 ?mode=ro#é.db"]


def test_a_hit_takes_less_than_200_microseconds(store):
    store.put(IDENTITY, RESULT)
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        store.get(IDENTITY)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 200e-6  # the fastest, as other programs disturb the rest


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("sqlite://", "not in memory"),
        ("sqlite:///:memory:", "not in memory"),
        ("sqlite:///a.db?mode=ro", "without options"),
        ("mysql://host/db", "sqlite or postgresql; got 'mysql'"),
        ("://", "expected a path, sqlite:///path or postgresql"),
    ],
)
def test_a_location_of_another_kind_is_refused(location, message):
    with pytest.raises(ValueError, match=message):
        ResultStore(location)


# --- damage and other trouble


def _valid_bytes(path: Path, rows: int = 200) -> bytes:
    with ResultStore(path) as store:
        connection = sqlite3.connect(path)
        connection.executemany(
            "INSERT INTO evaluations VALUES (?, ?, ?, ?)", [(f"{i:064}", "{}", "x" * 500, "") for i in range(rows)]
        )
        connection.commit()
        connection.close()
        assert len(store) == rows
    return path.read_bytes()


def _other_program(path: Path) -> bytes:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE evaluations (digest TEXT, score REAL)")
    connection.close()
    return path.read_bytes()


DAMAGES = {
    "empty": (lambda data, path: b"", "is empty"),
    "half": (lambda data, path: data[: len(data) // 2], "malformed|damaged inside"),
    "less than a page": (lambda data, path: data[:3000], "malformed|damaged inside|not a database"),
    "header only": (lambda data, path: data[:100], "malformed|damaged inside|not a database"),
    "ten bytes": (lambda data, path: data[:10], "not a database"),
    "random": (lambda data, path: random.Random(0).randbytes(20_000), "not a database"),
    "random inside": (
        lambda data, path: data[:8192] + random.Random(0).randbytes(len(data) - 8192),
        "malformed|damaged inside",
    ),
    "zeros inside": (lambda data, path: data[:4096] + bytes(len(data) - 4096), "malformed|damaged inside"),
    "text": (lambda data, path: b"step,reward\n1,0.5\n", "not a database"),
    "another schema": (lambda data, path: _other_program(path), "another program"),
    "newer version": (lambda data, path: data[:60] + (2).to_bytes(4, "big") + data[64:], "version 2; .* only 1"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_left_as_it_was(path, kind):
    damage, message = DAMAGES[kind]
    data = damage(_valid_bytes(path), path)
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=message) as raised:
            ResultStore(path)
        assert str(path) in str(raised.value)
        assert "restore it from a copy, or move it away" in str(raised.value)
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


def test_a_damaged_file_keeps_the_log_that_a_killed_writer_left(path, tmp_path):
    _valid_bytes(path)
    writer, reports = _start_writer(path, 0)
    for _ in range(20):
        reports.recv()
    _kill(writer)
    log = Path(f"{path}-wal")
    data = bytearray(path.read_bytes())
    data[8192:] = random.Random(0).randbytes(len(data) - 8192)
    path.write_bytes(data)
    before = path.read_bytes(), log.read_bytes()
    with pytest.raises(StoreDamaged, match=r"malformed|damaged inside"):
        ResultStore(path)
    assert (path.read_bytes(), log.read_bytes()) == before
    assert before[1]


def test_a_folder_is_no_store(path):
    path.mkdir()
    with pytest.raises(StoreDamaged, match="is not a file"):
        ResultStore(path)
    assert os.listdir(path) == []


def test_a_log_without_its_file_is_not_replayed_into_a_new_store(path):
    Path(f"{path}-wal").write_bytes(b"results of a store whose file was moved away")
    with pytest.raises(StoreDamaged, match=r"is missing, but its log results\.db-wal holds results"):
        ResultStore(path)
    assert not path.exists()


def test_a_file_damaged_while_in_use_is_reported(path):
    _valid_bytes(path)
    with ResultStore(path) as store:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 4096))
        with pytest.raises(StoreDamaged, match=r"results\.db can't be read .*malformed"):
            store.get(IDENTITY)


def test_a_store_that_vanished_is_not_replaced_by_an_empty_one(store, path):
    store.close()
    path.unlink()
    with pytest.raises(StoreUnavailable, match="unable to open"):
        store.get(IDENTITY)
    assert not path.exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("identity", '{"dtype":"float16"}', "holds another identity"),
        ("identity", b"\xff\xfe", "holds another identity"),
        ("result", '{"accuracy": 0.', "holds no JSON result"),
        ("result", b"\xff\xfe", "holds no JSON result"),
    ],
)
def test_a_tampered_row_is_an_error_and_not_an_answer(store, path, column, value, message):
    store.put(IDENTITY, RESULT)
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE evaluations SET {column} = ?", [value])
    connection.close()
    with pytest.raises(StoreDamaged, match=message):
        store.get(IDENTITY)


def test_a_lock_held_too_long_is_not_called_damage_and_reading_goes_on(path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_TIMEOUT_SECONDS", 0.05)
    with ResultStore(path) as store:
        store.put(IDENTITY, RESULT)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="can't be used now: database is locked"):
            store.put({"other": 1}, RESULT)
        assert store.get(IDENTITY) == RESULT
        other.execute("ROLLBACK")
        other.close()
        store.put({"other": 1}, RESULT)
        assert len(store) == 2


def test_a_parent_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"can't be opened or created: .*file"):
        ResultStore(tmp_path / "file" / "results.db")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("present", [False, True])
def test_missing_permission_is_reported(present):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders can't be entered by others
    try:
        if present:
            ResultStore(folder / "results.db").close()
            (folder / "results.db").chmod(0)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreUnavailable, match=r"results\.db .*(denied|unable to open)"):
                ResultStore(folder / "results.db")
        finally:
            if root:
                os.seteuid(0)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# --- many processes


def _write_many(location, worker: int, n_results: int, barrier) -> None:
    barrier.wait()
    with ResultStore(location) as store:  # eight processes create it at once
        for i in range(n_results):
            store.put({"worker": worker, "i": i}, {"value": worker + i / 7})
            if i % 20 == 0:
                store.put({"shared": i}, {"value": i / 3})


def _run_eight_writers(location, n_results: int) -> None:
    barrier = PROCESSES.Barrier(8)
    workers = [PROCESSES.Process(target=_write_many, args=(location, n, n_results, barrier)) for n in range(8)]
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


def _report_writes(location, worker: int, reports) -> None:
    with ResultStore(location) as store:
        for i in range(10**9):
            store.put({"worker": worker, "i": i}, {"i": i, "values": [i / 7] * 50})
            reports.send(i)


def _start_writer(location, worker: int):
    reports, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_report_writes, args=(location, worker, sender))
    process.start()
    sender.close()
    return process, reports


def _kill(process) -> None:
    process.kill()  # SIGKILL
    process.join()
    process.close()


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
    _run_eight_writers(tmp_path / "new" / "results.db", n_results=200)
    assert os.listdir(tmp_path / "new") == ["results.db"]


def test_nothing_reported_as_finished_is_lost_by_kill_9(path):
    moments = random.Random(0)
    n_finished = 0
    for first in (0, 2, 4):
        writers = [_start_writer(path, first), _start_writer(path, first + 1)]
        for _, reports in writers:
            reports.recv()
        time.sleep(moments.uniform(0.05, 0.3))
        for process, _ in writers:
            _kill(process)
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


# --- PostgreSQL


def _postgresql_command(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


@pytest.fixture(scope="module")
def server():
    """A server of our own on a socket in a temporary folder; run by `nobody` if we are root, as it refuses root."""
    pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)
    initdb, pg_ctl = _postgresql_command("initdb"), _postgresql_command("pg_ctl")
    if not initdb or not pg_ctl:
        pytest.skip("no PostgreSQL server (initdb, pg_ctl) installed")
    folder = tempfile.mkdtemp(dir="/tmp", prefix="rap-pg-")  # a socket's path must be short
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    run = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    data = f"{folder}/data"
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    try:
        subprocess.run([initdb, "-D", data, "-U", "rap", "-A", "trust", "--no-sync", "-E", "UTF8"], **run)
        subprocess.run([pg_ctl, "-D", data, "-l", f"{folder}/log", "-w", "-o", options, "start"], **run)
        try:
            yield folder
        finally:
            subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"], **run)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def administer(server):
    """Runs one SQL statement on the server's first database."""
    url = sa.URL.create("postgresql+psycopg", "rap", database="postgres", query={"host": server})
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def execute(statement: str) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    return execute


@pytest.fixture
def database_url(server, administer) -> str:
    name = f"d{os.urandom(4).hex()}"
    administer(f"CREATE DATABASE {name}")
    return f"postgresql://rap:secret@/{name}?host={server}"


def test_postgresql_keeps_results_exactly(database_url):
    with ResultStore(database_url) as store, pickle.loads(pickle.dumps(store)) as second:
        assert store.get(IDENTITY) is None
        store.put(IDENTITY, RESULT)
        store.put(IDENTITY, {"later": 1})
        assert second.get(IDENTITY) == RESULT
        assert len(second) == 1


def test_postgresql_takes_eight_writers_at_once(database_url):
    _run_eight_writers(database_url, n_results=80)


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


def test_postgresql_whose_table_vanished_is_damaged(database_url):
    with ResultStore(database_url) as store:
        with store._connection() as connection:
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
