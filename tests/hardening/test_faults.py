"""What the system does to us: full disks, folders that can't be written, clocks that jump, other users, kills."""

import contextlib
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from experiments.records import read_record, write_record
from rap_env.errors import PolicyUnreadable, RapError, StoreUnavailable
from rap_env.evaluation import owners
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.table import save_tables
from rap_env.export.save import export_pruned
from rap_env.files import write_once, write_over
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.policies import load_policy, save_policy
from rap_env.rerank.synthetic import synthetic_paths
from tests.evaluation.table_cases import tiny_tables
from tests.hardening.kills import killed
from tests.policies.cases import MAKERS

RECORD = {"config": {}, "provenance": {}, "results": "x" * 20_000}
ANNA, BERTA = 65_533, 65_534  # users that need no account
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Files of this process can't grow beyond a size: to write there fails as on a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def as_user(user: int, work: Callable[[], object], umask: int = 0o022, group: int | None = None) -> str:
    """What another user's process says: the result as text, or the error that it ended with."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.umask(umask)
            os.setgroups([])
            os.setgid(group or user)
            os.setuid(user)
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def let_others_in(folder: Path) -> None:
    """Opens pytest's own folders above, of which there is one more where tests run side by side."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.getuid() and above.name.startswith(("pytest-", "popen-", folder.name)):
            above.chmod(0o755)


