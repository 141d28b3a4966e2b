"""Does bfloat16 train as float32 does on a CPU? python tests/benchmarks/bfloat16.py [--preset gpt2] [--json FILE]

Trains twice with the same options on the documentation that ships with Python: 300 steps of nano (bytes), or 60 of gpt2
(GPT-2's vocabulary, one sequence of 1,024 tokens per step). Compares the training losses, smoothed over 20 steps, and
the final validation losses. They may differ by 1 % and 0.5 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import RESULTS, command, new_file, slug, versions

ROOT = Path(__file__).resolve().parents[2]
PRESETS: dict[str, tuple[int, str, list[str]]] = {  # steps, tokenizer, options
    # A third of the steps are warm-up, because the first large updates amplify rounding errors. (With the default
    # learning rate of nano and 30 warm-up steps, float32 with TINYGRAD2_KERNELS=reference differs from float32 by 1%
    # after 40 steps. With 6 warm-up steps, gpt2's smoothed losses in bfloat16 differ from float32 by 1.1%.)
    "nano": (300, "bytes", ["--optimizer", "adamw", "--learning-rate", "1e-3", "--warmup-iters", "100"]),
    "gpt2": (60, "gpt2", ["--batch-size", "1", "--block-size", "1024", "--dropout", "0", "--warmup-iters", "20"]),
}
DTYPES = ("float32", "bfloat16")
WINDOW = 20  # steps
LIMITS = {"training": 0.01, "validation": 0.005}  # relative differences


def train(out: Path, data: Path, preset: str, steps: int, dtype: str, more: Sequence[str]) -> list[dict[str, Any]]:
    """Run train.py and return the rows of its log."""
    options = ["--preset", preset, "--data", str(data), "--out-dir", str(out), "--dtype", dtype, "--device", "cpu"]
    options += ["--max-iters", str(steps), "--eval-interval", str(steps), "--eval-iters", "20", "--save-interval", "0"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *options, *more], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"train.py failed: {done.stderr.strip()}")
    if f", {dtype}, " not in done.stdout:
        raise ValueError(next(line for line in done.stdout.splitlines() if line.startswith("--dtype")))
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(float32: list[dict[str, Any]], bfloat16: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of the smoothed training losses, and that of the final validation losses."""
    window = np.ones(WINDOW) / WINDOW
    wide, narrow = (np.convolve([row["loss"] for row in rows], window, "valid") for rows in (float32, bfloat16))
    final = [next(row["val_loss"] for row in reversed(rows) if "val_loss" in row) for rows in (float32, bfloat16)]
    return {"training": float(np.abs(narrow / wide - 1).max()), "validation": abs(final[1] / final[0] - 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    from tinygrad2 import machine
    from tinygrad2.backend import get_backend

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=tuple(PRESETS), help="the model [%(default)s]")
    parser.add_argument("--steps", type=int, help="[300 for nano, 60 for gpt2]")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="[results/cpu-bfloat16-... next to this file]")
    given = parser.parse_args(arguments)
    if reason := get_backend("cpu").slow_reason("bfloat16"):
        raise ValueError(reason)
    steps, tokenizer, more = PRESETS[given.preset]
    steps = given.steps or steps
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pydoc"
        prepare = [sys.executable, str(ROOT / "data" / "prepare.py"), "pydoc", "--tokenizer", tokenizer]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*prepare, "--out", str(data)], check=True, capture_output=True, env=environment)
        rows = {dtype: train(Path(folder) / dtype, data, given.preset, steps, dtype, more) for dtype in DTYPES}
    found = differences(rows["float32"], rows["bfloat16"])
    losses = {
        dtype: {"training": [row["loss"] for row in log], "validation": [r["val_loss"] for r in log if "val_loss" in r]}
        for dtype, log in rows.items()
    }
    record = {
        "benchmark": "bfloat16",
        "date": datetime.date.today().isoformat(),
        "processor": machine.processor_model(),
        "python": platform.python_version(),
        "versions": versions("numpy", "numba", "onednn-cpu-gomp"),
        "preset": given.preset,
        "steps": steps,
        "differences": found,
        "losses": losses,
    }
    out = given.json or RESULTS / f"cpu-bfloat16-{given.preset}-{slug()}.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, difference in found.items():
        print(f"{name} loss: differs by {100 * difference:.2f} %; the limit is {100 * LIMITS[name]:g} %")
    print(f"written to {out}")
    return int(any(difference > LIMITS[name] for name, difference in found.items()))


if __name__ == "__main__":
    raise SystemExit(command(main))
