"""train.py as a user runs it: complete runs, resuming after a crash, and the report."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from data.prepare import prepare
from gpt2 import GPT2, Tokenizer, report
from gpt2.training.dataset import SampleOrder
from gpt2.training.run import read_log
from tests.gpt2.formats.models import values, write_every_format
from tests.training_runs import ROOT, TEXT, assert_same_run, rows, run
from tinygrad2 import checkpoint


def interrupt_at(monkeypatch, position, error):
    """Make the data loader fail at this sample. Returns a function that undoes the change."""
    original = SampleOrder.indices

    def indices(self, first, count):
        if first == position:
            raise error
        return original(self, first, count)

    monkeypatch.setattr(SampleOrder, "indices", indices)
    return lambda: monkeypatch.setattr(SampleOrder, "indices", original)


@pytest.mark.parametrize(
    "more",
    [
        ["--dropout", "0.2", "--total-batch-size", "96", "--weight-decay", "0.3"],
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_a_crashed_run_resumes_bit_identically(workspace, monkeypatch, capsys, more):
    run("--max-iters", "9", "--save-interval", "3", "--out-dir", "complete", *more)
    per_step = 6 if more else 2
    restore = interrupt_at(monkeypatch, 7 * per_step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        run("--max-iters", "9", "--save-interval", "3", "--out-dir", "crashed", *more)
    assert [row["step"] for row in rows("crashed")] == [1, 2, 3, 4, 5, 6, 7]
    restore()
    assert train.main(["--out-dir", "crashed"]) == 0  # the run has stored its other options
    assert "resuming from crashed/ckpt-000006, step 6" in capsys.readouterr().out
    assert_same_run("complete", "crashed")


@pytest.mark.parametrize("optimizer", ["adamw", "muon", pytest.param("sgd", marks=pytest.mark.slow)])
def test_other_optimizers_resume_bit_identically(workspace, capsys, optimizer):
    given = ["--optimizer", optimizer, "--dropout", "0.1", "--learning-rate", "1e-2", "--lr-decay-iters", "6"]
    run("--out-dir", "complete", "--max-iters", "6", *given)
    run("--out-dir", "resumed", "--max-iters", "3", *given)
    assert train.main(["--out-dir", "resumed", "--max-iters", "6", "--profile"]) == 0
    assert re.search(rf" ms \| {optimizer} [\d,]+ ms \| ", capsys.readouterr().out)
    for name in ("model.safetensors", "optimizer.safetensors"):
        complete, resumed = (Path(out, "ckpt-000006", name).read_bytes() for out in ("complete", "resumed"))
        assert complete == resumed, name
    assert read_log(Path("complete/log.jsonl"))[-1]["loss"] < read_log(Path("complete/log.jsonl"))[0]["loss"]


@pytest.mark.slow
def test_training_reads_shards_of_another_program_directly(workspace, gpt2_files, capsys):
    (workspace / "data" / "theirs").mkdir()
    for split in ("train", "val"):
        Tokenizer.load("gpt2").encode(TEXT).astype("<u2").tofile(workspace / "data" / "theirs" / f"{split}.bin")
    run("--data", "theirs", "--max-iters", "2")
    run("--data", "theirs", "--max-iters", "3")
    assert "(tokenizer gpt2, vocabulary 50,257)" in capsys.readouterr().out
    assert [row["step"] for row in rows("out")] == [1, 2, 3]
    assert Tokenizer.load(checkpoint.newest(Path("out"))[0]).name == "gpt2"


def test_a_finished_run_is_reported_and_can_be_continued(workspace, capsys):
    run("--max-iters", "2")
    capsys.readouterr()
    assert train.main([]) == 0
    output = capsys.readouterr().out
    assert "the run in out/ is already finished (2 steps)" in output
    assert "--max-iters 4 continues it, --fresh starts a new run" in output
    assert train.main(["--max-iters", "4"]) == 0
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4]


def test_the_report_shows_the_complete_run_after_a_resume(workspace, capsys):
    run("--max-iters", "6")
    assert "report: out/report.html (curves and samples)" in capsys.readouterr().out
    run("--max-iters", "12", "--batch-size", "4", "--total-batch-size", "64")
    starts, samples = read_log(Path("out/starts.jsonl")), read_log(Path("out/samples.jsonl"))
    assert [(start["step"], start["options"]["batch_size"]) for start in starts] == [(0, 2), (6, 4)]
    assert starts[1]["given"] == {**starts[0]["given"], "max_iters": 12, "batch_size": 4, "total_batch_size": 64}
    assert starts[0]["machine"]["device"] == "cpu"
    assert starts[1]["command"].startswith("python train.py ")
    assert starts[1]["command"].endswith("--max-iters 12 --batch-size 4 --total-batch-size 64")
    assert 0 < starts[0]["baselines"]["bigram"] < starts[0]["baselines"]["unigram"] < 6
    assert starts[1]["baselines"] == {}
    assert 0.99 < starts[0]["data"]["bytes per token"] < 1  # an end-of-text token has no bytes
    assert [sample["step"] for sample in samples] == [4, 6, 8, 12]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "12 of 12 steps" in page
    assert all(f"<h3>step {step}</h3>" in page for step in (4, 6, 8, 12))
    assert page.count("from step 6 (") == 1
    assert ">bigram model</span>" in page
    assert 'http-equiv="refresh"' not in page


def test_the_report_is_written_at_the_start_after_evaluations_and_when_stopped(workspace, monkeypatch):
    steps = []
    page = report.report_page
    monkeypatch.setattr(report, "report_page", lambda run, *rest: steps.append(run.step) or page(run, *rest))
    monkeypatch.setattr(report, "SHARE", 1e9)
    run("--max-iters", "10")
    assert steps == [0, 4, 8, 10]
    monkeypatch.setattr(train.StopRequest, "__enter__", lambda self: setattr(self, "requested", True) or self)
    monkeypatch.setattr(train.StopRequest, "__exit__", lambda *ignored: None)
    run("--max-iters", "12")
    assert steps == [0, 4, 8, 10, 10, 11]


def test_with_slow_steps_the_report_is_also_written_between_evaluations(workspace, monkeypatch):
    steps = []
    page = report.report_page
    monkeypatch.setattr(report, "report_page", lambda run, *rest: steps.append(run.step) or page(run, *rest))
    monkeypatch.setattr(report, "SHARE", 1e9)
    monkeypatch.setattr(report, "REFRESH", 0)
    run("--max-iters", "3", "--eval-interval", "0")
    assert steps == [0, 1, 2, 3]


def test_an_error_in_the_report_does_not_stop_the_run(workspace, capsys, monkeypatch):
    monkeypatch.setattr(report, "report_page", lambda *given: 1 / 0)
    run("--max-iters", "4")
    assert "out/report.html was not written: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_help_needs_no_data_and_is_fast():
    began = time.perf_counter()
    output = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--batch-size" in output
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("name", ["model", "model.pt", "model.llmc", "model/model.safetensors"])
def test_training_starts_from_every_format(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    write_every_format()
    Path("text.txt").write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}\n" for i in range(400)))
    prepare(["text.txt"], "bytes", Path("data/text"))
    quick = ["--data", "text", "--max-iters", "1", "--batch-size", "2", "--eval-iters", "1", "--learning-rate", "1e-9"]
    assert train.main([*quick, "--init", name]) == 0
    found = values(GPT2.from_pretrained("out/ckpt-000001"))
    for key, array in values(GPT2.from_pretrained("model")).items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-6)
