"""gpt2/training/run.py: the folder of a run: checkpoints to keep, the lock, renaming, damaged files, and the log."""

import ast
import errno
import inspect
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import sample
import train
from gpt2 import GPT2, Tokenizer, report
from gpt2.config import GPT2Config
from gpt2.formats.model_file import find_model
from gpt2.training.options import Options, default_options, resolve_options
from gpt2.training.run import Progress, RunFolder, RunOptions, read_log, read_state
from gpt2.training.setup import resumed_run
from tests.training_runs import QUICK, ROOT, assert_same_run, one_line, rows, run, update_checksums
from tinygrad2 import checkpoint, files, optim


def test_a_killed_run_resumes_from_its_last_checkpoint(workspace):
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


def test_the_best_and_the_newest_checkpoints_are_kept(workspace, monkeypatch):
    values = iter([2.0, 5.0, 3.0, 4.0, 6.0, 7.0])  # the first is before training, when there is no checkpoint
    monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args: next(values))
    run("--max-iters", "10", "--eval-interval", "2", "--save-interval", "2", "--keep", "2")
    assert sorted(path.name for path in Path("out").glob("ckpt-*")) == ["ckpt-000004", "ckpt-000008", "ckpt-000010"]
    assert Path("out/best").resolve().name == "ckpt-000004"
    GPT2.from_pretrained("out/best")


def test_fresh_renames_the_folder_and_deletes_nothing(workspace, capsys):
    run("--max-iters", "2")
    before = Path("out/log.jsonl").read_text()
    run("--max-iters", "3", "--fresh")
    (aside,) = Path().glob("out-*")
    assert (aside / "log.jsonl").read_text() == before
    checkpoint.verify(aside / "ckpt-000002")
    assert f"out/ renamed to {aside}/" in capsys.readouterr().out
    assert len(rows("out")) == 3


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(workspace, capsys):
    run("--max-iters", "6", "--save-interval", "3", "--out-dir", "whole")
    run("--max-iters", "6", "--save-interval", "3")
    weights = Path("out/ckpt-000006/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    run("--max-iters", "6", "--save-interval", "3")
    said = capsys.readouterr().out
    assert "skipping a damaged checkpoint: out/ckpt-000006/model.safetensors" in said
    assert "resuming from out/ckpt-000004" in said  # saved because its evaluation was the best
    assert_same_run("whole", "out")


def test_a_damaged_checkpoint_is_renamed_and_does_not_count_as_the_newest(workspace):
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
def test_a_checkpoint_without_a_valid_state_is_skipped(workspace, capsys, state):
    run("--max-iters", "4", "--save-interval", "2")
    file = Path("out/ckpt-000004/trainer.json")
    file.write_text(state)
    update_checksums(file.parent)
    run("--max-iters", "4")
    assert "resuming from out/ckpt-000002, step 2" in capsys.readouterr().out


def test_two_runs_cannot_use_the_same_folder(workspace, capsys):
    run("--max-iters", "2")
    with files.Lock(Path("out/.lock"), "out"):
        for more in ([], ["--fresh"], ["--max-iters", "2"]):
            run("--max-iters", "4", *more, code=1)
            assert f"out/.lock: process {os.getpid()} on {socket.gethostname()}, started " in one_line(capsys)
        assert len(rows("out")) == 2
    Path("out/.lock").write_text("1")  # a stale lock of an earlier version
    run("--max-iters", "4")
    assert not Path("out/.lock").exists()


def test_the_folder_is_locked_before_its_checkpoints_are_read(workspace, monkeypatch):
    run("--max-iters", "2")
    found = []
    find = checkpoint.find
    monkeypatch.setattr(checkpoint, "find", lambda out: found.append(Path(out, ".lock").exists()) or find(out))
    run("--max-iters", "4")
    assert found
    assert all(found)


def test_a_run_that_cannot_start_leaves_no_folder(workspace):
    run("--data", "nothing", "--max-iters", "2", code=1)
    assert not Path("out").exists()


def test_a_folder_that_is_removed_during_training_is_recreated(workspace, monkeypatch, capsys):
    move = {4: lambda: Path("out").rename("moved"), 9: lambda: shutil.rmtree("out")}
    learning_rate_at = Options.learning_rate_at

    def moving(self, step):
        move.pop(step, lambda: None)()
        return learning_rate_at(self, step)

    monkeypatch.setattr(Options, "learning_rate_at", moving)
    run("--max-iters", "12", "--eval-interval", "0", "--save-interval", "6")
    assert not move
    assert capsys.readouterr().out.count("out/ was removed or renamed; training continues in a new folder") == 2
    assert [row["step"] for row in read_log(Path("moved/log.jsonl"))] == [1, 2, 3, 4]
    assert [row["step"] for row in rows("out")] == [10, 11, 12]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("best", "ckpt-000012", "log.jsonl", "report.html", "samples.jsonl"),
    ]


