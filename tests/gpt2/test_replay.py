"""python -m gpt2.replay: a skipped step is run again with checks, on any device and in any dtype."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2 import replay
from tests.spoiled import spoil_steps
from tests.training_runs import run, update_checksums
from tinygrad2 import checkpoint

FIRST = "the first value that is not finite: "


def replayed(capsys, *options, code=0):
    capsys.readouterr()
    assert replay.main(["out/bad-step-2", "--device", "cpu", *options]) == code
    said = capsys.readouterr()
    return (said.out if code == 0 else said.err).splitlines()


@pytest.fixture
def skipped(workspace, monkeypatch, capsys):
    """The lines that a run printed about its step 2, which was skipped."""
    spoil_steps(monkeypatch, 1)
    run("--max-iters", "2", "--dropout", "0.1", "--total-batch-size", "64")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return lines[next(i for i, line in enumerate(lines) if "skipped" in line) + 1 :][:2]


def inject(name, index, value):
    """Change a weight in the stored step."""
    file = Path("out/bad-step-2/model.safetensors")
    arrays = checkpoint.load_arrays(file)
    full = next(key for key in arrays if key.endswith(name))
    arrays[full][index] = value
    checkpoint.save_arrays(file, arrays, {"format": "pt"})
    update_checksums(file.parent)


def test_replay_prints_the_same_lines_as_the_run(skipped, capsys):
    lines = replayed(capsys)
    assert lines[0].startswith("out/bad-step-2: step 2; its loss was ")
    assert lines[0].endswith(", and its gradient norm not finite; float32 on cpu")
    assert lines[1:] == skipped
    assert skipped[0].startswith(f"{FIRST}spoil after h.2.mlp.c_proj, backward pass: the gradient of the result of ")


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_damaged_weight_is_reported_in_any_dtype(skipped, capsys, value, dtype):
    inject("h.1.attn.c_proj.weight", (2, 9), value)
    lines = replayed(capsys, "--dtype", dtype, "--threads", "1")
    assert lines[0].endswith(f"{dtype} on cpu")
    assert lines[1] == (
        f"{FIRST}linear in h.1.attn.c_proj, forward pass: parameter h.1.attn.c_proj.weight [2, 9] is {value} "
        "(1 of 16,384 values)"
    )
    assert lines[2] == "this suggests damaged weights: use an intact checkpoint, or convert the model again"


def test_an_overflow_is_traced_to_the_first_large_value(skipped, capsys):
    inject("h.1.ln_1.bias", 3, 1e38)
    lines = replayed(capsys)
    large = (
        "the first value above 1.8e+19, whose square overflows in float32: add_layernorm in h.1.ln_1, forward pass: "
    )
    assert lines[1].startswith(f"{FIRST}attention after h.1.attn.c_attn, forward pass: its result ")
    assert lines[2].startswith(f"before it, {large}parameter h.1.ln_1.bias [3] is 1e+38")
    assert lines[3].startswith("this suggests damaged weights")


def test_all_values_are_finite_without_the_fault(skipped, capsys, monkeypatch):
    folder = Path.cwd()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    lines = replayed(capsys, "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert lines[1].startswith("every value is finite when the step is run again in float32 on cpu: the cause is ")
    assert found == {"step": 2, "dtype": "float32", "device": "cpu", "found": False, "lines": lines[1:]}


def test_an_unsupported_precision_is_replaced_by_float32(skipped, capsys):
    file = Path("out/bad-step-2/step.json")
    file.write_text(file.read_text().replace('"dtype": "float32"', '"dtype": "tf32"'))
    update_checksums(file.parent)
    lines = replayed(capsys)
    assert lines[0].endswith("; computing in float32")
    assert lines[1].endswith("float32 on cpu")


def test_errors_print_one_line(skipped, capsys):
    for options in (["--threads", "0"], ["--json", "nowhere/x.json"]):
        with pytest.raises(SystemExit) as end:
            replayed(capsys, *options)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"gpt2.replay: error: {options[0]}")
    file = Path("out/bad-step-2/batch.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = replayed(capsys, code=1)
    assert line.startswith("gpt2.replay: error: out/bad-step-2/batch.safetensors: ")
    shutil.rmtree("out/bad-step-2")
    (line,) = replayed(capsys, code=1)
    assert line.startswith("gpt2.replay: error: out/bad-step-2: not a skipped step; expected the folder bad-step-N")
