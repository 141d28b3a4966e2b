"""gpt2/training/run.py: the folder of a run: what is kept, locked, renamed, passed over where damaged, and logged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.training.run import read_log
from tests.training_runs import QUICK, ROOT, assert_same_run, one_line, rows, run, update_checksums
from tinygrad2 import checkpoint


def test_killed_in_the_middle_nothing_is_lost(workspace):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        ROOT / "train.py",
        "--data",
        "text",
        *QUICK,
        "--max-iters",
        "100000",
        "--save-interval",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 9/"):
            process.kill()
            break
    process.stdout.read()
    assert process.wait(30) == -signal.SIGKILL
    folder, _ = checkpoint.newest(Path("out"))
    assert int(folder.name[5:]) >= 6
    run("--max-iters", "12")
    assert [row["step"] for row in rows("out")] == list(range(1, 13))


def test_newest_best_and_the_last_few_are_kept(workspace, monkeypatch):
    values = iter([2.0, 5.0, 3.0, 4.0, 6.0, 7.0])  # before the first step there is no checkpoint
    monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args: next(values))
    run("--max-iters", "10", "--eval-interval", "2", "--save-interval", "2", "--keep", "2")
    assert sorted(path.name for path in Path("out").glob("ckpt-*")) == ["ckpt-000004", "ckpt-000008", "ckpt-000010"]
    assert Path("out/best").resolve().name == "ckpt-000004"
    GPT2.from_pretrained("out/best")


def test_fresh_renames_and_never_deletes(workspace, capsys):
    run("--max-iters", "2")
    before = Path("out/log.jsonl").read_text()
    run("--max-iters", "3", "--fresh")
    (aside,) = Path().glob("out-*")
    assert (aside / "log.jsonl").read_text() == before
    checkpoint.verify(aside / "ckpt-000002")
    assert f"out/ renamed to {aside}/" in capsys.readouterr().out
    assert len(rows("out")) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(workspace, capsys):
    run("--max-iters", "6", "--save-interval", "3", "--out-dir", "whole")
    run("--max-iters", "6", "--save-interval", "3")
    weights = Path("out/ckpt-000006/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    run("--max-iters", "6", "--save-interval", "3")
    said = capsys.readouterr().out
    assert "skipping a damaged checkpoint: out/ckpt-000006/model.safetensors" in said
    assert "resuming from out/ckpt-000004" in said  # the evaluation at step 4 was the best: saved too
    assert_same_run("whole", "out")


def test_a_damaged_checkpoint_is_renamed_and_never_counts_as_the_newest(workspace):
    run("--max-iters", "6", "--save-interval", "2", "--keep", "3")
    damaged = Path("out/ckpt-000006/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    interrupted = ["--max-iters", "5", "--save-interval", "1", "--keep", "1"]
    run(*interrupted)
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000005"
    assert Path("out/damaged-ckpt-000006").is_dir()
    run("--max-iters", "6", "--keep", "1")
    assert len(rows("out")) == 6


def test_a_checkpoint_with_an_option_of_earlier_versions_is_resumed(workspace):
    run("--max-iters", "2", "--save-interval", "0")
    (state,) = Path("out").glob("ckpt-*/trainer.json")
    values = json.loads(state.read_text())
    for part in ("options", "defaults"):
        values[part]["tensorboard"] = True
    state.write_text(json.dumps(values))
    update_checksums(state.parent)
    run("--max-iters", "3")
    assert read_log(Path("out/log.jsonl"))[-1]["step"] == 3


@pytest.mark.parametrize(
    "state",
    [
        "{}",
        '{"progress": {"step": "3"}, "optimizer_steps": 1, "options": {}, "data": ""}',
        '{"progress": {"step": 4, "tokens": 9}, "optimizer_steps": 4, "options": {}, "data": "", "defaults": 255}',
        '{"progress": {"step": 4}, "optimizer_steps": 4, "options": {}, "data": "", "defaults": {}, "blas": {}}',
        "[]",
        "\xff",
    ],
)
def test_a_checkpoint_without_a_valid_state_is_passed_over(workspace, capsys, state):
    run("--max-iters", "4", "--save-interval", "2")
    file = Path("out/ckpt-000004/trainer.json")
    file.write_text(state)
    update_checksums(file.parent)
    run("--max-iters", "4")
    assert "resuming from out/ckpt-000002, step 2" in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(workspace, capsys):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        run("--max-iters", "2")
        Path("out/.lock").write_text(str(other.pid))
        for more in ([], ["--fresh"]):
            run("--max-iters", "4", *more, code=1)
            assert f"out: process {other.pid} is using it" in one_line(capsys)
        assert len(rows("out")) == 2
    finally:
        other.kill()
        other.wait()
    run("--max-iters", "4")
    assert not Path("out/.lock").exists()


def test_a_log_with_invalid_utf8_does_not_stop_a_run(workspace):
    run("--max-iters", "2")
    with Path("out/log.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n{"step": 2')
    run("--max-iters", "3")
    assert [row["step"] for row in rows("out")] == [1, 2, 3]


def test_where_no_checkpoint_is_whole_nothing_is_overwritten(workspace, capsys):
    run("--max-iters", "1")
    (Path("out/ckpt-000001/trainer.json")).write_text("{}")
    log = Path("out/log.jsonl").read_text()
    run("--max-iters", "2", code=1)
    assert "no checkpoint is intact; --fresh starts a new run" in one_line(capsys)
    assert Path("out/log.jsonl").read_text() == log


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(workspace, capsys, monkeypatch):
    run("--max-iters", "2")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "out/.ckpt-000004.partial/optimizer.safetensors")

    monkeypatch.setattr(checkpoint, "save_arrays", full)
    run("--max-iters", "4", code=1)
    line = one_line(capsys)
    assert (
        "out/.ckpt-000004.partial/optimizer.safetensors: No space left on device; earlier checkpoints are intact"
        in line
    )
    monkeypatch.undo()
    os.chdir(workspace)
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000002"
    assert [path.name for path in Path("out").iterdir() if path.name.startswith(".")] == []
    run("--max-iters", "4")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(workspace, capsys):
    workspace.chmod(0o500)
    try:
        run("--max-iters", "2", code=1)
    finally:
        workspace.chmod(0o700)
    assert "Permission denied" in one_line(capsys)
