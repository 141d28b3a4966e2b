"""How fast does train.py reach a loss? python tests/benchmarks/recipe.py [--seeds N ...] [--target LOSS] [--json FILE]

For each seed, trains nano on the documentation that ships with Python, first with AdamW and a cosine schedule (the
defaults of earlier versions), then with the current defaults. Prints for each run the number of steps, the time of the
steps (without evaluations and checkpoints), the first evaluation at or below the target, and the final validation loss.
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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import RESULTS, SETTINGS, command, new_file, slug, spread, versions

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "AdamW, cosine", "default"
RECIPES: dict[str, list[str]] = {OLD: ["--optimizer", "adamw"], NEW: []}  # options of train.py
TARGET = 1.555  # nats per byte: the loss that AdamW reaches in its 3,000 steps
EVALUATIONS = ["--eval-interval", "50", "--save-interval", "0"]


def train(out: Path, options: Iterable[str]) -> list[dict[str, Any]]:
    """Run train.py and return the rows of its log."""
    words = [sys.executable, str(ROOT / "train.py"), "--out-dir", str(out), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"train.py failed: {done.stderr.strip()}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """The steps and seconds of a run, those up to the first evaluation at or below the target (None if there is none),
    the final validation loss, and the validation losses by step."""
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    reached = next((step for step, loss in losses.items() if loss <= target), None)
    return {
        "steps": rows[-1]["step"],
        "seconds": sum(row["seconds"] for row in rows),
        "steps_to_target": reached,
        "seconds_to_target": None if reached is None else sum(r["seconds"] for r in rows if r["step"] <= reached),
        "final_loss": losses[rows[-1]["step"]],
        "losses": losses,
    }


def measure(seeds: Iterable[int], target: float, options: Sequence[str]) -> list[dict[str, Any]]:
    """Do all runs and return their summaries. `options` are passed to train.py in every run."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for name, own in RECIPES.items():
                out = Path(folder) / f"{len(runs)}"
                rows = train(out, [*own, *EVALUATIONS, "--seed", str(seed), *options])
                runs.append({"recipe": name, "seed": seed, **summary(rows, target)})
                print(line(runs[-1]), flush=True)
    return runs


def heading(target: float) -> str:
    return f"{'recipe':<15}{'seed':>6}{'steps':>8}{'seconds':>9}{f'to {target:g}: steps':>18}{'seconds':>9}{'final':>9}"


def line(run: dict[str, Any]) -> str:
    """The table row of a run."""
    steps, seconds = run["steps_to_target"], run["seconds_to_target"]
    reached = f"{'never':>18}{'':>9}" if steps is None else f"{steps:>18,}{seconds:>9.1f}"
    return (
        f"{run['recipe']:<15}{run['seed']:>6}{run['steps']:>8,}{run['seconds']:>9.1f}{reached}{run['final_loss']:>9.4f}"
    )


def ratios(runs: list[dict[str, Any]]) -> list[float | None]:
    """For each seed, the seconds to the target with the default recipe divided by those with the old recipe (by all
    seconds of the old run if it does not reach the target). None if the default recipe does not reach the target."""
    old, new = ([run for run in runs if run["recipe"] == name] for name in (OLD, NEW))
    return [
        None if b["seconds_to_target"] is None else b["seconds_to_target"] / (a["seconds_to_target"] or a["seconds"])
        for a, b in zip(old, new, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    from gpt2.console import Parser
    from tinygrad2 import machine, threads

    parser = Parser("python tests/benchmarks/recipe.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], metavar="N", help="[1337 1 2]")
    parser.add_argument("--target", type=float, default=TARGET, metavar="LOSS", help="validation loss [%(default)s]")
    parser.add_argument("--data", default="pydoc", metavar="NAME", help="the data set [%(default)s]")
    parser.add_argument("--max-iters", type=int, metavar="STEPS", help="[the default of each recipe]")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="[results/cpu-recipe-... next to this file]")
    given = parser.parse_args(arguments)
    removed = {name: os.environ.pop(name) for name in SETTINGS if os.environ.get(name)}
    load = os.getloadavg()[0]
    print(f"{machine.processor_model()}, {threads.count()} threads, load average before {load:.2f}")
    print(heading(given.target), flush=True)
    steps = [] if given.max_iters is None else ["--max-iters", str(given.max_iters)]
    runs = measure(given.seeds, given.target, ["--data", given.data, *steps])
    found = ratios(runs)
    reached = [ratio for ratio in found if ratio is not None]
    if reached:
        text = "{median:.2f} (from {min:.2f} to {max:.2f})".format(**spread(reached))
        print(f"seconds to {given.target:g}, {NEW} / {OLD}: {text}")
    record = {
        "benchmark": "recipe",
        "date": datetime.date.today().isoformat(),
        "processor": machine.processor_model(),
        "threads": threads.count(),
        "python": platform.python_version(),
        "versions": versions("numpy", "numba", "mkl"),
        "removed_settings": removed,
        "load_average": load,
        "target": given.target,
        "recipes": RECIPES,
        "ratios": found,
        "runs": runs,
    }
    out = given.json or RESULTS / f"cpu-recipe-{slug()}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return int(len(reached) < len(found))


if __name__ == "__main__":
    raise SystemExit(command(main))