def killed_at(place, name, *options):
    """Run with these options in a fork that exits without cleanup at the first call of `name` after a save started."""
    save = RunFolder.save

    def save_until_killed(self, *args):
        patch.setattr(place, name, lambda *_, **__: os._exit(9))
        return save(self, *args)

    patch = pytest.MonkeyPatch()
    pid = os.fork()
    if pid == 0:
        patch.setattr(RunFolder, "save", save_until_killed)
        run(*options)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


FIRST_WRITES_AFTER_A_CHECKPOINT = {
    "the link": (RunFolder, "_tidy"),
    "the deletion": (checkpoint, "prune"),
    "the sample": (train, "sample_text"),
    "the sample's row": (RunFolder, "log_sample"),
    "the report": (report, "report_page"),
}


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", FIRST_WRITES_AFTER_A_CHECKPOINT)
def test_work_that_a_killed_process_left_unfinished_is_done_at_the_next_start(workspace, monkeypatch, name, steps):
    """The process is killed after the checkpoint of step 4, which is the last or an intermediate one."""
    monkeypatch.setattr(report, "SHARE", math.inf)  # write the report after each checkpoint, even if it takes long
    options = ["--max-iters", str(steps), "--save-interval", "4", "--keep", "1"]
    run(*options, "--out-dir", "whole")
    killed_at(*FIRST_WRITES_AFTER_A_CHECKPOINT[name], *options)
    assert Path("out/ckpt-000004").is_dir()
    assert Path("out/.lock").exists()
    run(*options)
    assert_same_run("whole", "out")
    assert sorted(os.listdir("out")) == sorted(os.listdir("whole"))
    assert os.readlink("out/best") == os.readlink("whole/best")
    assert f"{steps} of {steps} steps" in Path("out/report.html").read_text()
    assert [row["step"] for row in read_log(Path("out/starts.jsonl"))] == ([0] if steps == 4 else [0, 4])


def test_a_finished_run_is_not_changed(workspace):
    run("--max-iters", "4")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    run("--max-iters", "4")
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_the_best_checkpoint_is_found_without_the_link(workspace, monkeypatch):
    values = iter([9.0, 3.0, 4.0])  # the first one is before training
    monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args: next(values))
    run("--max-iters", "8")
    best = Path("out/ckpt-000004")
    assert find_model(Path("out/best"), print) == best
    Path("out/best").unlink()
    assert find_model(Path("out/best"), print) == best
    Path("out/best").symlink_to("ckpt-000008")  # outdated, as after a kill before the link was updated
    assert find_model(Path("out/best"), print) == best
    (best / "model.safetensors").unlink()
    assert find_model(Path("out/best"), print) == Path("out/best")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_without_symbolic_links(number, workspace, monkeypatch, capsys):
    """On FAT, or on Windows without permission to create links, runs train and resume, and out/best is found."""

    def symlink(source, target, target_is_directory=False, **_):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "symlink", symlink)
    run("--max-iters", "4")
    run("--max-iters", "8")
    assert capsys.readouterr().err == ""
    names = {path.name for path in Path("out").iterdir()}
    assert "ckpt-000008" in names
    assert not {name for name in names if "best" in name or "partial" in name}
    best = find_model(Path("out/best"), print)
    assert best.parent == Path("out")
    assert best.name in names
    assert sample.main(["--checkpoint", "out/best", "-p", "a", "-m", "3"]) == 0


