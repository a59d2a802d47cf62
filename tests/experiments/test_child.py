"""Commands under an enforced limit: small real processes that take memory and give it back."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from experiments.serving.child import Enforcement, run_limited
from experiments.serving.resident import ResidentMemory
from rap_env.errors import InvalidConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20
PROJECT = Path(__file__).parents[2]
# Commands take memory by `take(MiB)`, which is given back when its result is closed.
PRELUDE = """
import mmap, os, sys, time
def take(mib):
    memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for first in range(0, mib << 20, 1 << 20):
        memory[first:first + (1 << 20)] = b"1" * (1 << 20)
    return memory
def ready():
    resident = int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE
    os.write(int(os.environ["RAP_READY_FD"]), b"ready %d\\n" % resident)
"""


def command(script):
    return [sys.executable, "-I", "-S", "-c", PRELUDE + textwrap.dedent(script)]


def run(script, limit=lambda seconds: 40 * MIB, **enforcement):
    return run_limited(command(script), limit, Enforcement(highest_bytes=100 * MIB, **enforcement))


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    descriptors = psutil.Process().num_fds()
    yield
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before, "zombies count as children"
    assert psutil.Process().num_fds() == descriptors


def needs_marks_that_can_be_set_back():
    memory = ResidentMemory(os.getpid())
    memory.close()
    if not memory.catches_peaks:
        pytest.skip("the kernel does not let the high-water mark be set back")


def test_a_child_that_stays_below_ends_by_itself_with_its_exit_code():
    outcome = run("ready(); m = take(20); time.sleep(0.2); sys.exit(3)")
    assert (outcome.exit_code, outcome.killed, outcome.kill, outcome.backstop) == (3, False, None, "RLIMIT_DATA")
    assert 19 * MIB < outcome.peak_bytes < 25 * MIB
    assert {sample.limit_bytes for sample in outcome.samples} == {40 * MIB}
    assert len(outcome.samples) >= 5
    assert outcome.watchdog_cpu_seconds < 0.1
    seconds = [sample.seconds for sample in outcome.samples]
    assert seconds == sorted(seconds)


def test_a_child_that_exceeds_is_killed_and_the_report_says_when_and_by_how_much():
    outcome = run("ready(); time.sleep(0.3); m = take(60); time.sleep(20); sys.exit(0)")
    assert outcome.killed and outcome.exit_code == -9
    assert outcome.kill.by == "watchdog" and outcome.kill.limit_bytes == 40 * MIB
    assert 0.29 < outcome.kill.seconds < 5.0
    assert 40 * MIB < outcome.kill.used_bytes == outcome.peak_bytes < 66 * MIB
    over = outcome.kill.used_bytes - 40 * MIB
    assert str(outcome.kill) == (
        f"killed by the watchdog {outcome.kill.seconds:.3f} s after it was ready: {outcome.kill.used_bytes:,} bytes"
        f" used, {over:,} over the limit of 41,943,040"
    )


def test_memory_from_before_and_the_baseline_do_not_count():
    outcome = run("m = take(80); ready(); time.sleep(0.1); n = take(30); time.sleep(0.1)")
    assert not outcome.killed and 29 * MIB < outcome.peak_bytes < 35 * MIB
    outcome = run("m = take(80); m.close(); ready(); time.sleep(0.1)")
    assert not outcome.killed and outcome.peak_bytes < 5 * MIB


def falling(seconds):
    return (40 if seconds < 0.3 else 10) * MIB


def test_a_limit_that_falls_spares_who_gives_back_within_the_grace():
    outcome = run("ready(); m = take(30); time.sleep(0.5); m.close(); time.sleep(2.0)", falling, grace_seconds=1.5)
    assert not outcome.killed and outcome.exit_code == 0
    fell = next(sample.seconds for sample in outcome.samples if sample.limit_bytes == 10 * MIB)
    assert 1.8 <= fell < 2.4


def test_a_limit_that_falls_ends_who_keeps_its_memory_after_the_grace():
    outcome = run("ready(); m = take(30); time.sleep(20)", falling, grace_seconds=0.5)
    assert outcome.killed and outcome.kill.limit_bytes == 10 * MIB
    assert 0.8 <= outcome.kill.seconds < 5.0


def test_a_spike_between_two_samples_is_caught():
    needs_marks_that_can_be_set_back()
    script = "ready(); time.sleep(0.2); take(60).close(); time.sleep(20)"
    outcome = run(script, sample_seconds=1.0)  # the spike lasts some milliseconds
    assert outcome.catches_peaks and outcome.killed
    assert 59 * MIB < outcome.kill.used_bytes < 66 * MIB
    assert 0.9 < outcome.kill.seconds < 5.0


def test_a_spike_under_a_higher_limit_is_not_held_against_a_child_later():
    needs_marks_that_can_be_set_back()
    script = "ready(); take(30).close(); time.sleep(2.0)"
    outcome = run(script, lambda seconds: (40 if seconds < 1.0 else 10) * MIB, grace_seconds=0.2)
    assert not outcome.killed and outcome.peak_bytes > 29 * MIB
    assert outcome.samples[-1].limit_bytes == 10 * MIB and outcome.samples[-1].used_bytes < 5 * MIB


def test_without_marks_a_highest_peak_shows_and_later_readings_are_of_the_moment():
    process = subprocess.Popen(
        command("print(flush=True); input(); take(60).close(); print(flush=True); input()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        process.stdout.readline()
        memory = ResidentMemory(process.pid)
        memory.catches_peaks = False
        before = memory.peak_bytes()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert memory.peak_bytes() > before + 55 * MIB
        assert memory.peak_bytes() < before + 5 * MIB
        memory.close()
        process.kill()


def test_a_process_that_has_ended_has_no_memory_to_read():
    with subprocess.Popen(command("")) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError, match="the process has ended"):
            ResidentMemory(process.pid)
    with pytest.raises(ProcessLookupError, match=f"no process {process.pid}"):
        ResidentMemory(process.pid)


def test_far_above_the_highest_limit_the_kernel_gives_no_memory():
    script = """
        mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        ready()
        time.sleep(0.3)
        untouched = mmap.mmap(-1, 120 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            sys.exit(7)
    """
    assert run(script).exit_code == 7


@pytest.mark.parametrize("script", ["time.sleep(20)", "os.close(int(os.environ['RAP_READY_FD'])); time.sleep(20)"])
def test_a_child_that_never_says_that_it_is_ready_is_a_timeout(script):
    with pytest.raises(TimeoutError, match=r"not ready after 0\.3 s"):
        run(script, ready_seconds=0.3)


def test_a_child_that_ends_before_it_is_ready_is_an_error_with_its_exit_code():
    with pytest.raises(ChildProcessError, match="ended with 5 before it was ready"):
        run("sys.exit(5)")
    with pytest.raises(ChildProcessError, match="ended with 127 before it was ready"):
        run_limited(["/no/such/program"], lambda seconds: 1, Enforcement(highest_bytes=1))


@pytest.mark.parametrize("line", ["ready\\n", "ready -5\\n", "ready nan\\n", "hello 5\\n", "x" * 100])
def test_another_line_than_that_it_is_ready_is_an_error(line):
    with pytest.raises(ChildProcessError, match="expected the line `ready BASELINE_BYTES` from the command; got b'"):
        run(f"os.write(int(os.environ['RAP_READY_FD']), b'{line}'); time.sleep(20)")


def test_a_child_that_runs_for_too_long_is_a_timeout():
    with pytest.raises(TimeoutError, match=r"not done after 0\.2 s"):
        run("ready(); time.sleep(20)", longest_seconds=0.2)


@pytest.mark.parametrize("value", [101 * MIB, float("nan"), -1])
def test_a_limit_above_the_highest_or_that_is_no_number_is_refused(value):
    with pytest.raises(InvalidConfig, match=f"limit: expected from 0 to highest_bytes, {100 * MIB}; got"):
        run("ready(); time.sleep(20)", lambda seconds: value)


@pytest.mark.parametrize("name", ["highest_bytes", "grace_seconds", "sample_seconds", "ready_seconds"])
def test_settings_that_are_negative_or_no_number_are_refused(name):
    for value in (-1.0, float("nan")):
        with pytest.raises(InvalidConfig, match=f"{name}: expected at least 0"):
            Enforcement(**{"highest_bytes": 1, name: value})
    with pytest.raises(InvalidConfig, match="sample_seconds: expected above 0"):
        Enforcement(1, sample_seconds=0)


def test_an_empty_command_is_refused():
    with pytest.raises(InvalidConfig, match="expected a program"):
        run_limited([], lambda seconds: 1, Enforcement(1))


def test_what_a_child_started_ends_with_it(tmp_path):
    script = f"""
        import subprocess
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(other.pid))
        ready()
    """
    assert not run(script).killed
    assert_ends(int((tmp_path / "pid").read_text()))


def assert_ends(pid):
    give_up = time.monotonic() + 10.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up, f"{pid} still runs"
        time.sleep(0.02)


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    child = f'ready(); open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid())); time.sleep(60)'
    parent = f"""
        from experiments.serving.child import Enforcement, run_limited
        run_limited({command(child)!r}, lambda seconds: {40 * MIB}, Enforcement({40 * MIB}))
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], cwd=PROJECT) as process:
        give_up = time.monotonic() + 60.0
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert_ends(int((tmp_path / "pid").read_text()))


def test_a_child_of_this_project_announces_itself_and_second_0_is_told():
    script = "from experiments.serving.child import announce_ready; announce_ready(10**12)"
    told = []
    outcome = run_limited(
        [sys.executable, "-c", script + "; import time; time.sleep(0.1)"],
        lambda seconds: 1,
        Enforcement(1, ready_seconds=120.0),
        on_ready=lambda: told.append(True),
    )
    assert told == [True] and outcome.exit_code == 0 and outcome.peak_bytes == 0
