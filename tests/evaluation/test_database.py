"""Opening result stores: where they may lie, how they come to be, and damaged ones left as they were."""

import errno
import os
import random
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest

from rap_env.errors import StoreDamaged, StoreUnavailable
from rap_env.evaluation import database
from rap_env.evaluation.store import ResultStore
from tests.evaluation.store_cases import IDENTITY, RESULT, filled_store, kill, refuse_links, start_writer


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
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_left_as_it_was(path, kind):
    damage, message = DAMAGES[kind]
    data = damage(filled_store(path), path)
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=message) as raised:
            ResultStore(path)
        assert str(path) in str(raised.value)
        assert str(raised.value).endswith(
            "it was left unchanged: restore it from a copy,"
            " or move it away (a file with its -wal and -shm files) to begin a new one"
        )
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("version", [1, 3])
def test_a_store_of_another_schema_is_refused_with_what_to_do_and_left_as_it_was(path, version):
    data = filled_store(path)
    data = data[:60] + version.to_bytes(4, "big") + data[64:]  # SQLite's user version
    path.write_bytes(data)
    with pytest.raises(StoreDamaged) as raised:
        ResultStore(path)
    assert str(raised.value) == (
        f"the result store {path} has schema version {version}, and this rap-env reads only 2; it was left unchanged:"
        " move it away (a file with its -wal and -shm files) to begin a new one"
    )
    assert path.read_bytes() == data


def test_a_damaged_file_keeps_the_log_that_a_killed_writer_left(path, tmp_path):
    filled_store(path)
    writer, reports = start_writer(path, 0)
    for _ in range(20):
        reports.recv()
    kill(writer)
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


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    with ResultStore("~/by/path.db") as store:
        store.put(IDENTITY, RESULT)
    ResultStore(Path("~/by/path.db")).close()
    ResultStore("sqlite:///~/by/url.db").close()
    assert sorted(os.listdir(tmp_path / "by")) == ["path.db", "url.db"]
    with ResultStore(tmp_path / "by" / "path.db") as store:
        assert store.get(IDENTITY) == RESULT


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_store_is_created_where_there_are_no_hard_links(path, monkeypatch, code):
    refuse_links(monkeypatch, code)
    with ResultStore(path) as store:
        store.put(IDENTITY, RESULT)
    with ResultStore(path) as store:
        assert store.get(IDENTITY) == RESULT
    assert os.listdir(path.parent) == [path.name]


def test_without_hard_links_a_store_that_another_process_has_just_made_stays(path, monkeypatch):
    def lose_the_race(source, target):
        Path(target).write_bytes(b"the other's store")
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", lose_the_race)
    with pytest.raises(StoreDamaged, match="not a database"):  # it is opened, not replaced
        ResultStore(path)
    assert path.read_bytes() == b"the other's store"


@pytest.mark.skipif(os.name != "posix", reason="Windows needs no lock")
def test_without_links_and_locks_the_message_says_to_choose_another_folder(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    refuse_links(monkeypatch, errno.EPERM)
    monkeypatch.setattr(database.fcntl, "flock", no_locks)
    with pytest.raises(
        StoreUnavailable, match=r"No locks available; choose another folder \(\$RAP_CACHE or store=...\)$"
    ):
        ResultStore(path)
    assert os.listdir(path.parent) == []