def test_every_option_is_restored_when_a_run_resumes(workspace):
    """A run that was started with a value other than the default keeps the value when it is resumed without the
    option."""
    config = GPT2Config.preset("nano")
    for f in fields(Options):
        if f.name in ("fresh", "out_dir"):  # these select the run, and are not stored
            continue
        base = {"data": "text"} if f.name != "data" else {}
        defaults = default_options(base, config)
        candidates = (
            [not f.default]
            if f.metadata["kind"] is bool
            else [3, 4, 0.25, "other", *f.metadata["expected"].split(", ")]
        )
        allowed = f.metadata["allowed"] or (lambda value: True)
        value = next(
            value
            for value in candidates
            if type(value) is f.metadata["kind"] and value != defaults.get(f.name) and allowed(value)
        )
        given = {**base, f.name: value}
        resolved = resolve_options(given, config, default_options(given, config))
        saved = save_state(RunOptions(given, default_options(given, config)))
        options, _, run_options = resumed_run({}, saved)
        assert getattr(options, f.name) == getattr(resolved, f.name) == value, f.name
        assert run_options.options[f.name] == value
    tree = ast.parse(inspect.getsource(train))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "given"]
    read = {ast.unparse(node.args[0]) for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("given.get", "given.pop")}  # fmt: skip
    assert used
    assert read == {"'out_dir'", "'fresh'"}, (
        "train.py: options must not be read from `given`, which lacks those of a resumed run"
    )


def save_state(run_options):
    """Write the state of a run with these options with RunFolder.save, and read it."""
    model, folder = GPT2(GPT2Config.preset("nano").with_ids(None, ()), seed=1), RunFolder("saved")
    folder.save(model, optim.AdamW(model), Tokenizer.load("bytes"), Progress(step=1), run_options, "data")
    return read_state(Path("saved/ckpt-000001"))


def test_keep_is_restored_when_a_run_resumes(workspace):
    run("--max-iters", "6", "--save-interval", "1", "--keep", "50")
    assert train.main(["--max-iters", "8"]) == 0
    assert len(list(Path("out").glob("ckpt-*"))) == 8
    run("--max-iters", "8", "--keep", "2")  # this also applies to a finished run
    assert len(list(Path("out").glob("ckpt-*"))) == 2


