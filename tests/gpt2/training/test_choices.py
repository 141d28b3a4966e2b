"""The options that a run chooses: sizes, steps, intervals and the batch per rank; early stopping; a stop signal."""

import json
import re
from pathlib import Path

import pytest

import train
from gpt2 import GPT2, GPT2Config
from gpt2.report import Run, report_page
from gpt2.training.dataset import TokenDataset
from gpt2.training.evaluation import mean_loss
from gpt2.training.options import Options, UsageError, fit_to_data, model_config, resolve_options
from gpt2.training.run import read_log
from tests.training_runs import assert_same_run, newest_arrays, rows, run
from tinygrad2 import checkpoint

NANO = GPT2Config.preset("nano")
SMALL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16"]


def starts(out="out"):
    return read_log(Path(out) / "starts.jsonl")


# Model sizes


def test_sizes_can_be_set_by_options(workspace, capsys):
    run("--max-iters", "2", *SMALL, "--block-size", "80")
    model = GPT2.from_pretrained("out/ckpt-000002")
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (1, 2, 16, 80)
    opening = "model      nano with other sizes: 8,704 parameters (1 layer, 2 heads, embedding size 16, context 80)"
    assert opening in capsys.readouterr().out
    assert train.main(["--max-iters", "3"]) == 0
    assert train.main(["--max-iters", "4", "--n-embd", "16"]) == 0
    assert train.main(["--max-iters", "5", "--n-embd", "32"]) == 1
    assert "a run with --n-embd 16; it cannot be resumed with 32" in capsys.readouterr().err


def test_a_shorter_block_size_does_not_reduce_the_context_of_the_preset():
    assert model_config({"block_size": 16}) == NANO
    assert model_config({"block_size": 65}).n_positions == 65
    with pytest.raises(UsageError, match="--n-embd 130 is not a multiple of --n-head 4; the nearest multiple is 128"):
        model_config({"n_embd": 130})


# Defaults that depend on the data and the number of steps


def fitted(given, step_tokens=512, data_tokens=10_000_000, config=NANO):
    defaults = resolve_options(given, config).__dict__
    notes = fit_to_data(given, defaults, step_tokens, data_tokens)
    return {**defaults, **given}, notes


def test_a_full_run_of_nano_uses_the_defaults_of_its_size():
    options, notes = fitted({})
    assert notes == []
    names = ("max_iters", "warmup_iters", "eval_interval", "save_interval", "log_interval")
    assert [options[name] for name in names] == [600, 40, 120, 120, 50]
    options, notes = fitted({"optimizer": "adamw"})
    assert notes == []
    assert [options[name] for name in names] == [3000, 100, 500, 500, 50]


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
@pytest.mark.parametrize("steps", [1, 7, 40, 200, 1000, 19_073])
def test_a_short_run_has_a_shorter_warm_up_and_is_evaluated(preset, steps):
    options, notes = fitted({"max_iters": steps, "preset": preset}, config=GPT2Config.preset(preset))
    assert options["warmup_iters"] <= steps / 10
    assert 1 <= options["eval_interval"] <= max(1, steps / 5)
    assert options["max_iters"] == steps
    assert bool(notes) == (steps < (600 if preset == "nano" else 7150))


def test_warm_up_is_at_most_a_tenth_of_an_explicit_decay():
    options, notes = fitted({"lr_decay_iters": 50})
    assert options["warmup_iters"] == 5
    assert notes == ["--warmup-iters 5 (1/10 of the decay)"]


def test_explicit_options_are_not_changed():
    given = {"max_iters": 20, "warmup_iters": 15, "eval_interval": 0, "save_interval": 50, "log_interval": 30}
    assert fitted(given)[0].items() >= given.items()


@pytest.mark.parametrize(("tokens", "steps"), [(159_000, 117), (100, 1), (1_000_000_000, 19_073)])
def test_fine_tuning_runs_for_at_most_three_epochs(tokens, steps):
    options, notes = fitted({"init": "gpt2"}, 4096, tokens, GPT2Config.preset("gpt2"))
    assert options["max_iters"] == steps
    assert options["warmup_iters"] <= steps / 10
    assert any("3 epochs" in note for note in notes) == (steps < 19_073)


