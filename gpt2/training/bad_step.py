"""A training step that was skipped, since its loss or its gradient was not finite: what it is stored as, and what went
wrong in it when it is run again with checks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from tinygrad2 import Key, checkpoint
from tinygrad2.array import Array
from tinygrad2.checkpoint import CheckpointError, JsonObject
from tinygrad2.files import write_error
from tinygrad2.not_finite import LARGE, Checker, Place, largest

STEP, BATCH = "step.json", "batch.safetensors"
PATTERN = "bad-step-*"
GROWN = 1e3  # an absolute value that weights which train well do not reach
CHECKPOINTS = 4  # the bytes of a checkpoint with two moments and of a bad step, in those of the weights


@dataclass(frozen=True)
class Batch:
    """The tokens and targets (B, T) of one micro-step of one rank, and the key of its dropout masks."""

    key: Key
    tokens: Array
    targets: Array


@dataclass
class BadStep:
    """A skipped step.

    step             its number, from 1.
    loss, grad_norm  what it computed; None where that is not finite.
    lr               its learning rate.
    options          all options of the run.
    batches          of all its micro-steps and ranks, in the order of the global batch.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    options: JsonObject
    batches: list[Batch]

    def write(self, out: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path | None:
        """Write it and the model into a folder of `out`, completely or not at all.

        Returns the folder, or None where there is such a folder already. Raises OSError if there is no space for it and
        for one more checkpoint.
        """
        if any(out.glob(PATTERN)):
            return None
        folder = out / f"bad-step-{self.step}"
        need = CHECKPOINTS * sum(p.data.nbytes for _, p in model.named_parameters())
        if shutil.disk_usage(out).free < need or write_error(out):
            raise OSError(f"{folder}: not written: less than {need / 1e9:.2f} GB of the disk are free")
        with checkpoint.writing(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save(partial)
            keys = [(batch.key.step, batch.key.first_sample) for batch in self.batches]
            arrays = {name: np.stack([getattr(b, name) for b in self.batches]) for name in ("tokens", "targets")}
            checkpoint.save_arrays(partial / BATCH, {**arrays, "keys": np.array(keys, dtype=np.int64)})
            values = {name: value for name, value in vars(self).items() if name != "batches"}
            checkpoint.write_json(partial / STEP, checkpoint.finite_json(values))
        return folder


def read(folder: Path) -> BadStep:
    """What BadStep.write wrote. Raises CheckpointError naming the file that is damaged."""
    if not (folder / STEP).is_file():
        raise CheckpointError(f"{folder}: not a skipped step; expected the folder bad-step-N of a run, with {STEP}")
    checkpoint.verify(folder)
    values, arrays = checkpoint.read_json(folder / STEP), checkpoint.load_arrays(folder / BATCH)
    try:
        rows = zip(arrays["keys"].tolist(), arrays["tokens"], arrays["targets"], strict=True)
        seed = values["options"]["seed"]
        batches = [
            Batch(Key(seed, step, first_sample), tokens, targets) for (step, first_sample), tokens, targets in rows
        ]
        return BadStep(**values, batches=batches)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a skipped step that train.py wrote ({error})") from None


def explain(model: LanguageModel, batches: Iterable[Batch], count: int, lr: float) -> tuple[bool, list[str]]:
    """Run a step's batches again with every value checked: whether a value was not finite, and lines for the user.

    count  the number of batches that the mean loss of the step is over.
    The gradients are added to those of the model.
    """
    checker = Checker(model)
    for batch in batches:

        def forward_and_backward(batch: Batch = batch) -> None:
            (model.loss(batch.tokens, batch.targets, batch.key) * (1 / count)).backward()

        if not checker.run(forward_and_backward):
            break
    return checker.first is not None, list(_lines(checker, model, lr))


def _lines(checker: Checker, model: LanguageModel, lr: float) -> Iterator[str]:
    first, large = checker.first, checker.large
    if first is not None:
        yield f"the first value that is not finite: {first}"
    if large is not None:
        before = "before it, " if first is not None else "every value is finite, but "
        yield f"{before}the first value above {LARGE:.1e}, whose square overflows in float32: {large}"
    origin = checker.origin
    if origin is None:
        yield (
            f"every value is finite when the step is run again in {model.precision.name} on {model.backend.device}: "
            f"the cause is another precision or device, code that has changed, or a fault of the hardware"
        )
    else:
        yield f"this suggests {_cause(origin, model, lr)}"


def _cause(origin: Place, model: LanguageModel, lr: float) -> str:
    """What the first bad value suggests, and what to do."""
    sizes = {name: largest(p.data) for name, p in model.named_parameters()}
    widest = max(sizes, key=lambda name: sizes[name] if math.isfinite(sizes[name]) else math.inf)
    lower = f"too high a --learning-rate (it was {lr:.2e})"
    if origin.parameter and not (origin.finite and origin.fraction > 0.5):
        return "damaged weights: use an intact checkpoint, or convert the model again"
    if sizes[widest] > GROWN or origin.parameter:
        return f"weights that have grown too large, up to {sizes[widest]:.2g} in {widest}: {lower}"
    if model.precision.name == "bfloat16":
        return f"an overflow of bfloat16 if gpt2.replay --dtype float32 finds no such value, else {lower}"
    function = f"the {'backward function' if origin.phase == 'backward' else 'computation'} of {origin.operation}"
    if math.isnan(origin.value):
        return f"an error in {function}, or an overflow inside it if gpt2.replay --dtype float64 finds no such value"
    return f"an overflow if gpt2.replay --dtype float64 finds no such value, with {lower}; else an error in {function}"