def test_fields_of_another_version_are_reported_and_kept(workspace, capsys):
    run("--max-iters", "2")
    file = Path("out/ckpt-000002/trainer.json")
    state = json.loads(file.read_text())
    state["ema"] = {"decay": 0.99}
    state["progress"]["epochs"] = 2
    state["options"]["lookahead"] = True
    state["defaults"]["rotary"] = 7
    file.write_text(json.dumps(state))
    update_checksums(file.parent)
    capsys.readouterr()
    run("--max-iters", "3")
    assert (
        f"{file}: fields of another version are kept, and have no effect here: options.lookahead, defaults.rotary, "
        "ema, progress.epochs\n" in capsys.readouterr().out
    )
    kept = json.loads(Path("out/ckpt-000003/trainer.json").read_text())
    assert kept["ema"] == {"decay": 0.99}
    assert kept["progress"]["epochs"] == 2
    assert kept["options"]["lookahead"] is True
    assert kept["defaults"]["rotary"] == 7


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("progress", "seconds", "x", "progress.seconds is 'x'; expected a number of at least 0"),
        ("progress", "samples", -5, "progress.samples is -5; expected an integer from 0"),
        ("progress", "tokens", True, "progress.tokens is True; expected an integer from 0"),
        ("progress", "step", 2**70, "expected an integer from 0 to 2**63 - 1"),
        ("progress", "best", [], "progress.best is []; expected a step and a val_loss"),
        ("progress", "best", {"step": 1, "val_loss": None}, "expected a step and a val_loss"),
        ("progress", "best", {"step": "1", "val_loss": 2}, "progress.best.step is '1'; expected an integer"),
        ("options", "keep", "5", "--keep is '5'; expected a value of type int"),
        ("options", "preset", "huge", "--preset is huge; expected "),
        (None, "data", 5, "data is 5; expected a value of type str"),
        (None, "optimizer_steps", 1.5, "optimizer_steps is 1.5; expected an integer"),
        (None, "progress", [], "progress is []; expected a value of type dict"),
    ],
)
def test_an_invalid_field_is_a_one_line_error(tmp_path, part, name, value, message):
    state = {"progress": {"step": 1}, "optimizer_steps": 1, "options": {}, "data": "", "defaults": {}}
    (state[part] if part else state)[name] = value
    (tmp_path / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        read_state(tmp_path)
    assert f"{tmp_path / 'trainer.json'}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_saves_even_if_a_validation_loss_is_not_finite(workspace, monkeypatch, capsys):
    for losses, best in (([math.nan, 3.0, math.inf], 8), ([math.nan, math.nan, -math.inf], None)):
        values = iter([math.nan, *losses])  # the first one is before training
        monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args, values=values: next(values))
        out = f"out-{best}"
        run("--max-iters", "12", "--out-dir", out)
        said = capsys.readouterr().out
        assert ("best validation loss 3.0000 at step 8" if best else "no validation loss was finite") in said
        folder, damaged = checkpoint.newest(Path(out))
        assert (folder.name, damaged) == ("ckpt-000012", [])
        found = read_state(folder).progress.best
        assert found == ({"step": 8, "val_loss": 3.0} if best else None)
        for line in Path(out, "log.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
        measured = [row["val_loss"] for row in read_log(Path(out, "log.jsonl")) if "val_loss" in row]
        assert measured == [value if math.isfinite(value) else None for value in losses]


def test_after_a_disk_error_the_checkpoint_is_written_again(workspace, capsys, monkeypatch):
    options = ["--max-iters", "4", "--save-interval", "4"]
    run(*options, "--out-dir", "whole")
    fsync, errors = os.fsync, iter([5])

    def fail_once(handle):
        if "optimizer.safetensors" in os.readlink(f"/proc/self/fd/{handle}"):
            for error in errors:
                raise OSError(error, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail_once)
    run(*options)
    line = (
        "out/.ckpt-000004.partial/optimizer.safetensors: Input/output error; writing the checkpoint of step 4 again\n"
    )
    assert line in capsys.readouterr().out
    assert_same_run("whole", "out")


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(workspace, capsys, monkeypatch):
    rmdir = os.rmdir

    def failing(path, *args, **kwargs):
        if str(path).endswith("ckpt-000001"):
            raise OSError(39, "Directory not empty", str(path))
        rmdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "rmdir", failing)
    run("--max-iters", "3", "--save-interval", "1", "--keep", "1")
    assert "ckpt-000001: not deleted: Directory not empty\n" in capsys.readouterr().out


def test_a_log_that_cannot_be_read_is_renamed(workspace, capsys, monkeypatch):
    run("--max-iters", "2")
    original = io.open

    def unreadable(path, mode="r", *args, **kwargs):
        if str(path) == "out/log.jsonl" and mode == "r" and not Path("out/damaged-log.jsonl").exists():
            raise OSError(5, "Input/output error")
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", unreadable)
    run("--max-iters", "3")
    said = capsys.readouterr().out
    assert "out/log.jsonl: Input/output error; renamed to out/damaged-log.jsonl, a new one is started\n" in said
    assert [row["step"] for row in rows("out")] == [3]
    assert [row["step"] for row in read_log(Path("out/damaged-log.jsonl"))] == [1, 2]


def test_a_log_with_invalid_utf8_does_not_stop_a_run(workspace):
    run("--max-iters", "2")
    with Path("out/log.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n{"step": 2')
    run("--max-iters", "3")
    assert [row["step"] for row in rows("out")] == [1, 2, 3]


def test_nothing_is_overwritten_if_no_checkpoint_is_intact(workspace, capsys):
    run("--max-iters", "1")
    (Path("out/ckpt-000001/trainer.json")).write_text("{}")
    log = Path("out/log.jsonl").read_text()
    run("--max-iters", "2", code=1)
    assert "no checkpoint is intact; --fresh starts a new run" in one_line(capsys)
    assert Path("out/log.jsonl").read_text() == log


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(workspace, capsys, monkeypatch):
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


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root can write to read-only folders")
def test_a_read_only_folder_is_an_error(workspace, capsys):
    workspace.chmod(0o500)
    try:
        run("--max-iters", "2", code=1)
    finally:
        workspace.chmod(0o700)
    assert "Permission denied" in one_line(capsys)
