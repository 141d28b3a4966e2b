"""train.py, as a user runs it: resuming, stopping, what it says, what it refuses. The data set is a small text."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from data.prepare import prepare
from gpt2 import GPT2, Tokenizer, report
from gpt2.training import options
from gpt2.training.dataset import SampleOrder
from gpt2.training.evaluation import evaluate_task
from gpt2.training.run import read_log
from gpt2.training.tasks import TASKS, load_items
from tinygrad2 import checkpoint
from tinygrad2.backend import get_backend

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{i} times {j} is {i * j}; the rest of line {i + j} is here.\n" for i in range(60) for j in range(12))
QUICK = ["--batch-size", "2", "--block-size", "16", "--eval-iters", "2", "--eval-interval", "4", "--log-interval", "1"]
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


@pytest.fixture(scope="session")
def folder_with_data(tmp_path_factory):
    """A folder whose data/ holds the set `text`, prepared once."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], "bytes", folder / "data" / "text")
    return folder


@pytest.fixture
def user(folder_with_data, tmp_path, monkeypatch):
    """An empty current directory with data/text in it; signal handlers are put back afterwards."""
    (tmp_path / "data").mkdir()
    shutil.copytree(folder_with_data / "data" / "text", tmp_path / "data" / "text")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*options, code=0):
    assert train.main(["--data", "text", *QUICK, *options]) == code


def rows(out):
    return [{key: row[key] for key in SAME if key in row} for row in read_log(Path(out) / "log.jsonl")]


