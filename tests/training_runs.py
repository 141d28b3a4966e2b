"""Helpers that run train.py briefly and read the results. The fixture `workspace` provides the data set."""

import hashlib
import json
from pathlib import Path

import numpy as np

import train
from gpt2.training.run import read_log
from tinygrad2 import checkpoint

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{i} times {j} is {i * j}; the rest of line {i + j} is here.\n" for i in range(60) for j in range(12))
QUICK = ["--batch-size", "2", "--block-size", "16", "--eval-iters", "2", "--eval-interval", "4", "--log-interval", "1"]
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


def run(*options, code=0):
    """Train on data/text; `code` is the expected exit status."""
    assert train.main(["--data", "text", *QUICK, *options]) == code


def rows(out):
    """The rows of the log, with only the entries that do not depend on time."""
    return [{key: row[key] for key in SAME if key in row} for row in read_log(Path(out) / "log.jsonl")]


def newest_arrays(out):
    """The weights and the optimizer state in the newest checkpoint."""
    folder, damaged = checkpoint.newest(Path(out))
    assert not damaged
    arrays = checkpoint.load_arrays(folder / "model.safetensors")
    return {**arrays, **checkpoint.load_arrays(folder / "optimizer.safetensors")}


def assert_same_run(a, b):
    """Check that two runs have bit-identical logs, samples, weights and optimizer states."""
    assert rows(a) == rows(b)
    assert read_log(Path(a) / "samples.jsonl") == read_log(Path(b) / "samples.jsonl")
    first, second = newest_arrays(a), newest_arrays(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert np.array_equal(array, second[name]), name


def one_line(capsys):
    """The error message, which has to be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    return lines[0]


def update_checksums(folder):
    """Rewrite the manifest of a checkpoint after a test has changed its files."""
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    for name in listed:
        content = (folder / name).read_bytes()
        listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps({"files": listed}))
