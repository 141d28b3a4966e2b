"""gpt2/training/stop.py: after a signal, the run finishes its step, saves a checkpoint and stops."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train
from tests.training_runs import QUICK, ROOT, rows
from tinygrad2 import checkpoint


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_after_a_signal_the_run_saves_and_prints_how_to_resume(workspace, number):
    options = ["--data", "text", *QUICK, "--max-iters", "100000", "--out-dir", "stopped"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options], stdout=subprocess.PIPE, text=True, env=env
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    said = process.stdout.read()
    assert process.wait(30) == 0
    step = int(re.search(r"stopped after step ([\d,]+)", said)[1].replace(",", ""))
    assert f"saved in stopped/{checkpoint.name(step)}; python train.py --out-dir stopped resumes the run" in said
    assert checkpoint.newest(Path("stopped"))[0].name == checkpoint.name(step)
    assert [row["step"] for row in rows("stopped")] == list(range(1, step + 1))


def test_training_works_outside_the_main_thread(workspace):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(["--data", "text", *QUICK, "--max-iters", "2"])))
    thread.start()
    thread.join()
    assert codes == [0]
