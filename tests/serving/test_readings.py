"""Free memory: the smaller of what the machine has and what the control group leaves."""

import subprocess
import sys

import psutil
import pytest

from rap_env.errors import InvalidConfig
from rap_env.memory.measured import trim_freed_memory
from rap_env.serving import readings
from rap_env.serving.readings import BudgetFile, LimitedProcess, RealMemory, free_bytes


def test_a_control_group_limits_what_the_machine_has(tmp_path):
    available = psutil.virtual_memory().available
    assert abs(free_bytes(cgroup=tmp_path) - available) < 0.2 * available
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(free_bytes(cgroup=tmp_path) - available) < 0.2 * available
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 250000\nactive_file 3\n")
    assert free_bytes(cgroup=tmp_path) == 1_250_000
    (tmp_path / "memory.current").write_text("6000000\n")
    assert free_bytes(cgroup=tmp_path) == 0


def test_a_budget_of_real_memory_is_what_is_free_and_held_less_a_reserve(monkeypatch):
    monkeypatch.setattr(readings, "free_bytes", lambda device: {"cpu": 1000}[device])
    held = [300]
    memory = RealMemory(lambda: held[0], 200)
    assert memory() == 1100
    held[0] = 0
    assert memory() == 800
    assert RealMemory(lambda: 0, 5000)() == 0


def test_a_budget_file_is_read_each_time_and_an_empty_one_changes_nothing(tmp_path):
    path = tmp_path / "budget"
    path.write_text("200_000_000\n")
    budget = BudgetFile(path)
    assert budget() == 200_000_000
    path.write_text("")
    assert budget() == 200_000_000
    path.write_text("1e8")
    assert budget() == 1e8
    path.write_text("much")
    with pytest.raises(ValueError, match="much"):
        budget()


@pytest.mark.parametrize("text", [None, "", "much"])
def test_a_budget_file_without_a_number_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "budget").write_text(text)
    with pytest.raises(InvalidConfig, match=r"expected a file with a number of bytes; .*budget"):
        BudgetFile(tmp_path / "budget")


def test_what_the_process_takes_beside_the_model_is_taken_off_its_limit():
    trim_freed_memory()  # as a budget does
    now = psutil.Process().memory_info().rss
    grown = LimitedProcess(lambda: 10**9, now - 50_000_000, lambda: 20_000_000)
    assert grown() == pytest.approx(10**9 - 30_000_000, abs=10_000_000)
    assert LimitedProcess(lambda: 10**9, now, lambda: 20_000_000)() == 10**9  # what is reserved may not be used yet
    assert LimitedProcess(lambda: 1.0, now - 50_000_000, lambda: 0)() == 0.0


_HOLES = """
import ctypes, psutil
from rap_env.serving.readings import LimitedProcess

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = psutil.Process().memory_info().rss
blocks = [libc.malloc(100_000) for _ in range(400)]  # too small to be mapped on their own
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for place, block in enumerate(blocks):
    if place % 20:
        libc.free(block)  # the twentieth that stays keeps what lies below it in the heap
kept = psutil.Process().memory_info().rss - before
left = LimitedProcess(lambda: 10**9, before, lambda: 0)()
print(kept, 10**9 - left)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how the C library keeps freed blocks is glibc's")
def test_what_the_c_library_keeps_of_freed_blocks_is_asked_back_before_a_budget_shrinks():
    kept, missing = map(float, subprocess.check_output([sys.executable, "-c", _HOLES], text=True).split())
    assert kept > 30e6  # most of the 40 MB, though 38 of them are free
    assert missing < 10e6
