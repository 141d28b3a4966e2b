"""gpt2/training/trainer.py: steps, gradient accumulation, evaluations, and the log."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, Tokenizer
from gpt2.training.evaluation import evaluate_task
from gpt2.training.run import read_log
from gpt2.training.tasks import TASKS, load_items
from gpt2.training.trainer import Trainer
from tests.stand_ins import strict_cupy
from tests.training_runs import newest_arrays, one_line, rows, run
from tinygrad2 import gpus


def test_the_log_has_one_object_per_step(workspace):
    run("--max-iters", "5", "--total-batch-size", "64")
    logged = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in logged] == [64, 128, 192, 256, 320]
    for row in logged:
        assert {"step", "loss", "lr", "grad_norm", "seconds", "tokens_per_s", "tokens"} <= row.keys()
        assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"], rel=1e-2)
    assert [row["step"] for row in logged if "val_loss" in row] == [4, 5]


def test_mfu_is_printed_and_logged_if_the_peak_is_known(workspace, monkeypatch, capsys):
    run("--max-iters", "2", "--out-dir", "unknown")
    assert "MFU" not in capsys.readouterr().out
    assert not any("mfu" in row for row in read_log(Path("unknown/log.jsonl")))
    asked = []
    monkeypatch.setattr(gpus, "peak_tflops", lambda name, precision: asked.append(precision) or 1e-3)
    with strict_cupy.registered():
        run("--max-iters", "4", "--device", "cuda")
    config = GPT2.from_pretrained("out/ckpt-000004").config
    for row in read_log(Path("out/log.jsonl")):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * config.flops_per_token(16) / 1e9, abs=1e-4)
    assert asked == ["float32"]
    said = re.findall(r"tok/s \| (\d+)% MFU", capsys.readouterr().out)
    assert said == [f"{100 * row['mfu']:.0f}" for row in read_log(Path("out/log.jsonl"))]


def test_gradient_accumulation_equals_one_large_batch(workspace):
    common = ["--max-iters", "4", "--dtype", "float64", "--dropout", "0.1", "--total-batch-size", "128"]
    for batch in (8, 4, 1):
        run(*common, "--batch-size", str(batch), "--out-dir", f"batch{batch}", "--eval-interval", "0")
    expected = newest_arrays("batch8")
    for batch in (4, 1):
        for name, array in newest_arrays(f"batch{batch}").items():
            assert np.linalg.norm(array - expected[name]) <= 1e-9 * np.linalg.norm(expected[name]), name


def test_losses_decrease(workspace):
    run("--max-iters", "60", "--batch-size", "8", "--block-size", "32", "--warmup-iters", "5", "--eval-interval", "20")
    losses = [row["loss"] for row in rows("out")]
    assert losses[0] == pytest.approx(np.log(257), abs=0.3)
    assert np.mean(losses[-5:]) < 2.6
    values = [row["val_loss"] for row in rows("out") if "val_loss" in row]
    assert values[-1] < values[0]


def test_tasks_are_scored_at_evaluations(workspace, monkeypatch, capsys):
    """The task files are in the cache. The logged scores equal those of the saved model, also after resuming."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    (workspace / "cache" / "tinygrad2").mkdir(parents=True)
    questions = [{"ctx": f"{i} times {i}", "endings": ["is here.", "rest"], "label": i % 2} for i in range(6)]
    lines = [json.dumps(question) + "\n" for question in questions]
    (workspace / "cache" / "tinygrad2" / "hellaswag_val.jsonl").write_text("".join(lines))
    run("--eval", "hellaswag", "--eval-items", "4", "--max-iters", "4", "--save-interval", "4")
    run("--max-iters", "6")
    scored = {row["step"]: row for row in read_log(Path("out/log.jsonl")) if "hellaswag_acc" in row}
    assert list(scored) == [4, 6]
    task, folder = TASKS["hellaswag"], "out/ckpt-000006"
    figures = evaluate_task(task, GPT2.from_pretrained(folder), Tokenizer.load(folder), load_items(task, limit=4), 2)
    assert figures == {name: scored[6][f"hellaswag_{name}"] for name in ("acc_norm", "acc", "items", "cut")}
    assert figures["items"] == 4
    assert f"  hellaswag: acc {scored[6]['hellaswag_acc']:.4f}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(workspace, capsys):
    run("--max-iters", "4", "--save-interval", "2")
    before = newest_arrays("out")
    run(
        "--max-iters",
        "40",
        "--learning-rate",
        "2e9",
        "--grad-clip",
        "0",
        "--warmup-iters",
        "0",
        "--max-bad-steps",
        "1",
        code=1,
    )
    line = one_line(capsys)
    assert re.search(r"step \d+: the loss is (nan|inf|[\d.e+]+) and the gradient norm (nan|inf)", line)
    assert "The last checkpoint is out/ckpt-000004." in line
    after = newest_arrays("out")
    assert all(np.array_equal(array, after[name]) for name, array in before.items())


@pytest.mark.slow
def test_memory_threads_and_open_files_do_not_grow_while_training(workspace, monkeypatch):
    step, used = Trainer.step, {}

    def watched(trainer, *arguments):
        done = trainer.progress.step
        if done in (200, 400, 600):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            tasks, files = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
            used[done] = resident, (tasks, files)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", watched)
    run("--max-iters", "601", "--eval-interval", "50", "--save-interval", "25", "--dropout", "0.1")
    (_, early), (before, middle), (after, late) = used.values()
    assert early == middle == late
    assert after - before < 2e6
