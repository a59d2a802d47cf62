"""The co-tenant takes memory, gives it back, and does not stay."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from experiments.serving.cotenant import cotenant
from rap_env.serving.memory_traces import MemoryTrace, constant

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ends with its parent on Linux only")
MIB = 2**20
PROJECT = Path(__file__).parents[2]


def wait_until(true, seconds=10.0):
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def held_mib(tenant, before=0.0):
    return psutil.Process(tenant.pid).memory_info().rss / MIB - before


def test_it_takes_and_gives_back_as_its_trace_says_once_it_is_started():
    trace = MemoryTrace((0.0, 0.5, 1.0, 1.5), (0.5, 1.0, 0.25, 0.0))
    with cotenant(trace, 80 * MIB) as tenant:
        before = held_mib(tenant)
        time.sleep(0.2)
        assert held_mib(tenant, before) < 2
        start = time.monotonic()
        tenant.start()
        for low, high, earliest in ((39, 44, 0.0), (79, 85, 0.5), (19, 25, 1.0), (-1, 5, 1.5)):
            wait_until(lambda low=low, high=high: low < held_mib(tenant, before) < high)
            assert time.monotonic() - start > earliest - 0.05
        with pytest.raises(BrokenPipeError, match="started before"):
            tenant.start()
    assert not psutil.pid_exists(tenant.pid)


def test_it_is_gone_after_the_block_also_where_it_was_never_started_or_the_block_fails():
    with cotenant(constant(1.0), MIB) as tenant:
        pass
    assert not psutil.pid_exists(tenant.pid)
    with pytest.raises(ZeroDivisionError), cotenant(constant(1.0), MIB) as tenant:
        tenant.start()
        1 / 0  # noqa: B018
    assert not psutil.pid_exists(tenant.pid)


def test_one_that_ended_before_is_an_error():
    with pytest.raises(ChildProcessError, match="the co-tenant ended with -9 before it was stopped"):  # noqa: SIM117
        with cotenant(constant(1.0), MIB) as tenant:
            psutil.Process(tenant.pid).kill()
            wait_until(lambda: psutil.Process(tenant.pid).status() == psutil.STATUS_ZOMBIE)


def test_one_that_has_ended_cannot_be_started():
    with pytest.raises(BrokenPipeError), cotenant(constant(1.0), MIB) as tenant:
        psutil.Process(tenant.pid).kill()
        wait_until(lambda: psutil.Process(tenant.pid).status() == psutil.STATUS_ZOMBIE)
        tenant.start()
    assert not psutil.pid_exists(tenant.pid)


def test_it_does_not_outlive_a_parent_that_is_killed():
    script = """
        import time
        from experiments.serving.cotenant import cotenant
        from rap_env.serving.memory_traces import constant
        with cotenant(constant(1.0), 2**20) as tenant:
            tenant.start()
            print(tenant.pid, flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
