"""Free memory: the smaller of what the machine has and what the control group leaves."""

import psutil

from rap_env.serving.readings import free_bytes


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
