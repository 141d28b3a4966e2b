"""Check that training in this tree is bit-identical to another commit: `python tests/benchmarks/same_bits.py
[--commit REVISION]`

Both commits train `nano` for 40 steps with dropout on the same data: in float32, in float64, with --recompute block, on
2 ranks, and on 2 ranks with --zero. The script compares the step, loss, lr, grad_norm and tokens of every row of
log.jsonl, and every parameter and moment of the last checkpoint. Then this tree resumes the other commit's run at its
step 20. With --zero-tolerance 1e-5, losses of the runs with --zero may differ by that relative amount, and gradient
norms by a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
FIELDS = ("step", "loss", "lr", "grad_norm", "tokens")
OPTIONS = ["--dropout", "0.1", "--max-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--eval-iters", "2",
           "--save-interval", "20", "--log-interval", "20", "--keep", "9", "--device", "cpu",
           "--warmup-iters", "20"]  # fmt: skip
TWO_RANKS = ["--batch-size", "8", "--total-batch-size", "1024"]  # (earlier versions had other defaults)
CASES: dict[str, tuple[int, list[str]]] = {  # ranks and options
    "float32": (1, []),
    "float64": (1, ["--dtype", "float64"]),
    "recompute block": (1, ["--recompute", "block"]),
    "2 ranks": (2, TWO_RANKS),
    "2 ranks, --zero": (2, ["--zero", *TWO_RANKS]),
}


def train(tree: Path, out: Path, ranks: int, options: list[str]) -> None:
    """Run train.py of a tree; exits if it fails."""
    command = [sys.executable, "train.py", "--out-dir", str(out), *OPTIONS, *options]
    if ranks > 1:
        mpirun = str(Path(sys.executable).with_name("mpirun"))
        command = [mpirun, "-n", str(ranks), "--oversubscribe", *command]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env = {**os.environ, **allowed, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def adamw(tree: Path) -> list[str]:
    """The options that select AdamW. Earlier versions use it by default, and some do not have --optimizer."""
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=tree, env=env, capture_output=True, text=True)
    return ["--optimizer", "adamw"] if "--optimizer" in done.stdout else []


def results(out: Path) -> dict[str, Any]:
    """The rows of the log, and every array of the last checkpoint."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    folder = out / f"ckpt-{STEPS:06d}"
    arrays = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
    return {"rows": [[row[field] for field in FIELDS] for row in rows], "arrays": arrays}


def difference(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> str:
    """The first difference between two runs, or ""."""
    if len(a["rows"]) != len(b["rows"]):
        return f"{len(a['rows'])} and {len(b['rows'])} rows"
    for x, y in zip(a["rows"], b["rows"], strict=True):
        for field, p, q in zip(FIELDS, x, y, strict=True):
            allowed = tolerance * abs(p) * {"loss": 1, "grad_norm": 0.1}.get(field, 0)
            if abs(p - q) > allowed:
                return f"{field} of step {x[0]}: {p!r} and {q!r}"
    if a["arrays"].keys() != b["arrays"].keys():
        return f"arrays in only one run: {sorted(a['arrays'].keys() ^ b['arrays'].keys())[:3]}"
    for name, values in a["arrays"].items():
        if not tolerance and values.tobytes() != b["arrays"][name].tobytes():
            return f"{name}: differs by up to {np.abs(values - b['arrays'][name]).max():.1e}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD", help="the commit to compare with [%(default)s]")
    parser.add_argument("--only", choices=[*CASES, "resume"], nargs="*", help="only these cases")
    parser.add_argument("--zero-tolerance", type=float, default=0.0, help="see above [%(default)s]")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        other = work / "other"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(other)], check=True)
        subprocess.run(["git", "checkout", "-q", options.commit], cwd=other, check=True)
        prepare = [sys.executable, "data/prepare.py", "pydoc", "--tokenizer", "bytes", "--out", str(work / "pydoc")]
        env = {**os.environ, "PYTHONPATH": str(other)}
        subprocess.run(prepare, cwd=other, env=env, check=True, capture_output=True)
        data = ["--data", str(work / "pydoc")]
        for case, (ranks, more) in CASES.items():
            if options.only and case not in options.only:
                continue
            found = []
            for tree in (other, ROOT):
                out = work / f"out-{len(found)}"
                shutil.rmtree(out, ignore_errors=True)
                train(tree, out, ranks, [*data, *more, *adamw(tree)])
                found.append(results(out))
            said = difference(*found, tolerance=options.zero_tolerance if "--zero" in more else 0.0)
            failed += bool(said)
            print(f"{case:20} {said or 'the same bits'}", flush=True)
        if not options.only or "resume" in options.only:
            whole, resumed = work / "whole", work / "resumed"
            train(other, whole, 1, [*data, *adamw(other)])
            shutil.copytree(whole, resumed, symlinks=True)
            shutil.rmtree(resumed / f"ckpt-{STEPS:06d}")
            train(ROOT, resumed, 1, data)
            said = difference(results(whole), results(resumed), 0.0)
            failed += bool(said)
            print(f"{'resume at step 20':20} {said or 'the same bits'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
