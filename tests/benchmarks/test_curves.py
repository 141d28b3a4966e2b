"""The comparison of training curves with PyTorch's, and the table of stored results."""

import json

import pytest

from tests.benchmarks import curves, kept
from tinygrad2 import optim


@pytest.mark.parametrize("setup", curves.PRESETS.values(), ids=curves.PRESETS)
def test_learning_rates_are_those_of_train_py(setup):
    for step in range(setup.steps):
        expected = optim.cosine(
            step, lr=setup.learning_rate, min_lr=setup.min_lr, warmup=setup.warmup_iters, decay_steps=setup.steps
        )
        assert setup.learning_rate_at(step) == pytest.approx(expected, rel=1e-12)


def test_distances():
    found = curves.distances(curves.Curve([4.0, 2.5, 1.0], 1.5), curves.Curve([4.0, 2.0, 1.25], 1.0))
    assert (found["validation"], found["validation, relative"]) == (0.5, 0.5)
    assert (found["first step"], found["last step"], found["mean"]) == (0.0, 0.25, 0.25)
    assert (found["largest"], found["largest, at step"], found["largest, relative"]) == (0.5, 2, 0.25)


@pytest.mark.slow
@pytest.mark.extras("torch", "transformers")
def test_curves_start_at_the_same_loss_and_are_reused(tmp_path, capsys):
    out, folder = tmp_path / "curves.json", tmp_path / "kept"
    folder.mkdir()
    options = ["--steps", "12", "--threads", "1", "--json", str(out), "--folder", str(folder)]
    assert curves.main(options) == 0
    record = json.loads(out.read_text())
    for distances in record["distances"].values():
        assert distances["first step"] < 1e-6
        assert distances["largest"] < 2e-3
        assert abs(distances["validation, relative"]) < 1e-3
    training = record["curves"]["tinygrad2"]["training"]
    assert len(training) == 12
    assert training[-1] < training[0] - 1
    assert curves.table(record) == capsys.readouterr().out.splitlines()[-len(curves.table(record)) - 1 : -1]

    changed = folder / "tinygrad2-12.json"  # the second call reads the curves instead of training again
    changed.write_text(json.dumps({"training": training, "validation": 2 * record["curves"]["PyTorch"]["validation"]}))
    assert curves.main(options) == 1
    assert json.loads(out.read_text())["distances"]["tinygrad2"]["validation, relative"] == pytest.approx(1)


def test_only_the_newest_result_of_a_processor_is_used(tmp_path):
    for name, processor, date, ratio in (
        ("a", "X", "2026-01-02", 1.5),
        ("b", "X", "2026-01-01", 9),
        ("c", "Y", "2025-01-01", 2),
    ):
        step = {
            "ours": {
                "median": 1,
                "tokens_per_s": 3.0,
                "times_as_fast_as": {"slow": {"median": 4}, "fast": {"median": ratio}},
            },
            "slow": {"median": 8},
            "fast": {"median": 2},
        }
        record = {"benchmark": "train_step", "processor": processor, "date": date, "tasks": {"step": step}}
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps(record))
    assert kept.rows(tmp_path) == [
        kept.Row("X", "2026-01-02", "step, 124M", "ours", 3.0, "fast", {"median": 1.5}),
        kept.Row("Y", "2025-01-01", "step, 124M", "ours", 3.0, "fast", {"median": 2}),
    ]


def test_float32_is_compared_only_with_float32(tmp_path):
    times = {"PyTorch": {"median": 1.5}, "PyTorch bfloat16": {"median": 0.5}}
    step = {
        "ours": {"median": 2, "tokens_per_s": 3.0, "times_as_fast_as": times},
        "ours bfloat16": {"median": 1, "tokens_per_s": 6.0, "times_as_fast_as": times},
        "PyTorch": {"median": 3},
        "PyTorch bfloat16": {"median": 1},
    }
    record = {"benchmark": "train_step", "processor": "X", "date": "2026-01-01", "tasks": {"step": step}}
    (tmp_path / "cpu-a.json").write_text(json.dumps(record))
    assert [(row.name, row.peer) for row in kept.rows(tmp_path)] == [
        ("ours", "PyTorch"),
        ("ours bfloat16", "PyTorch bfloat16"),
    ]


def test_stored_results_are_printed(capsys):
    kept.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(kept.rows()) + len({row.processor for row in kept.rows()})
    assert any("times PyTorch" in line for line in lines)
