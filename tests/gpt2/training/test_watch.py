"""gpt2/training/watch.py: steps that take far too long are reported, and the job is ended after a time limit."""

import re
import subprocess
import sys
import threading
import time

import pytest

from gpt2.training import watch
from gpt2.training.watch import Watch
from tinygrad2.distributed import SoloComm


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(watch, "POLL", 0.02)
    monkeypatch.setattr(watch, "LEAST", 0.3)
    monkeypatch.setattr(watch, "GRACE", 0.0)


def slow_function():
    time.sleep(1.0)


def test_a_slow_step_is_reported_once_with_its_stack(fast, capfd):
    with Watch(SoloComm(), 0) as watching:
        for _ in range(5):
            with watching.step():
                time.sleep(0.01)
        with watching.step():
            slow_function()
        with watching.step():
            time.sleep(0.01)
    error = capfd.readouterr().err
    assert error.count("this step has taken") == 1
    assert "and the median of the previous steps is 0.0" in error
    assert "in slow_function" in error
    assert error.count("in slow_function") == 1


def test_normal_steps_and_the_time_between_steps_are_not_reported(fast, capfd):
    with Watch(SoloComm(), 1) as watching:
        for seconds in (0.2, 0.25, 0.2):
            with watching.step():
                time.sleep(seconds)
            time.sleep(0.5)  # an evaluation
    assert capfd.readouterr().err == ""


def test_a_slow_first_step_is_not_reported(fast, capfd):
    """The first step compiles kernels and allocates memory, and there is no median yet."""
    with Watch(SoloComm(), 0) as watching, watching.step():
        time.sleep(0.6)
    assert capfd.readouterr().err == ""


def test_time_while_the_job_is_suspended_does_not_count(fast, capfd, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Watch(SoloComm(), 5) as watching:
        with watching.step():
            clock[0] += 0.01
        with watching.step():
            threading.Event().wait(0.1)
            clock[0] += 1000
            threading.Event().wait(0.2)
    assert capfd.readouterr().err == ""


PROGRAM = """
import threading
from gpt2.training import watch
from tinygrad2.distributed import SoloComm
watch.POLL, watch.LEAST, watch.GRACE = 0.1, 60.0, 0.1
with watch.Watch(SoloComm(), 1, lambda: "The last checkpoint is out/ckpt-000003.") as watching:
    with watching.step():
        pass
    with watching.step():
        {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["while True: pass", "threading.Lock().acquire() and threading.Event().wait()"])
def test_a_step_that_never_ends_terminates_the_program(loop):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(loop)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--hang-timeout is 1; ending the job. The last checkpoint is out/ckpt-000003." in done.stderr
    assert re.search(r'File "<string>", line \d+ in <module>', done.stderr)
    assert time.monotonic() - began < 30
