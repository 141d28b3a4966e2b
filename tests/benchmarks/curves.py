"""Training curves of this project and of PyTorch: python tests/benchmarks/curves.py [--preset gpt2] [--steps N]

Trains three times from the same initial weights, on the same batches in the same order, with the same AdamW settings,
learning rates and clipping, in float32 on the CPU. The data is the documentation that ships with Python. A run has
3,000 steps of nano (bytes), or 60 steps of gpt2 (124M parameters, GPT-2's vocabulary, one sequence of 1,024 tokens per
step).

    tinygrad2      train.py
    PyTorch        transformers' GPT-2 and torch.optim.AdamW
    PyTorch, SDPA  the same with another implementation of attention, which sums in a different order. Its distance from
                   the second run shows how far rounding alone moves the curve.

Prints the distances between the curves and writes a JSON file to results/; `python docs/pictures.py` plots them. The
exit status is 1 if this project's final validation loss differs from PyTorch's by more than 1%.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import RESULTS, command, new_file, positive, slug, versions

ROOT = Path(__file__).resolve().parents[2]

OURS, PYTORCH, OTHER = "tinygrad2", "PyTorch", "PyTorch, SDPA"
LIMIT = 0.01  # relative difference of the final validation losses
CLIP, DECAY, BETAS, SEED = 1.0, 0.1, (0.9, 0.95), 1337


@dataclass(frozen=True)
class Setup:
    """The data and hyperparameters that a preset is trained with."""

    steps: int
    tokenizer: str
    batch_size: int
    block_size: int
    learning_rate: float
    min_lr: float
    warmup_iters: int
    eval_iters: int

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay to `min_lr`; `step` counts from 0."""
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / self.warmup_iters
        progress = (step - self.warmup_iters) / (self.steps - self.warmup_iters)
        return self.min_lr + (self.learning_rate - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2


PRESETS = {
    "nano": Setup(3000, "bytes", 8, 64, 3e-3, 3e-4, 100, 100),
    "gpt2": Setup(60, "gpt2", 1, 1024, 6e-4, 6e-5, 6, 20),
}


@dataclass
class Curve:
    """The training loss before each step's update, and the validation loss at the end."""

    training: list[float]
    validation: float


def prepare(folder: Path, tokenizer: str) -> None:
    """Prepare the data set in `folder`."""
    options = ["pydoc", "--tokenizer", tokenizer, "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "data" / "prepare.py")
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True, env=environment)


def train_ours(out: Path, data: Path, preset: str, setup: Setup, threads: int) -> Curve:
    """Train with train.py, setting every option that affects the result."""
    numbers = {name: value for name, value in asdict(setup).items() if name not in ("steps", "tokenizer")}
    options: dict[str, Any] = {
        "preset": preset, "data": data, "out_dir": out, "device": "cpu", "dtype": "float32", "max_iters": setup.steps,
        **numbers, "lr_schedule": "cosine",
        "optimizer": "adamw", "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1],
        "grad_clip": CLIP, "dropout": 0, "seed": SEED, "eval_interval": 0, "save_interval": 0, "threads": threads,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"train.py failed: {done.stderr.strip()}")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Curve([row["loss"] for row in rows], rows[-1]["val_loss"])


def save_initial_weights(folder: Path, preset: str, vocab_size: int) -> None:
    """Save the model that train.py starts from, in the format of transformers."""
    from gpt2 import GPT2
    from gpt2.config import PRESETS

    config = replace(PRESETS[preset], vocab_size=vocab_size, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    GPT2(config, seed=SEED).save_pretrained(folder)


def train_torch(weights: Path, data: Path, setup: Setup, threads: int, attention: str) -> Curve:
    """Train transformers' GPT-2 with PyTorch. This project's code only reads the batches from the data set.

    attention  the implementation of attention that transformers uses: "eager" or "sdpa".
    """
    import torch
    import transformers
    from tqdm import tqdm

    from gpt2.training.dataset import SampleOrder, TokenDataset

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(str(weights), attn_implementation=attention)
    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    B, T = setup.batch_size, setup.block_size

    def loss_of(split: TokenDataset, windows: Sequence[int] | np.ndarray) -> Any:
        tokens, targets = map(torch.from_numpy, split.batch(windows, T))
        logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    train, validation = TokenDataset.open(data, "train"), TokenDataset.open(data, "val")
    order, losses = SampleOrder(train.windows(T), SEED), []
    for step in tqdm(range(setup.steps), f"PyTorch, {attention}", leave=False, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate_at(step)
        loss = loss_of(train, order.indices(step * B, B))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        windows = range(min(validation.windows(T), setup.eval_iters * B))
        batches = [windows[first : first + B] for first in range(0, len(windows), B)]
        total = sum(loss_of(validation, batch).item() * len(batch) for batch in batches)
    return Curve(losses, total / len(windows))


def distances(a: Curve, b: Curve) -> dict[str, float]:
    """The distances of `a` from `b`, in nats per token and relative to `b`."""
    first, second = np.array(a.training), np.array(b.training)
    difference = np.abs(first - second)
    return {
        "validation": a.validation - b.validation,
        "validation, relative": a.validation / b.validation - 1,
        "first step": float(difference[0]),
        "last step": float(difference[-1]),
        "largest": float(difference.max()),
        "largest, at step": int(difference.argmax()) + 1,
        "largest, relative": float((difference / second).max()),
        "mean": float(difference.mean()),
    }


def measure(folder: Path, preset: str, setup: Setup, threads: int, names: Sequence[str]) -> dict[str, Any]:
    """Do the runs with these names in `folder`, reusing curves that exist. Returns the record for the JSON file."""
    from gpt2.training.dataset import TokenDataset
    from tinygrad2 import machine

    data, weights = folder / "data", folder / "weights"
    if not weights.exists():
        prepare(data, setup.tokenizer)
        save_initial_weights(weights, preset, TokenDataset.open(data, "train").vocab_size)
    runs: dict[str, Callable[[], Curve]] = {
        PYTORCH: lambda: train_torch(weights, data, setup, threads, "eager"),
        OURS: lambda: train_ours(folder / "out", data, preset, setup, threads),
        OTHER: lambda: train_torch(weights, data, setup, threads, "sdpa"),
    }
    curves = {}
    for name in names:
        file = folder / f"{name}-{setup.steps}.json"
        if not file.exists():
            file.write_text(json.dumps(asdict(runs[name]())), encoding="utf-8")
        curves[name] = Curve(**json.loads(file.read_text(encoding="utf-8")))
    return {
        "benchmark": f"curves-{preset}",
        "date": datetime.date.today().isoformat(),
        "processor": machine.processor_model(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions("numpy", "numba", "mkl", "torch", "transformers"),
        "preset": preset,
        **asdict(setup),
        "distances": {name: distances(curves[name], curves[PYTORCH]) for name in names if name != PYTORCH},
        "curves": {name: asdict(curve) for name, curve in curves.items()},
    }


def table(record: dict[str, Any]) -> list[str]:
    """The lines to print."""
    curves = record["curves"]
    lines = [
        f"{record['preset']}, {record['steps']:,} steps, {record['processor']}, {record['date']}",
        f"{'':<16}{'validation':>12}{'difference':>11}{'relative':>11}{'step 1':>11}{'last step':>11}{'largest':>11}",
    ]
    for name, curve in curves.items():
        line = f"{name:<16}{curve['validation']:>12.6f}"
        if found := record["distances"].get(name):
            line += f"{found['validation']:>+11.1e}{found['validation, relative']:>+11.1e}{found['first step']:>11.1e}"
            line += f"{found['last step']:>11.1e}{found['largest']:>11.1e} at step {found['largest, at step']:,}"
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    from tinygrad2 import threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=tuple(PRESETS), help="the model [%(default)s]")
    parser.add_argument("--steps", type=positive, help="[3,000 for nano, 60 for gpt2]")
    parser.add_argument("--threads", type=positive, default=threads.count(), metavar="N", help="[%(default)s]")
    parser.add_argument("--no-sdpa", action="store_true", help="skip the third run")
    parser.add_argument(
        "--folder", type=Path, help="store the data, weights and curves here, and reuse them [a temporary folder]"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="[results/cpu-curves-... next to this file]")
    given = parser.parse_args(arguments)
    setup = PRESETS[given.preset]
    steps = given.steps or setup.steps
    setup = replace(setup, steps=steps, warmup_iters=min(setup.warmup_iters, steps // 10))
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as folder:
        names = (PYTORCH, OURS) if given.no_sdpa else (PYTORCH, OURS, OTHER)
        record = measure(Path(folder), given.preset, setup, given.threads, names)
    out = given.json or RESULTS / f"cpu-curves-{given.preset}-{slug()}.json"
    out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(*table(record), f"written to {out}", sep="\n", flush=True)
    return int(not abs(record["distances"][OURS]["validation, relative"]) <= LIMIT)


if __name__ == "__main__":
    raise SystemExit(command(main))
