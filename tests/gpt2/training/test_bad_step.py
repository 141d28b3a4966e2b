"""A step whose loss or gradient is not finite is skipped, explained and, the first time, stored; training continues."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from gpt2 import GPT2
from gpt2.formats import model_file
from gpt2.language_model import LanguageModel
from gpt2.training import bad_step, trainer
from gpt2.training.run import RunFolder, read_log
from tests.spoiled import spoil_steps
from tests.training_runs import assert_same_run, newest_arrays, one_line, rows, run
from tinygrad2 import checkpoint

SPOILED = (
    "the first value that is not finite: spoil after h.2.mlp.c_proj, backward pass: the gradient of the result of "
)


def strict_rows(path):
    """The rows of a log, which must be strict JSON (without NaN and infinity)."""

    def reject(text):
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in Path(path).read_text().splitlines()]


def test_a_skipped_step_is_logged_and_training_continues(workspace, monkeypatch, capsys):
    spoil_steps(monkeypatch, 2, 5)
    run("--max-iters", "8", "--save-interval", "1", "--keep", "20", "--log-interval", "100")
    lines = capsys.readouterr().out.splitlines()
    skipped = [i for i, line in enumerate(lines) if "skipped" in line]
    assert [lines[i].split(" | ")[0] for i in skipped] == ["step 3/8", "step 6/8"]
    assert re.search(r"the loss is [\d.]+ and the gradient norm nan; the weights are unchanged$", lines[skipped[0]])
    assert lines[skipped[0] + 1].startswith(f"  {SPOILED}")
    assert "this suggests an error in the backward function of spoil" in lines[skipped[0] + 2]
    assert lines[skipped[0] + 3] == "  to repeat the step with checks: python -m gpt2.replay out/bad-step-3"
    assert sum("the first value" in line for line in lines) == 1
    logged = strict_rows("out/log.jsonl")
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert [row["step"] for row in logged if row.get("skipped")] == [3, 6]
    assert [row["grad_norm"] for row in logged if row.get("skipped")] == [None, None]
    states = [checkpoint.read_json(Path(f"out/ckpt-{step:06}/trainer.json")) for step in range(1, 9)]
    assert [state["optimizer_steps"] for state in states] == [1, 2, 2, 3, 4, 4, 5, 6]
    assert [state["progress"]["bad_steps"] for state in states] == [0, 0, 1, 0, 0, 1, 0, 0]
    weights = [checkpoint.load_arrays(Path(f"out/ckpt-{step:06}/model.safetensors")) for step in (2, 3, 4)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not np.array_equal(weights[1][name], weights[2][name]) for name in weights[0])


def test_the_first_bad_step_is_stored_with_weights_and_batches(workspace, monkeypatch):
    spoil_steps(monkeypatch, 2, 5)
    run("--max-iters", "8", "--save-interval", "2", "--keep", "9", "--total-batch-size", "96", "--dropout", "0.1")
    assert [path.name for path in Path("out").glob("*bad-step*")] == ["bad-step-3"]
    folder = Path("out/bad-step-3")
    checkpoint.verify(folder)
    stored, before = (checkpoint.load_arrays(Path(f) / "model.safetensors") for f in (folder, "out/ckpt-000002"))
    assert stored.keys() == before.keys()
    assert all(np.array_equal(stored[name], before[name]) for name in stored)
    step = bad_step.read(folder)
    row = strict_rows("out/log.jsonl")[2]
    assert (step.step, step.lr, step.loss, step.grad_norm) == (3, row["lr"], row["loss"], None)
    assert step.options["max_bad_steps"] == 3
    assert [(batch.key.step, batch.key.first_sample) for batch in step.batches] == [(2, 0), (2, 2), (2, 4)]
    model = GPT2.from_pretrained(folder)
    losses = [model.loss(batch.tokens, batch.targets, batch.key).item() for batch in step.batches]
    assert np.mean(losses) == pytest.approx(step.loss, rel=1e-6)


def test_a_run_with_skipped_steps_resumes_bit_identically(workspace, monkeypatch):
    spoil_steps(monkeypatch, 2, 3, 6)
    options = ["--save-interval", "1", "--eval-interval", "1", "--dropout", "0.1"]
    run("--max-iters", "9", "--out-dir", "whole", *options)
    for stop in (2, 3, 4, 7):
        run("--max-iters", str(stop), "--out-dir", "parts", "--lr-decay-iters", "9", *options)
    run("--max-iters", "9", "--out-dir", "parts")
    assert_same_run("whole", "parts")
    assert [path.name for path in Path("parts").glob("*bad-step*")] == ["bad-step-3"]


def test_a_skipped_step_does_not_change_the_optimizer_state(workspace, monkeypatch):
    """The first step is skipped, so all moments are still zero."""
    spoil_steps(monkeypatch, 0, value=np.inf)
    run("--max-iters", "1", "--save-interval", "1")
    assert all(not array.any() for name, array in newest_arrays("out").items() if name.startswith("exp_avg"))


def test_too_many_consecutive_bad_steps_stop_the_run(workspace, monkeypatch, capsys):
    spoil_steps(monkeypatch, 1, 3, 4, 6, 7, 8)
    run("--max-iters", "4", "--save-interval", "4")
    run("--max-iters", "20", code=1)
    line = one_line(capsys)
    assert "step 9: the loss is " in line
    assert "This is skipped step 3 in a row, and --max-bad-steps is 3. The last checkpoint is out/ckpt-000008." in line
    assert SPOILED in line
    assert [row["step"] for row in read_log(Path("out/log.jsonl"))] == list(range(1, 10))


def test_a_resumed_run_continues_the_count_of_consecutive_bad_steps(workspace, monkeypatch, capsys):
    spoil_steps(monkeypatch, 2, 3)
    run("--max-iters", "3", "--save-interval", "3", "--max-bad-steps", "2")
    run("--max-iters", "6", code=1)
    assert "step 4: " in one_line(capsys)


def test_a_loss_that_is_not_finite_is_skipped_even_if_the_gradient_is_finite(workspace, monkeypatch):
    loss, calls = GPT2.loss, []

    def infinite_once(self, tokens, targets, key=None):
        result = loss(self, tokens, targets, key)
        if key is not None and key.step == 1:
            calls.append(key)
            return result + float("inf")
        return result

    monkeypatch.setattr(GPT2, "loss", infinite_once)
    monkeypatch.setattr(GPT2, "backward", LanguageModel.backward)  # it calls the replaced loss
    run("--max-iters", "3", "--save-interval", "1", "--keep", "5")
    assert len(calls) == 2  # the step itself, and its repetition with checks
    row = strict_rows("out/log.jsonl")[1]
    assert (row["loss"], row["skipped"]) == (None, True)
    assert np.isfinite(row["grad_norm"])
    first, second = (checkpoint.load_arrays(Path(f"out/ckpt-00000{step}/model.safetensors")) for step in (1, 2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38, -1e20])
def test_a_damaged_weight_is_reported(workspace, capsys, monkeypatch, value):
    run("--max-iters", "1", "--save-interval", "1")
    arrays = checkpoint.load_arrays(Path("out/ckpt-000001/model.safetensors"))
    name = next(name for name in arrays if name.endswith("h.2.mlp.c_fc.weight"))
    arrays[name][3, 5] = value
    checkpoint.save_arrays(Path("out/ckpt-000001/model.safetensors"), arrays, {"format": "pt"})
    Path("out/ckpt-000001/manifest.json").unlink()
    capsys.readouterr()
    tune = ("--init", "out/ckpt-000001", "--out-dir", "tuned", "--max-iters", "20", "--eval-interval", "0")
    run(*tune, code=1)
    bad = f"parameter h.2.mlp.c_fc.weight [3, 5] is {np.float32(value):.7g}"
    assert f"out/ckpt-000001/model.safetensors: the weights are damaged: {bad} (1 of 65,536" in one_line(capsys)
    assert not Path("tuned").exists()
    if not np.isfinite(value):  # the same damage after the model was loaded
        monkeypatch.setattr(model_file, "bad_parameters", lambda model: iter(()))
        run(*tune, code=1)
        line = one_line(capsys)
        assert f"linear in h.2.mlp.c_fc, forward pass: {bad}" in line
        assert "this suggests damaged weights" in line
        assert "--learning-rate" not in line


def test_a_learning_rate_that_is_too_high_is_reported(workspace, capsys):
    options = ["--learning-rate", "1e6", "--grad-clip", "0", "--warmup-iters", "0", "--min-lr", "0"]
    run("--max-iters", "20", "--eval-interval", "0", *options, code=1)
    assert re.search(r"this suggests weights that have grown too large, up to .* in \S+: too high", one_line(capsys))


def test_a_bad_step_is_not_written_if_disk_space_is_low(workspace, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(bad_step.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    spoil_steps(monkeypatch, 2)
    run("--max-iters", "4", "--save-interval", "4")
    assert "  out/bad-step-3: not written, because less than 0.01 GB of disk space is free" in capsys.readouterr().out
    assert not list(Path("out").glob("*bad-step*"))


def test_a_disk_error_leaves_no_incomplete_bad_step(workspace, monkeypatch, capsys):
    def fail(path, values):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bad_step.checkpoint, "write_json", fail)
    spoil_steps(monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", lambda *given: Path("out"))
        run("--max-iters", "3", "--eval-interval", "0")
    assert "No space left on device" in capsys.readouterr().out
    assert not list(Path("out").glob("*bad-step*"))
    assert not list(Path("out").glob(".bad-step*"))


def test_lack_of_memory_for_the_checks_does_not_stop_the_run(workspace, monkeypatch, capsys):
    def too_much(*given):
        raise MemoryError

    monkeypatch.setattr(bad_step, "explain", too_much)
    spoil_steps(monkeypatch, 2)
    run("--max-iters", "4", "--save-interval", "4")
    assert "  out of memory when repeating the step with checks" in capsys.readouterr().out
    assert Path("out/bad-step-3").is_dir()


def test_steps_are_not_checked_if_none_is_bad(workspace, monkeypatch):
    monkeypatch.setattr(bad_step, "Checker", lambda *given: pytest.fail("a step was checked"))
    run("--max-iters", "3")
    assert not any("skipped" in row for row in rows("out"))


def test_a_validation_loss_that_is_not_finite_is_never_the_best(workspace, monkeypatch, capsys):
    mean, calls = trainer.mean_loss, []

    def nan_first(*given):
        calls.append(mean(*given))
        return float("nan") if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(trainer, "mean_loss", nan_first)
    run("--max-iters", "8")
    losses = {row["step"]: row["val_loss"] for row in strict_rows("out/log.jsonl") if "val_loss" in row}
    assert losses[4] is None or losses[8] is None
    state = checkpoint.read_json(Path("out/ckpt-000008/trainer.json"))
    assert np.isfinite(state["progress"]["best"]["val_loss"])
    monkeypatch.setattr(trainer, "mean_loss", lambda *given: float("nan"))
    run("--max-iters", "8", "--out-dir", "never")
    assert "no validation loss was finite" in capsys.readouterr().out
    assert checkpoint.read_json(Path("never/ckpt-000008/trainer.json"))["progress"]["best"] is None


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (bad_step.STEP, '"seed": 1337', '"seed": -1'),
        (bad_step.STEP, '"lr"', '"rate"'),
        (bad_step.STEP, '"options": {', '"options": 3, "x": {'),
        (bad_step.STEP, "{", "["),
    ],
)
def test_the_error_for_a_damaged_folder_names_the_folder(workspace, monkeypatch, file, old, new):
    spoil_steps(monkeypatch, 0)
    run("--max-iters", "1")
    path = Path("out/bad-step-1") / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(checkpoint.CheckpointError, match="bad-step-1"):
        bad_step.read(path.parent)
    monkeypatch.setattr(checkpoint, "verify", lambda folder: None)
    with pytest.raises(checkpoint.CheckpointError, match="bad-step-1"):
        bad_step.read(path.parent)


def test_every_skipped_step_is_printed(workspace, monkeypatch, capsys):
    spoil_steps(monkeypatch, 1)
    assert train.main(["--data", "text", "--max-iters", "2", "--eval-interval", "0", "--log-interval", "50"]) == 0
    assert "step 2/2 | skipped" in capsys.readouterr().out
