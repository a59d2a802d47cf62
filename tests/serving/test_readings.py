"""Free memory: the smaller of what the machine has and what the control group leaves."""

import psutil
import pytest

from rap_env.errors import InvalidConfig
from rap_env.serving import readings
from rap_env.serving.readings import BudgetFile, RealMemory, free_bytes


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