def newest_arrays(out):
    folder, damaged = checkpoint.newest(Path(out))
    assert not damaged
    arrays = checkpoint.load_arrays(folder / "model.safetensors")
    return {**arrays, **checkpoint.load_arrays(folder / "optimizer.safetensors")}


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    assert read_log(Path(a) / "samples.jsonl") == read_log(Path(b) / "samples.jsonl")
    first, second = newest_arrays(a), newest_arrays(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert np.array_equal(array, second[name]), name


def interrupt_at(monkeypatch, position, error):
    """Make the data loader fail when it comes to this sample."""
    whole = SampleOrder.indices

    def indices(self, first, count):
        if first == position:
            raise error
        return whole(self, first, count)

    monkeypatch.setattr(SampleOrder, "indices", indices)
    return lambda: monkeypatch.setattr(SampleOrder, "indices", whole)


@pytest.mark.parametrize("more", [[], ["--dropout", "0.2", "--total-batch-size", "96", "--weight-decay", "0.3"]])
def test_a_run_that_crashed_goes_on_to_the_same_bits(user, monkeypatch, capsys, more):
    run("--max-iters", "9", "--save-interval", "3", "--out-dir", "whole", *more)
    per_step = 6 if more else 2
    mend = interrupt_at(monkeypatch, 7 * per_step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        run("--max-iters", "9", "--save-interval", "3", "--out-dir", "cut", *more)
    assert [row["step"] for row in rows("cut")] == [1, 2, 3, 4, 5, 6, 7]
    mend()
    assert train.main(["--out-dir", "cut"]) == 0  # no other option: the run knows how it was started
    assert "resuming from cut/ckpt-000006, step 6" in capsys.readouterr().out
    assert_same_run("whole", "cut")


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(user, capsys):
    run("--max-iters", "8", "--out-dir", "whole")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in (signal.SIGINT, signal.SIGTERM):
        out = f"stopped-{number.name}"
        command = [
            sys.executable,
            ROOT / "train.py",
            "--data",
            "text",
            *QUICK,
            "--out-dir",
            out,
            "--max-iters",
            "100000",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        said = process.stdout.read()
        assert process.wait(30) == 0
        step = int(re.search(r"stopped after step ([\d,]+)", said)[1].replace(",", ""))
        assert f"saved in {out}/{checkpoint.name(step)}; python train.py --out-dir {out} resumes it" in said
        assert checkpoint.newest(Path(out))[0].name == checkpoint.name(step)
        assert [row["step"] for row in rows(out)] == list(range(1, step + 1))


def test_killed_in_the_middle_nothing_is_lost(user):
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


def test_the_log_has_one_object_a_step(user):
    run("--max-iters", "5", "--total-batch-size", "64")
    logged = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in logged] == [64, 128, 192, 256, 320]
    for row in logged:
        assert {"step", "loss", "lr", "grad_norm", "seconds", "tokens_per_s", "tokens"} <= row.keys()
        assert row["tokens_per_s"] == pytest.approx(64 / row["seconds"], rel=1e-2)
    assert [row["step"] for row in logged if "val_loss" in row] == [4, 5]


def test_the_share_of_a_known_peak_is_said_and_logged(user, monkeypatch, capsys):
    run("--max-iters", "2", "--out-dir", "unknown")
    assert "MFU" not in capsys.readouterr().out
    assert not any("mfu" in row for row in read_log(Path("unknown/log.jsonl")))
    asked = []
    cuda = SimpleNamespace(  # of a GPU whose peak is known, and that decode.cu does not support
        peak=lambda precision: asked.append(precision) or 1e-3,
        use_tf32=lambda on: None,
        limits=lambda: None,
        type_name=lambda dtype: None,
    )
    monkeypatch.setattr(get_backend("cpu"), "cuda", cuda)
    run("--max-iters", "4")
    config = GPT2.from_pretrained("out/ckpt-000004").config
    for row in read_log(Path("out/log.jsonl")):
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * config.flops_per_token(16) / 1e9, abs=1e-4)
    assert asked == ["float32"]
    said = re.findall(r"tok/s \| (\d+) % MFU", capsys.readouterr().out)
    assert said == [f"{100 * row['mfu']:.0f}" for row in read_log(Path("out/log.jsonl"))]


def test_accumulation_is_the_same_as_one_large_batch(user):
    common = ["--max-iters", "4", "--dtype", "float64", "--dropout", "0.1", "--total-batch-size", "128"]
    for batch in (8, 4, 1):
        run(*common, "--batch-size", str(batch), "--out-dir", f"batch{batch}", "--eval-interval", "0")
    expected = newest_arrays("batch8")
    for batch in (4, 1):
        for name, array in newest_arrays(f"batch{batch}").items():
            assert np.linalg.norm(array - expected[name]) <= 1e-9 * np.linalg.norm(expected[name]), name


def test_training_learns(user):
    run("--max-iters", "60", "--batch-size", "8", "--block-size", "32", "--warmup-iters", "5", "--eval-interval", "20")
    losses = [row["loss"] for row in rows("out")]
    assert losses[0] == pytest.approx(np.log(257), abs=0.3)
    assert np.mean(losses[-5:]) < 2.6
    values = [row["val_loss"] for row in rows("out") if "val_loss" in row]
    assert values[-1] < values[0]


def test_shards_of_another_program_are_trained_on_as_they_are(user, gpt2_files, capsys):
    (user / "data" / "theirs").mkdir()
    for split in ("train", "val"):
        Tokenizer.load("gpt2").encode(TEXT).astype("<u2").tofile(user / "data" / "theirs" / f"{split}.bin")
    run("--data", "theirs", "--max-iters", "2")
    run("--data", "theirs", "--max-iters", "3")
    assert "to validate (gpt2)" in capsys.readouterr().out
    assert [row["step"] for row in rows("out")] == [1, 2, 3]
    assert Tokenizer.load(checkpoint.newest(Path("out"))[0]).name == "gpt2"


def test_tasks_are_scored_at_evaluations(user, monkeypatch, capsys):
    """From the cache; the figures are those of the model that was saved then, and a resumed run goes on with them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "cache"))
    (user / "cache" / "tinygrad2").mkdir(parents=True)
    questions = [{"ctx": f"{i} times {i}", "endings": ["is here.", "rest"], "label": i % 2} for i in range(6)]
    lines = [json.dumps(question) + "\n" for question in questions]
    (user / "cache" / "tinygrad2" / "hellaswag_val.jsonl").write_text("".join(lines))
    run("--eval", "hellaswag", "--eval-items", "4", "--max-iters", "4", "--save-interval", "4")
    run("--max-iters", "6")
    scored = {row["step"]: row for row in read_log(Path("out/log.jsonl")) if "hellaswag_acc" in row}
    assert list(scored) == [4, 6]
    task, folder = TASKS["hellaswag"], "out/ckpt-000006"
    figures = evaluate_task(task, GPT2.from_pretrained(folder), Tokenizer.load(folder), load_items(task, limit=4), 2)
    assert figures == {name: scored[6][f"hellaswag_{name}"] for name in ("acc_norm", "acc", "items", "cut")}
    assert figures["items"] == 4
    assert f"  hellaswag: acc {scored[6]['hellaswag_acc']:.4f}" in capsys.readouterr().out


def test_a_task_that_cannot_be_had_is_said_before_training(user, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "cache"))
    monkeypatch.setitem(TASKS, "lambada", dataclasses.replace(TASKS["lambada"], url="http://127.0.0.1:9/words.jsonl"))
    monkeypatch.setenv("no_proxy", "*")
    run("--eval", "lambada", "--max-iters", "2", code=1)
    said = capsys.readouterr().err
    assert said.startswith("train.py: lambada: http://127.0.0.1:9/words.jsonl could not be downloaded (")
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_newest_best_and_the_last_few_are_kept(user, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args: next(values))
    run("--max-iters", "10", "--eval-interval", "2", "--save-interval", "2", "--keep", "2")
    assert sorted(path.name for path in Path("out").glob("ckpt-*")) == ["ckpt-000004", "ckpt-000008", "ckpt-000010"]
    assert Path("out/best").resolve().name == "ckpt-000004"
    GPT2.from_pretrained("out/best")


def test_fresh_renames_and_never_deletes(user, capsys):
    run("--max-iters", "2")
    before = Path("out/log.jsonl").read_text()
    run("--max-iters", "3", "--fresh")
    (aside,) = Path().glob("out-*")
    assert (aside / "log.jsonl").read_text() == before
    checkpoint.verify(aside / "ckpt-000002")
    assert f"out/ is now {aside}/" in capsys.readouterr().out
    assert len(rows("out")) == 3


def test_a_finished_run_says_so_and_can_be_trained_on(user, capsys):
    run("--max-iters", "2")
    capsys.readouterr()
    assert train.main([]) == 0
    said = capsys.readouterr().out
    assert "the run in out/ is already finished (2 steps)" in said
    assert "--max-iters 4 continues it, --fresh starts a new run" in said
    assert train.main(["--max-iters", "4"]) == 0
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--preset", "gpt2"], "--preset nano; it cannot be resumed with gpt2"),
        (["--block-size", "8"], "--block-size 16; it cannot be resumed with 8"),
        (["--seed", "3"], "--seed 1337; it cannot be resumed with 3"),
        (["--dtype", "float64"], "--dtype float32; it cannot be resumed with float64"),
    ],
)
def test_a_run_goes_on_only_as_it_was_started(user, capsys, option, message):
    run("--max-iters", "2")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert train.main(["--max-iters", "4", *option]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--fresh to start a new run" in error
    assert len(error.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_the_data_of_a_run_may_get_another_name_and_nothing_else(user, capsys):
    run("--max-iters", "2")
    assert train.main(["--max-iters", "3", "--data", "./data/text/"]) == 0
    (user / "data" / "text").rename(user / "data" / "mine")
    assert train.main(["--max-iters", "4", "--data", "mine"]) == 0
    assert train.main(["--max-iters", "5"]) == 0
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4, 5]
    (user / "other.txt").write_text(TEXT.replace("times", "plus"))
    prepare([str(user / "other.txt")], "bytes", user / "data" / "other")
    capsys.readouterr()
    assert train.main(["--max-iters", "6", "--data", "other"]) == 1
    assert "data/other is not the data that out/ was trained on so far: it is another data set, or" in one_line(capsys)


def test_fine_tuning_starts_from_the_weights(user, capsys):
    run("--max-iters", "3", "--out-dir", "base")
    base = checkpoint.newest(Path("base"))[0]
    run("--max-iters", "1", "--init", str(base), "--learning-rate", "1e-12", "--weight-decay", "0")
    trained, start = GPT2.from_pretrained(checkpoint.newest(Path("out"))[0]), GPT2.from_pretrained(base)
    for (name, a), (_, b) in zip(trained.named_parameters(), start.named_parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-9, err_msg=name)


def test_the_report_shows_the_whole_run_also_after_it_went_on(user, capsys):
    run("--max-iters", "6")
    assert "its curves and samples: out/report.html" in capsys.readouterr().out
    run("--max-iters", "12", "--batch-size", "4", "--total-batch-size", "64")
    starts, samples = read_log(Path("out/starts.jsonl")), read_log(Path("out/samples.jsonl"))
    assert [(start["step"], start["options"]["batch_size"]) for start in starts] == [(0, 2), (6, 4)]
    assert starts[1]["given"] == {**starts[0]["given"], "max_iters": 12, "batch_size": 4, "total_batch_size": 64}
    assert starts[0]["machine"]["device"] == "cpu"
    assert [sample["step"] for sample in samples] == [4, 6, 8, 12]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "12 of 12 steps" in page
    assert all(f"<h3>step {step}</h3>" in page for step in (4, 6, 8, 12))
    assert page.count("from step 6 on") == 1


def test_the_report_is_written_at_evaluations_and_when_stopped(user, monkeypatch):
    steps = []
    page = report.report_page
    monkeypatch.setattr(report, "report_page", lambda run: steps.append(run.step) or page(run))
    monkeypatch.setattr(report, "SHARE", 1e9)
    run("--max-iters", "10")
    assert steps == [4, 8, 10]
    monkeypatch.setattr(train.StopRequest, "__enter__", lambda self: setattr(self, "requested", True) or self)
    monkeypatch.setattr(train.StopRequest, "__exit__", lambda *ignored: None)
    run("--max-iters", "12")
    assert steps == [4, 8, 10, 11]


def test_a_report_that_fails_does_not_end_the_run(user, capsys, monkeypatch):
    monkeypatch.setattr(report, "report_page", lambda run: 1 / 0)
    run("--max-iters", "4")
    assert "out/report.html was not written: ZeroDivisionError: division by zero" in capsys.readouterr().out


def board(out):
    """(tag, step, value) of everything in TensorBoard's files, and the steps from which on older values are void."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    values, void = [], []
    for file in sorted(Path(out, "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length (8 bytes), its checksum (4), an event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            values += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                void.append(event.step)
    return values, void


def test_tensorboard_gets_what_the_log_gets(user):
    pytest.importorskip("tensorboardX")
    run("--max-iters", "4", "--tensorboard")
    run("--max-iters", "6")  # the run remembers it
    values, void = board("out")
    expected = [
        (key, row["step"], pytest.approx(value, rel=1e-6))
        for row in read_log(Path("out/log.jsonl"))
        for key, value in row.items()
        if key != "step"
    ]
    assert [value for value in values if "sample" not in value[0]] == expected
    assert [step for tag, step, _ in values if "sample" in tag] == [4, 6]
    assert void == [1, 5]
    run("--max-iters", "7", "--no-tensorboard")
    assert board("out")[0] == values


def test_tensorboard_that_is_not_installed_is_said_before_anything_happens(user, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run("--max-iters", "2", "--tensorboard", code=1)
    assert one_line(capsys).endswith('--tensorboard: tensorboardX is not installed; pip install -e ".[tensorboard]"')
    assert not Path("out").exists()


# Bad input: one line, a non-zero exit, and nothing lost --------------------------------------------------------------


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0]


def damage_shard(user, change):
    shard = user / "data" / "text" / "train-00000.bin"
    shard.write_bytes(change(shard.read_bytes()))


def retell(user, **changes):
    """Change the manifest, checksums included, so that only the content of the shard is wrong."""
    from gpt2.training.dataset import file_sha256

    file = user / "data" / "text" / "manifest.json"
    manifest = json.loads(file.read_text())
    for shard in manifest["shards"]:
        shard["sha256"] = file_sha256(user / "data" / "text" / shard["file"])
    file.write_text(json.dumps({**manifest, **changes}))


def foreign_ids(user):
    damage_shard(user, lambda data: b"\xff\x7f" * (len(data) // 2))
    retell(user)


def make_small(user):
    (user / "small.txt").write_text("too little\n" * 30)
    prepare([str(user / "small.txt")], "bytes", user / "data" / "small")


BAD = {
    "no such data set": (None, ["--data", "nothing"], r"data 'nothing': no such data set \(data/ has text\)"),
    "an empty folder": (lambda user: (user / "empty").mkdir(), ["--data", "empty"], "data 'empty': no such data set"),
    "a truncated shard": (
        lambda user: damage_shard(user, lambda data: data[:-10]),
        [],
        r"train-00000\.bin: the shard has [\d,]+ bytes, expected",
    ),
    "a changed shard": (
        lambda user: damage_shard(user, lambda data: data[:-1] + b"\x01"),
        [],
        r"train-00000\.bin: the shard's checksum differs",
    ),
    "ids outside the vocabulary": (
        foreign_ids,
        [],
        r"train-00000\.bin: it has the id 32767, but the vocabulary has 257",
    ),
    "a manifest of something else": (
        lambda user: (user / "data" / "text" / "manifest.json").write_text("[1]"),
        [],
        r"manifest\.json: not a valid manifest",
    ),
    "a context longer than the model's": (
        None,
        ["--block-size", "65"],
        "65 is longer than the model's context of 64",
    ),
    "too little data": (
        lambda user: make_small(user),
        ["--data", "small", "--block-size", "64"],
        r"the split val has \d+ tokens; a block size of 64 needs 64 \+ 1 = 65",
    ),
    "a batch that does not divide": (
        None,
        ["--total-batch-size", "100"],
        r"100 is not a multiple of --batch-size 2 x --block-size 16 = 32 tokens; the nearest multiple is 96 or 128",
    ),
    "another vocabulary": (
        None,
        ["--preset", "gpt2"],
        r"tokenizer bytes \(257 tokens\); expected that of the preset gpt2 \(50,257 tokens\)",
    ),
    "no such model": (None, ["--init", "nowhere"], "nowhere: no such file or folder; expected a model,"),
    "init with a preset": (None, ["--init", "x", "--preset", "nano"], "remove --preset"),
    "an out-dir that is a file": (
        lambda user: (user / "taken").write_text("x"),
        ["--out-dir", "taken"],
        r"--out-dir taken is a file; name a folder",
    ),
    "a file is not renamed for a fresh start": (
        lambda user: (user / "taken").write_text("x"),
        ["--out-dir", "taken", "--fresh"],
        r"--out-dir taken is a file; name a folder",
    ),
    "a rate that ends above its peak": (
        None,
        ["--min-lr", "1e-2", "--learning-rate", "1e-3"],
        "--min-lr 0.01 is more than --learning-rate 0.001",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(user, capsys, case):
    prepare_case, options, message = BAD[case]
    if prepare_case:
        prepare_case(user)
    run("--max-iters", "3", *options, code=1)
    assert re.search(message, one_line(capsys))
    if case != "ids outside the vocabulary":  # which shows when they are read; the others before a run begins
        assert not list(Path().rglob("log.jsonl"))
    assert not Path("out").exists() or not list(Path("out").glob("ckpt-*"))


def test_a_loss_that_is_not_a_number_stops_before_it_does_harm(user, capsys):
    run("--max-iters", "4", "--save-interval", "2")
    before = newest_arrays("out")
    run("--max-iters", "40", "--learning-rate", "2e9", "--grad-clip", "0", "--warmup-iters", "0", code=1)
    line = one_line(capsys)
    assert re.search(r"step \d+: the loss is (nan|inf|[\d.e+]+) and the gradient's norm (nan|inf)", line)
    assert "The last checkpoint is out/ckpt-000004." in line
    after = newest_arrays("out")
    assert all(np.array_equal(array, after[name]) for name, array in before.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(user, capsys):
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


def test_a_damaged_checkpoint_is_set_aside_and_never_counts_as_the_newest(user):
    run("--max-iters", "6", "--save-interval", "2", "--keep", "3")
    damaged = Path("out/ckpt-000006/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    interrupted = ["--max-iters", "5", "--save-interval", "1", "--keep", "1"]
    run(*interrupted)
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000005"
    assert Path("out/damaged-ckpt-000006").is_dir()
    run("--max-iters", "6", "--keep", "1")
    assert len(rows("out")) == 6


@pytest.mark.parametrize(
    "state", ["{}", '{"progress": {"step": "3"}, "optimizer_steps": 1, "options": {}, "data": ""}', "[]", "\xff"]
)
def test_a_checkpoint_without_a_sound_state_is_passed_over(user, capsys, state):
    run("--max-iters", "4", "--save-interval", "2")
    file = Path("out/ckpt-000004/trainer.json")
    file.write_text(state)
    manifest = checkpoint.read_json(file.with_name("manifest.json"))
    manifest["files"]["trainer.json"] = checkpoint._describe(file)
    checkpoint.write_json(file.with_name("manifest.json"), manifest)
    run("--max-iters", "4")
    assert "resuming from out/ckpt-000002, step 2" in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(user, capsys):
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


def test_data_prepared_anew_under_the_same_name_is_noticed(user, capsys):
    run("--max-iters", "2")
    (user / "other.txt").write_text(TEXT.replace("times", "plus"))
    prepare([str(user / "other.txt")], "bytes", user / "data" / "text", fresh=True)
    run("--max-iters", "4", code=1)
    assert "data/text is not the data that out/ was trained on so far" in one_line(capsys)


def test_another_vocabulary_beside_the_data_is_noticed(user, capsys):
    Tokenizer.load("bytes").save(user / "data" / "text")
    manifest = user / "data" / "text" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(Tokenizer.load("bytes").fingerprint, "0" * 64))
    run("--max-iters", "1", code=1)
    assert "name different tokenizers" in one_line(capsys)


def test_a_mistake_with_fresh_renames_nothing(user, capsys):
    run("--max-iters", "2")
    assert train.main(["--fresh", "--data", "nothing"]) == 1
    assert train.main(["--fresh", "--data", "text", "--total-batch-size", "100"]) == 1
    assert not list(Path().glob("out-*"))


def test_the_default_data_may_be_named(user, monkeypatch):
    (user / "data" / "text").rename(user / "data" / "pydoc")
    assert train.main([*QUICK, "--max-iters", "2"]) == 0
    assert train.main(["--data", "pydoc", "--max-iters", "3"]) == 0


def test_a_log_with_foreign_bytes_does_not_stop_a_run(user):
    run("--max-iters", "2")
    with Path("out/log.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n{"step": 2')
    run("--max-iters", "3")
    assert [row["step"] for row in rows("out")] == [1, 2, 3]


@pytest.mark.parametrize("screen", ["closed", "ascii"])
def test_a_screen_that_fails_does_not_stop_a_run(user, screen):
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
    assert (process.returncode, error) == (0, b"")
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000008"


def test_an_out_dir_can_be_fine_tuned_from(user):
    run("--max-iters", "2", "--out-dir", "base")
    run("--max-iters", "1", "--init", "base")


def test_where_no_checkpoint_is_whole_nothing_is_overwritten(user, capsys):
    run("--max-iters", "1")
    (Path("out/ckpt-000001/trainer.json")).write_text("{}")
    log = Path("out/log.jsonl").read_text()
    run("--max-iters", "2", code=1)
    assert "no checkpoint is intact; --fresh starts a new run" in one_line(capsys)
    assert Path("out/log.jsonl").read_text() == log


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(user, capsys, monkeypatch):
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
    os.chdir(user)
    assert checkpoint.newest(Path("out"))[0].name == "ckpt-000002"
    assert [path.name for path in Path("out").iterdir() if path.name.startswith(".")] == []
    run("--max-iters", "4")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(user, capsys):
    user.chmod(0o500)
    try:
        run("--max-iters", "2", code=1)
    finally:
        user.chmod(0o700)
    assert "Permission denied" in one_line(capsys)


def test_the_help_needs_no_data_and_is_quick():
    began = time.perf_counter()
    said = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--batch-size" in said
    assert time.perf_counter() - began < 10


def test_a_resumed_run_keeps_the_defaults_that_it_was_started_with(user, monkeypatch):
    run("--max-iters", "2", "--out-dir", "newer")
    run("--max-iters", "2", "--out-dir", "older")
    state = Path("older/ckpt-000002/trainer.json")
    values = json.loads(state.read_text())
    assert values.pop("defaults")["beta2"] == 0.95
    state.write_text(json.dumps(values))  # as earlier versions wrote it; the folder's starts.jsonl knows more
    sign_again(state.parent)
    monkeypatch.setattr(options, "SIZE_DEFAULTS", {"small": {**options.SIZE_DEFAULTS["small"], "learning_rate": 1e-5}})
    monkeypatch.setattr(options.Options.__dataclass_fields__["beta2"], "default", 0.5)
    for folder in ("newer", "older"):
        assert train.main(["--out-dir", folder, "--max-iters", "4"]) == 0
        start = json.loads(Path(folder, "starts.jsonl").read_text().splitlines()[-1])["options"]
        assert (start["beta2"], start["learning_rate"], start["min_lr"]) == (0.95, 3e-3, 3e-3 / 10)
        assert start["lr_decay_iters"] == 4  # follows --max-iters


def sign_again(folder):
    """List the checksums of a checkpoint whose files were changed."""
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    for name in listed:
        content = (folder / name).read_bytes()
        listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps({"files": listed}))


def test_it_trains_outside_the_main_thread(user):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(["--data", "text", *QUICK, "--max-iters", "2"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_other_optimizers_resume_to_the_same_bits(user, capsys, optimizer):
    given = ["--optimizer", optimizer, "--dropout", "0.1", "--learning-rate", "1e-2", "--lr-decay-iters", "6"]
    run("--out-dir", "whole", "--max-iters", "6", *given)
    run("--out-dir", "cut", "--max-iters", "3", *given)
    assert train.main(["--out-dir", "cut", "--max-iters", "6", "--profile"]) == 0
    assert re.search(rf" ms \| {optimizer} [\d,]+ ms \| ", capsys.readouterr().out)
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, cut = (Path(out, "ckpt-000006", name).read_bytes() for out in ("whole", "cut"))
        assert whole == cut, name
    assert read_log(Path("whole/log.jsonl"))[-1]["loss"] < read_log(Path("whole/log.jsonl"))[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "sgd", "--beta1", "0.8"], "--beta1 is for --optimizer adamw and muon only; this run has sgd"),
        (["--momentum", "0.8"], "--momentum is for --optimizer muon and sgd only; this run has adamw"),
        (["--optimizer", "muon", "--nesterov"], "--nesterov is for --optimizer sgd only; this run has muon"),
        (["--optimizer", "adam"], "--optimizer is adam; expected adamw, muon, sgd"),
    ],
)
def test_options_of_another_optimizer_are_refused(user, capsys, options, message):
    with contextlib.suppress(SystemExit):
        train.main(["--data", "text", *QUICK, "--max-iters", "2", *options])
    assert message in capsys.readouterr().err


def test_the_optimizer_of_a_run_stays(user, capsys):
    run("--max-iters", "2")
    assert train.main(["--max-iters", "4", "--optimizer", "sgd"]) == 1
    assert "--optimizer adamw; it cannot be resumed with sgd" in capsys.readouterr().err