WRITERS = {
    "record": lambda folder, llm: write_record(folder / "record.json", RECORD),
    "policy": lambda folder, llm: save_policy(MAKERS["one_step_network"](llm.shape), folder / "policy"),
    "tables": lambda folder, llm: save_tables(folder / "toy.npz", *tiny_tables()),
    "score paths": lambda folder, llm: synthetic_paths(n_queries=20).save(folder / "paths.npz"),
    "export": lambda folder, llm: export_pruned(llm, PruningMask.all_kept(llm.shape), "hf", folder / "export"),
    "weights": lambda folder, llm: WeightStore(llm, folder / "weights"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_half_written(name, tmp_path, tiny_llm):
    with full_disk(1000), pytest.raises((RapError, OSError)) as error:
        WRITERS[name](tmp_path, tiny_llm)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], error.value


def test_a_full_disk_leaves_what_was_there(tmp_path, tiny_llm):
    old = MAKERS["one_step_network"](tiny_llm.shape)
    save_policy(old, tmp_path / "policy")
    write_over(tmp_path / "file", "old")
    with full_disk(1000):
        for write in (
            lambda: save_policy(MAKERS["sequential_network"](tiny_llm.shape), tmp_path / "policy"),
            lambda: write_over(tmp_path / "file", "x" * 5000),
        ):
            with pytest.raises(OSError, match=r"too large|No space"):
                write()
    assert load_policy(tmp_path / "policy").kind == "one_step_network" and (tmp_path / "file").read_text() == "old"


def test_a_full_disk_loses_no_result_that_was_stored(tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        for number in range(20):
            store.put({"number": number}, {"score": number})
        with full_disk(1000), pytest.raises(StoreUnavailable, match=r"results\.db can't be used now"):
            store.put({"number": 20}, {"text": "x" * 100_000})
        assert len(store) == 20
        store.put({"number": 20}, {"score": 20})
    with ResultStore(tmp_path / "results.db") as store:
        assert [store.get({"number": number}) for number in range(21)] == [{"score": n} for n in range(21)]


def test_a_full_database_says_so_and_keeps_its_results(tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        store.put({"number": 0}, {"score": 0})
        with store._database.connection() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1")
        with pytest.raises(StoreUnavailable, match="full"):
            store.put({"number": 1}, {"text": "x" * 100_000})
        assert store.get({"number": 0}) == {"score": 0}


@as_root
def test_a_folder_that_can_not_be_written_is_named_and_stays_as_it_was(tmp_path, tiny_llm):
    let_others_in(tmp_path)
    for name, write in WRITERS.items():
        said = as_user(ANNA, lambda write=write: write(tmp_path, tiny_llm))
        assert "ermission denied" in said and str(tmp_path) in said, (name, said)
    said = as_user(ANNA, lambda: ResultStore(tmp_path / "results.db"))
    assert said.startswith("StoreUnavailable") and "choose another folder" in said
    assert list(tmp_path.iterdir()) == []


def put(path: Path, number: int) -> int:
    with ResultStore(path) as store:
        store.put({"number": number}, {"score": number})
        return len(store)


@as_root
def test_two_users_of_one_group_share_a_cache_folder(tmp_path):
    let_others_in(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, ANNA, ANNA)
    cache.chmod(0o2775)
    said = [as_user(user, lambda u=user: put(cache / "results.db", u), 0o002, ANNA) for user in (ANNA, BERTA, ANNA)]
    assert said == ["1", "2", "2"]


@as_root
def test_what_another_user_may_not_write_is_said_and_left_alone(tmp_path):
    let_others_in(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o1777)  # like /tmp: everybody may add, nobody may replace
    assert as_user(ANNA, lambda: put(cache / "results.db", 1)) == "1"
    before = (cache / "results.db").read_bytes()
    said = as_user(BERTA, lambda: put(cache / "results.db", 2))
    assert said.startswith("StoreUnavailable") and str(cache / "results.db") in said
    assert (cache / "results.db").read_bytes() == before
    assert as_user(ANNA, lambda: put(cache / "results.db", 3)) == "2"
    as_user(ANNA, lambda: write_over(cache / "file", "anna's"))
    assert "PermissionError" in as_user(BERTA, lambda: write_over(cache / "file", "berta's"))
    assert (cache / "file").read_text() == "anna's"
    assert sorted(path.name for path in cache.iterdir() if "-" not in path.name) == ["file", "results.db"]


@pytest.mark.parametrize("seconds", [-(10**7), -3600, 3600, 10**7])
def test_a_claim_outlives_a_clock_that_is_set(seconds, tmp_path, monkeypatch):
    store, identity = ResultStore(tmp_path / "results.db"), {"number": 0}
    assert store.claim([identity]) == [True]
    now, booted = time.time, psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: booted + seconds)
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    owners._owner.cache_clear()  # as another process would find it
    assert store.claim([identity]) == [False]
    owners._owner.cache_clear()
    store.close()


def test_a_claim_of_another_host_ends_where_its_clock_was_ahead():
    owner = '["elsewhere", 5, 0.0]'
    assert not owners.is_gone(owner, time.time() + 60) and not owners.is_gone(owner, time.time() - 60)
    assert owners.is_gone(owner, time.time() + 3600) and owners.is_gone(owner, time.time() - 3600)


def test_writing_follows_no_link_out_of_the_folder(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("theirs")
    folder.mkdir()
    for name, target in (("file", outside), ("gone", tmp_path / "nowhere")):
        (folder / name).symlink_to(target)
        with pytest.raises(FileExistsError):
            write_once(folder / name, "ours")
        write_over(folder / name, "ours")
        assert not (folder / name).is_symlink() and (folder / name).read_text() == "ours"
    assert outside.read_text() == "theirs" and not (tmp_path / "nowhere").exists()


def test_links_that_lead_nowhere_or_in_circles_are_refused_in_our_words(tmp_path):
    for name, target in (("policy.json", "policy.json"), ("record.json", "gone.json")):
        (tmp_path / name).symlink_to(tmp_path / target)
    with pytest.raises(PolicyUnreadable, match=r"policy\.json"):
        load_policy(tmp_path)
    with pytest.raises(RapError, match=r"record\.json"):
        read_record(tmp_path / "record.json")


def test_what_is_written_can_be_read_by_others_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_over(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("name", "n_kills"), [("training", 1), ("exporting", 2), pytest.param("serving", 2, marks=pytest.mark.slow)]
)
def test_work_that_is_killed_loses_nothing_and_comes_to_the_same(name, n_kills, tmp_path):
    found = killed(name, tmp_path, n_kills, n_undisturbed=1)
    assert found["faults"] == [] and found["kills"] == n_kills and found["completions"] >= 1
