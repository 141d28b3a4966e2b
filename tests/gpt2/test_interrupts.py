"""gpt2/interrupts.py: Ctrl-C while a command imports its modules."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


COMMANDS = [["train.py"], ["sample.py"], ["data/prepare.py", "pydoc"]] + [
    ["-m", f"gpt2.{name}"] for name in ("convert", "doctor", "evaluate", "plan", "report", "verify")
]


CTRL_C = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
print("continued", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def handler():
    """Set Python's default SIGINT handler, which child processes inherit, and restore the old one after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted(tmp_path):
    """A function that runs a command, which receives SIGINT while it imports its first modules."""
    for name in ("argparse", "numpy"):
        (tmp_path / f"{name}.py").write_text(CTRL_C)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))

    def start(command):
        env = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)

    return start


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_ctrl_c_during_the_imports_of_a_command_prints_nothing(interrupted, handler, command):
    ended = interrupted(command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_ignored_signal_stays_ignored(interrupted, handler):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert "continued" in interrupted(["sample.py"]).stderr
