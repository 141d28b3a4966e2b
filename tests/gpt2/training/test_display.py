"""gpt2/training/display.py: the lines that a run prints, and output errors, which must not stop it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2 import Tokenizer
from gpt2.training import display
from gpt2.training.display import describe_schedule, sample_command, say_sample, suggested_prompt, typed_command
from gpt2.training.options import Options
from tests.training_runs import QUICK, ROOT, run
from tinygrad2 import checkpoint, machine


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
    error = re.sub(rb"compiling kernels .*\n", b"", error)  # printed if they are not cached yet
    assert (process.returncode, error) == (0, b"")
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000008"


def test_a_busy_machine_is_reported(workspace, capsys, monkeypatch):
    monkeypatch.setattr(machine, "load_average", lambda: 99.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    run("--max-iters", "2")
    line = "(load average 99.5 on 2); steps will be slower, and --threads 1 may be faster\n"
    assert capsys.readouterr().out.count(line) == 1


def test_opening_lines_of_a_run(workspace, capsys, monkeypatch):
    monkeypatch.setattr(machine, "load_average", lambda: 0.0)
    run("--max-iters", "4", "--total-batch-size", "96", "--warmup-iters", "2", "--threads", "1", "--device", "cpu")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:11])
    assert lines["model"] == "nano: 834,432 parameters (4 layers, 4 heads, embedding size 128, context 64)"
    assert lines["device"] == "cpu, float32, 1 thread"
    assert re.fullmatch(r"\S.*, [\d,]+ GFLOP/s in float32 on one thread.*", lines["products"])
    data = r"data/text: [\d,]+ training tokens, [\d,]+ validation tokens \(tokenizer bytes, vocabulary 257\)"
    assert re.fullmatch(data, lines["data"])
    assert lines["batch"] == "96 tokens per step = 2 sequences x 16 tokens x 3 micro-steps"
    assert lines["steps"] == "4, which is 0.01 epochs"
    assert lines["lr"] == "warm-up to 1.0e-02 over 2 steps, linear decay to 0.0e+00 at step 4"
    assert lines["optimizer"] == "muon, weight decay 0.1, gradient clipping 1.0"
    output = "out/: a checkpoint every 2 steps (the last 2 and the best are kept), an evaluation every 4 steps"
    assert lines["output"] == output
    assert re.fullmatch(r"validation loss .*: unigram \d\.\d{4}, bigram \d\.\d{4}", lines["baselines"])


@pytest.mark.parametrize(
    ("schedule", "warmup", "text"),
    [
        ("cosine", 1, "warm-up to 1.0e-03 over 1 step, cosine decay to 1.0e-04 at step 10"),
        ("linear", 0, "from 1.0e-03, linear decay to 1.0e-04 at step 10"),
        ("wsd", 2, "warm-up to 1.0e-03 over 2 steps, constant until step 8, linear decay to 1.0e-04 at step 10"),
        ("wsd", 100, "warm-up to 1.0e-03 over 100 steps; this run ends earlier, at 1.0e-04"),
    ],
)
def test_the_schedule_is_described_in_words(schedule, warmup, text):
    rates = {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": warmup, "lr_decay_iters": 10}
    options = Options(lr_schedule=schedule, max_iters=10, **rates)
    assert describe_schedule(options) == text


class Ids:
    """The ids of a text, with the interface of TokenDataset."""

    def __init__(self, tokenizer, text):
        text, end, _ = text.partition("<|endoftext|>")
        self.ids = np.array([*tokenizer.encode(text), *(tokenizer.end_ids if end else ())])
        self.tokens = len(self.ids)

    def read(self, start, count):
        return self.ids[start : start + count]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("cut line\n\nto be or not to be\nThe king is dead, long\n", "The king is"),
        ("cut line\nx = 3; y = 4\nit can be made from\n", "it can be"),
        ('cut line\n$HOME `rm` "quoted" text\nx\n', '$HOME `rm` "quoted" text'),
        ("one line only, without an end", "one line only, without an end"),
        ("cut\n-x = 3;\n春眠不觉晓处处闻啼鸟\n夜来风雨声\n", "春眠不觉晓处处闻啼鸟"),
        ("cut\n" + 50 * "x" + "\n;\n", 40 * "x"),
        ("cut\na word<|endoftext|>\n", "a word"),
        ("\n\n\x07\n", ""),
        ("cut\nWörter mit Umlauten sind erlaubt\n", "Wörter mit Umlauten"),
    ],
)
def test_the_suggested_prompt_is_taken_from_the_data(text, prompt):
    tokenizer = Tokenizer.load("bytes")
    assert suggested_prompt(Ids(tokenizer, text), tokenizer) == prompt


def test_a_prompt_in_a_command_is_quoted():
    assert sample_command(Path("out"), "The king") == 'python sample.py --checkpoint out -p "The king"'
    assert sample_command(Path("a b"), "$HOME's") == """python sample.py --checkpoint 'a b' -p '$HOME'"'"'s'"""
    assert sample_command(Path("out")) == "python sample.py --checkpoint out"


class Clock:
    """Provides the parts of Trainer that StepLines uses, for steps with given durations."""

    def __init__(self, max_iters, log_interval, first_step=1):
        self.options = Options(max_iters=max_iters, log_interval=log_interval)
        self.first_step, self.profiler, self.now = first_step, None, 0.0

    def elapsed(self):
        return self.now

    def run(self, seconds):
        """Print the lines of steps with these durations."""
        lines = display.StepLines(self)
        row = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "seconds": 1.0, "comm_seconds": 0, "tokens_per_s": 1.0}
        for i, duration in enumerate(seconds):
            self.now += duration
            lines.add(row | {"step": self.first_step + i})


def printed_steps(capsys):
    return [line.split()[1] + line.partition(" tok/s")[2] for line in capsys.readouterr().out.splitlines()]


def test_the_estimated_time_excludes_the_first_step(capsys):
    Clock(max_iters=10, log_interval=4).run([500, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert printed_steps(capsys) == ["1/10", "4/10 | eta 0:06", "8/10 | eta 0:02", "10/10 | eta 0:00"]


def test_slow_steps_are_printed_every_30_seconds(capsys):
    Clock(max_iters=100, log_interval=50, first_step=11).run([1] + 6 * [12])
    assert printed_steps(capsys) == ["11/100", "14/100 | eta 17:12", "17/100 | eta 16:36"]
    Clock(max_iters=100, log_interval=50).run([40, 40, 40])
    assert len(printed_steps(capsys)) == 3


def test_a_sample_is_wrapped_and_an_empty_sample_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    say_sample(1.5, True, "one two three four five six\x1b seven")
    say_sample(1.5, False, "")
    assert capsys.readouterr().out.splitlines() == [
        "  validation loss 1.5000 (the best so far). A sample:",
        "    one two three four five",
        "    six\\x1b seven",
        "  validation loss 1.5000. A sample:",
        "    (empty: the model",
        "    generated no visible text)",
    ]


def test_the_typed_command_is_reconstructed(monkeypatch):
    monkeypatch.setattr(display.sys, "orig_argv", ["python3", "train.py", "--data", "a b"])
    assert typed_command(None, 1) == "python3 train.py --data 'a b'"
    assert typed_command(["--max-iters", "3"], 1) == "python train.py --max-iters 3"
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert typed_command(["--fresh"], 4) == "mpirun -n 4 python train.py --fresh"  # pytest's parent is not a launcher
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert typed_command(["--fresh"], 4) == "srun -n 4 python train.py --fresh"
    monkeypatch.setattr(display.Path, "read_bytes", lambda self: b"/usr/bin/prterun\0-n\0002\0python\0train.py\0")
    assert typed_command(["--fresh"], 2) == "mpirun -n 2 python train.py"
