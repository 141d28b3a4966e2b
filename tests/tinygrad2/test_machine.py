"""tinygrad2/machine.py: cores, memory, and the limits of control groups."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygrad2 import machine

ROOT = Path(__file__).parents[2]


def group(root, process, line, files):
    process.write_text(line)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("line", "files", "cores", "memory"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "2000000\n"}, 1.5, 2_000_000),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/memory.max": "7"}, 3.0, 7),
        ("0::/a\n", {"a/cpu.max": "800000 100000", "cpu.max": "200000 100000"}, 2.0, None),
        (
            "5:cpuacct,cpu:/job\n4:memory:/job\n",
            {
                "cpu/job/cpu.cfs_quota_us": "50000\n",
                "cpu/job/cpu.cfs_period_us": "100000\n",
                "memory/job/memory.limit_in_bytes": "1000000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            0.5,
            1_000_000,
        ),
        ("5:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, None, None),
        ("0::/not/seen/from/here\n", {"cpu.max": "100000 100000"}, 1.0, None),
    ],
)
def test_limits_of_control_groups_are_read(tmp_path, line, files, cores, memory):
    process = tmp_path / "cgroup"
    group(tmp_path / "root", process, line, files)
    assert machine.cpu_quota(tmp_path / "root", process) == cores
    assert machine.memory_limit(tmp_path / "root", process) == memory


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert machine.cpu_quota(tmp_path, tmp_path / "nothing") is None
    assert machine.memory_limit(tmp_path, tmp_path / "nothing") is None


def test_describe_returns_strings():
    described = machine.describe()
    assert described.keys() == {"processor", "cores", "memory", "system", "python", "numpy"}
    assert all(value and isinstance(value, str) for value in described.values())


@pytest.mark.parametrize("text", ["", "what", "1 x"])
def test_a_limit_that_cannot_be_read_is_ignored(tmp_path, text):
    process = tmp_path / "cgroup"
    group(tmp_path / "root", process, "0::/", {"cpu.max": text, "memory.max": text})
    assert machine.cpu_quota(tmp_path / "root", process) is None
    assert machine.memory_limit(tmp_path / "root", process) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (0.5, 1), (1.5, 2), (3.0, 3), (7.2, 8), (64.0, 8)])
def test_the_number_of_threads_is_the_cpu_quota_rounded_up(monkeypatch, quota, threads):
    """gpt2.doctor recommends the same number (see test_doctor.py)."""
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine, "cores", lambda: set(range(8)))
    assert machine.usable_threads() == threads


def test_an_unknown_load_average_is_0(monkeypatch):
    assert machine.load_average() >= 0
    monkeypatch.delattr(machine.os, "getloadavg")
    assert machine.load_average() == 0


def test_free_memory_is_at_most_total_memory():
    free, total = machine.memory()
    assert 0 < free <= total


def test_files_and_machine_need_no_packages():
    """The option -S excludes site-packages."""
    code = "import sys; from tinygrad2 import files, machine; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_missing_program_gives_a_one_line_error():
    assert machine.call(["no-such-program"], 5) == ("", "no-such-program: No such file or directory")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX process groups")
def test_child_processes_of_a_hanging_program_are_killed_too(tmp_path):
    file = tmp_path / "child"
    machine.call(["sh", "-c", f"sleep 60 & echo $! > {file}; wait"], seconds=1)
    child = Path("/proc") / file.read_text().strip()
    deadline = time.monotonic() + 5
    while child.exists() and "State:\tZ" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or "State:\tZ" in (child / "status").read_text()
