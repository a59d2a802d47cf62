"""Control groups, on folders that look like those of either version."""

import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from experiments.serving.child import _BACKSTOP_BYTES, Enforcement, run_limited
from experiments.serving.groups import ControlGroup
from rap_env.errors import InvalidConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
MIB = 2**20
VERSIONS = {
    "memory.max": {"memory.swap.max": "max", "memory.events": "low 0\noom 1\noom_kill {}\n", "cgroup.kill": ""},
    "memory.limit_in_bytes": {
        "memory.swappiness": "60",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n",
    },
}
COMMAND = [
    sys.executable,
    "-I",
    "-S",
    "-c",
    "import os, time; os.write(int(os.environ['RAP_READY_FD']), b'ready 1000\\n'); time.sleep(0.1)",
]


@pytest.fixture(params=VERSIONS)
def groups(request, monkeypatch):
    """Makes folders look like groups; returns what they held when they were removed, and a place for the kills."""
    removed, kills = [], [0]

    def mkdir(path):
        os.mkdir(path)
        for name, text in {request.param: "max", "cgroup.procs": "", **VERSIONS[request.param]}.items():
            (path / name).write_text(text.format(kills[0]))

    def rmdir(path):
        removed.append({file.name: file.read_text() for file in path.iterdir()})
        shutil.rmtree(path)

    real = {name: getattr(os, name) for name in ("open", "write", "close", "O_WRONLY")}
    monkeypatch.setattr("experiments.serving.groups.os", SimpleNamespace(mkdir=mkdir, rmdir=rmdir, **real))
    return request.param, removed, kills


def test_a_command_joins_a_group_with_the_highest_limit_and_the_group_is_removed(groups, tmp_path):
    limit, removed, _ = groups
    outcome = run_limited(COMMAND, lambda seconds: 40 * MIB, Enforcement(40 * MIB, groups=tmp_path))
    assert (outcome.exit_code, outcome.killed, outcome.backstop) == (0, False, "control group")
    (files,) = removed
    assert files["cgroup.procs"] == "0"
    assert files[limit] == str(1000 + 40 * MIB + _BACKSTOP_BYTES)
    assert files.get("memory.swap.max", files.get("memory.swappiness")) == "0"
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_the_kernel_killed_is_reported_as_such(groups, tmp_path):
    groups[2][0] = 1
    outcome = run_limited(COMMAND, lambda seconds: 30 * MIB, Enforcement(40 * MIB, groups=tmp_path))
    assert outcome.killed and (outcome.kill.by, outcome.kill.limit_bytes) == ("control group", 40 * MIB)


def test_a_group_is_removed_where_the_command_fails(groups, tmp_path):
    with pytest.raises(ChildProcessError):
        run_limited(["/no/such/program"], lambda seconds: 1, Enforcement(1, groups=tmp_path))
    assert len(groups[1]) == 1 and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_group_is_refused_and_left_as_it_was(tmp_path):
    with pytest.raises(InvalidConfig, match="expected a control group with the memory controller"):
        ControlGroup(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvalidConfig, match=r"no control group can be made in .*: No such file"):
        ControlGroup(tmp_path / "missing")


def test_a_group_that_stays_in_use_is_an_error_after_a_while(groups, tmp_path, monkeypatch):
    group = ControlGroup(tmp_path)

    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("experiments.serving.groups.os.rmdir", busy)
    monkeypatch.setattr("experiments.serving.groups._REMOVAL_SECONDS", 0.1)
    with pytest.raises(OSError, match="busy"):
        group.remove()
