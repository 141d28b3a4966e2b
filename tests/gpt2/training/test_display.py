"""gpt2/training/display.py: a screen that fails does not stop a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import QUICK, ROOT
from tinygrad2 import checkpoint


@pytest.mark.parametrize("screen", ["closed", "ascii"])
def test_a_terminal_that_fails_does_not_stop_a_run(workspace, screen):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-W", "error", ROOT / "train.py", "--data", "text", *QUICK, "--max-iters", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    if screen == "closed":
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
        process.wait(60)
    else:
        error = process.communicate(timeout=60)[1]
    error = re.sub(rb"compiling kernels .*\n", b"", error)  # where they are not cached on disk yet
    assert (process.returncode, error) == (0, b"")
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000008"