def test_fine_tuning_prints_its_defaults_and_resumes_with_them(workspace, capsys):
    run("--max-iters", "2", "--out-dir", "base")
    tokens = TokenDataset.open("data/text", "train").tokens
    capsys.readouterr()
    fine = ["--init", "base", "--data", "text", "--batch-size", "32", "--eval-iters", "1", "--out-dir", "fine"]
    assert train.main(fine) == 0
    said = capsys.readouterr().out
    steps = -(-3 * tokens // (32 * 64))
    assert f"chosen     --max-iters {steps} (3 epochs), --warmup-iters {steps // 10} (1/10 of the steps)" in said
    assert starts("fine")[0]["options"]["lr_decay_iters"] == steps
    trainer = json.loads(Path("fine", checkpoint.name(steps), "trainer.json").read_text())
    assert trainer["defaults"]["max_iters"] == steps
    assert train.main(["--out-dir", "fine"]) == 0
    assert "the run in fine/ is already finished" in capsys.readouterr().out


# The evaluation before the first step


def test_fine_tuning_starts_with_an_evaluation(workspace, capsys):
    run("--max-iters", "2", "--out-dir", "base", "--eval-interval", "1")
    run("--max-iters", "2", "--init", "base")
    base, validation = GPT2.from_pretrained("base/ckpt-000002"), TokenDataset.open("data/text", "val")
    expected = mean_loss(base, validation, 2, 16, 2)
    said = capsys.readouterr().out
    assert f"step 0: validation loss {expected:.4f}, before training" in said
    assert f"({expected:.4f} before training), saved in out/ckpt-000002" in said
    assert starts()[0]["val_loss"] == pytest.approx(expected)
    assert [row["step"] for row in rows("out")] == [1, 2]
    found = Run.load(Path("out"))
    assert found.values("val_loss")[0] == (0, pytest.approx(expected))
    assert found.best()[0] == 2  # only checkpoints count
    assert "<svg" in report_page(found)
    run("--max-iters", "3")
    assert "val_loss" not in starts()[1]


# The batch size per rank


@pytest.mark.parametrize("ranks", range(1, 9))
def test_tokens_per_step_hardly_depend_on_the_number_of_ranks(ranks):
    options = resolve_options({}, NANO)
    note = options.fit_batch({}, ranks)
    sequences = options.total_batch_size // options.block_size
    assert sequences == options.micro_steps(ranks) * ranks * options.batch_size
    assert sequences == -(-16 // ranks) * ranks
    assert (note == "") == (sequences == 16)


def test_the_default_batch_size_divides_the_tokens_per_step():
    given = {"total_batch_size": 64 * 64}
    for ranks, batch, micro in ((1, 16, 4), (2, 16, 2), (16, 4, 1), (64, 1, 1)):
        options = resolve_options(given, NANO)
        assert options.fit_batch(given, ranks) == ""
        assert (options.batch_size, options.micro_steps(ranks)) == (batch, micro)
    with pytest.raises(UsageError, match="Its 64 sequences can be divided among 1, 2, 4 ranks"):
        resolve_options(given, NANO).fit_batch(given, 3)
    both = {"total_batch_size": 64 * 64, "batch_size": 7}
    with pytest.raises(UsageError, match="is not a multiple of --batch-size 7"):
        resolve_options(both, NANO).fit_batch(both, 1)


# A longer schedule


@pytest.mark.parametrize(
    ("again", "rises"),
    [
        (["--max-iters", "40"], True),
        (["--max-iters", "40", "--lr-decay-iters", "20"], False),
        (["--max-iters", "40", "--learning-rate", "1e-3"], False),  # requested explicitly
    ],
)
def test_a_learning_rate_that_rises_again_is_reported(workspace, capsys, again, rises):
    run("--max-iters", "20", "--eval-interval", "20", "--optimizer", "adamw")
    capsys.readouterr()
    assert train.main(again) == 0
    said = capsys.readouterr().out
    rates = [row["lr"] for row in rows("out")]
    line = re.search(
        r"rate       the learning rate was (\S+) at step 20 and increases again to (\S+), because its .*", said
    )
    assert bool(line) == rises
    if line:
        assert (float(line[1]), float(line[2])) == (
            pytest.approx(rates[19], rel=0.05),
            pytest.approx(rates[20], rel=0.05),
        )
        assert "--lr-decay-iters 20 keeps it at 3.0e-04" in line[0]


def test_a_learning_rate_that_drops_is_reported(workspace, capsys):
    run("--max-iters", "20", "--lr-decay-iters", "40", "--eval-interval", "20", "--optimizer", "adamw")
    assert "at step 40; this run ends earlier, at " in capsys.readouterr().out
    assert train.main(["--max-iters", "24", "--lr-decay-iters", "24"]) == 0
    said = capsys.readouterr().out
    rates = [row["lr"] for row in rows("out")]
    line = re.search(r"rate       the learning rate was (\S+) at step 20 and drops to (\S+), because its .*", said)
    assert line
    assert float(line[1]) == pytest.approx(rates[19], rel=0.05)
    assert float(line[2]) == pytest.approx(rates[20], rel=0.05)
    assert "--lr-decay-iters 40 keeps it at " in line[0]


def test_a_learning_rate_that_rises_from_0_is_reported(workspace, capsys):
    run("--max-iters", "10")
    assert train.main(["--max-iters", "20"]) == 0
    line = re.search(r"rate       .* ends at step 20; (.*)\n", capsys.readouterr().out)
    assert line[1] == "--learning-rate X sets a lower peak"
    assert train.main(["--max-iters", "22", "--lr-schedule", "wsd"]) == 0  # requested explicitly
    assert "increases again" not in capsys.readouterr().out
    assert train.main(["--max-iters", "24", "--lr-decay-iters", "10"]) == 0
    assert [row["lr"] for row in rows("out")[22:]] == [0, 0]


# Early stopping


def test_a_run_stops_early_and_can_be_continued(workspace, monkeypatch, capsys):
    losses = iter([9.0, 5.0, 3.0, 4.0, 3.5, 3.2, 3.1])
    monkeypatch.setattr("gpt2.training.trainer.mean_loss", lambda *args: next(losses))
    run("--max-iters", "100", "--eval-interval", "2", "--early-stop", "3")
    said = capsys.readouterr().out
    assert "early stop: no lower validation loss in 3 evaluations since step 4; --early-stop 0 continues" in said
    assert "done: 10 steps" in said
    assert sorted(path.name for path in Path("out").glob("ckpt-*"))[-1] == "ckpt-000010"
    assert Path("out/best").resolve().name == "ckpt-000004"
    assert train.main([]) == 0
    assert "already finished (10 steps)" in capsys.readouterr().out
    assert train.main(["--early-stop", "0", "--max-iters", "12"]) == 0
    assert rows("out")[-1]["step"] == 12


@pytest.mark.parametrize(
    ("stop", "step", "best", "expected"),
    [(0, 900, 0, False), (2, 100, 100, False), (2, 200, 100, False), (2, 300, 100, True), (1, 150, 100, False)],
)
def test_condition_for_early_stopping(stop, step, best, expected):
    assert Options(early_stop=stop, eval_interval=100).stops_early(step, best) == expected


# A stop request during a step


class Stop:
    """Replaces StopRequest: requests a stop after some micro-steps."""

    def __init__(self, after):
        self.left = after

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_stop_during_a_step_drops_the_step_and_the_run_resumes_bit_identically(workspace, monkeypatch, capsys):
    given = ["--max-iters", "6", "--total-batch-size", "128", "--dropout", "0.1", "--eval-interval", "3"]
    run(*given, "--out-dir", "whole")
    for after, steps in ((0, 0), (2, 0), (9, 2), (6, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(train, "StopRequest", lambda verbose, after=after: Stop(after))
            run(*given, "--out-dir", "cut")
        said = capsys.readouterr().out
        assert [row["step"] for row in rows("cut")] == [1, 2, 3, 4][: len(rows("cut"))]
        assert len(rows("cut")) >= steps
        assert "stopped after step" in said
        if not steps:
            assert "nothing to save" in said
            assert not checkpoint.find(Path("cut"))
    run(*given, "--out-dir", "cut")
    assert_same_run("whole", "cut")
    assert newest_arrays("cut")
