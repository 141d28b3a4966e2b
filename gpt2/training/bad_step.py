"""Training steps that were skipped because their loss or gradient was not finite: saves such a step, and repeats it
with checks to find the cause."""

from __future__ import annotations

import math
import reprlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.options import Options
from gpt2.training.run import Progress, RunFolder
from tinygrad2 import Key, checkpoint
from tinygrad2.array import Array
from tinygrad2.backend import Backend, PendingScalars, Timestamp
from tinygrad2.checkpoint import CheckpointError, JsonObject
from tinygrad2.distributed import Comm
from tinygrad2.files import write_error
from tinygrad2.not_finite import LARGE, Checker, Place, largest

Span = tuple[Timestamp, Timestamp]

MESSAGE = 4096  # length in bytes of the message that each rank sends to the others
STEP, BATCH = "step.json", "batch.safetensors"
PATTERN = "bad-step-*"
GROWN = 1e3  # weights with a larger absolute value have grown too large
CHECKPOINTS = 4  # disk space for a checkpoint (weights, two moments) and a bad step, in units of the weights' size


@dataclass(frozen=True)
class Batch:
    """The tokens and targets (B, T) of one micro-step of one rank, and the key of its dropout masks."""

    key: Key
    tokens: Array
    targets: Array


class Training(Protocol):
    """The part of a Trainer that this module uses."""

    model: LanguageModel
    options: Options
    tokenizer: Tokenizer
    folder: RunFolder
    comm: Comm
    progress: Progress
    explanation: list[str]

    def batch(self, step: int, samples: int, position: int) -> Batch: ...


@dataclass
class BadStep:
    """A skipped step.

    step             the number of the step, from 1.
    loss, grad_norm  the loss and the gradient norm; None if not finite.
    lr               the learning rate.
    options          all options of the run.
    batches          the batches of all micro-steps and ranks, in the order of the global batch.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    options: JsonObject
    batches: list[Batch]

    def write(self, out: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path | None:
        """Write the step and the model to a folder in `out`, completely or not at all.

        Returns the folder, or None if `out` already contains a bad step. Raises OSError if there is not enough disk
        space for the folder and one more checkpoint.
        """
        if any(out.glob(PATTERN)):
            return None
        folder = out / f"bad-step-{self.step}"
        need = CHECKPOINTS * sum(p.data.nbytes for _, p in model.named_parameters())
        if shutil.disk_usage(out).free < need or write_error(out):
            raise OSError(f"{folder}: not written, because less than {need / 1e9:.2f} GB of disk space is free")
        with checkpoint.writing(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save(partial)
            keys = [(batch.key.step, batch.key.first_sample) for batch in self.batches]
            arrays = {name: np.stack([getattr(b, name) for b in self.batches]) for name in ("tokens", "targets")}
            checkpoint.save_arrays(partial / BATCH, {**arrays, "keys": np.array(keys, dtype=np.int64)})
            values = {name: value for name, value in vars(self).items() if name != "batches"}
            checkpoint.write_json(partial / STEP, values)
        return folder


def read(folder: Path) -> BadStep:
    """Read a folder that BadStep.write wrote. Raises CheckpointError, which names the damaged file."""
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
        found = BadStep(**values, batches=batches)
        for name, kinds in (("step", int), ("loss", float | None), ("grad_norm", float | None), ("lr", float)):
            if not isinstance(values[name], kinds):
                raise TypeError(f"{name} is {reprlib.repr(values[name])}")
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a skipped step that train.py wrote ({str(error)[:200]})") from None


def explain(model: LanguageModel, batches: Iterable[Batch], count: int, lr: float) -> tuple[bool, list[str]]:
    """Repeat a step's batches and check every value. Returns whether a value was not finite, and the lines to print.

    count  the number of batches in the step, over which the loss is averaged.
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
            f"every value is finite when the step is repeated in {model.precision.name} on {model.backend.device}: "
            f"the cause is a different precision or device, changed code, or a hardware fault"
        )
    else:
        yield f"this suggests {_cause(origin, model, lr)}"


def _cause(origin: Place, model: LanguageModel, lr: float) -> str:
    """The cause that the first bad value suggests, and what to do about it."""
    sizes = {name: largest(p.data) for name, p in model.named_parameters()}
    widest = max(sizes, key=lambda name: sizes[name] if math.isfinite(sizes[name]) else math.inf)
    lower = f"too high a --learning-rate (it was {lr:.2e})"
    if origin.parameter and not (origin.finite and origin.fraction > 0.5):
        return "damaged weights: use an intact checkpoint, or convert the model again"
    if sizes[widest] > GROWN or origin.parameter:
        return f"weights that have grown too large, up to {sizes[widest]:.2g} in {widest}: {lower}"
    if model.precision.name == "bfloat16":
        return f"an overflow of bfloat16 if gpt2.replay --dtype float32 finds no such value, otherwise {lower}"
    function = f"the {'backward function' if origin.phase == 'backward' else 'computation'} of {origin.operation}"
    if math.isnan(origin.value):
        return f"an error in {function}, or an overflow inside it if gpt2.replay --dtype float64 finds no such value"
    return (
        f"an overflow if gpt2.replay --dtype float64 finds no such value, with {lower}; otherwise an error in "
        f"{function}"
    )


def explain_step(trainer: Training, launched: LaunchedStep) -> list[str]:
    """Write a skipped step to the out-dir, unless it already contains one, and repeat the step with checks."""
    options, comm = trainer.options, trainer.comm
    count = options.micro_steps(comm.size) * comm.size
    backend, regions = trainer.model.backend, trainer.model.arena().regions

    def batches(positions: range) -> Iterator[Batch]:
        return (trainer.batch(launched.step - 1, launched.samples, position) for position in positions)

    def write() -> list[str]:
        loss, norm = launched.numbers or (math.nan, math.nan)
        step = BadStep(launched.step, loss, norm, launched.lr, asdict(options), list(batches(range(count))))
        try:
            folder = step.write(trainer.folder.path, trainer.model, trainer.tokenizer)
        except OSError as error:
            return [str(error)]
        return [f"to repeat the step with checks: python -m gpt2.replay {folder}"] if folder else []

    found = False
    lines: list[str]
    try:
        # On a GPU, the gradients already belong to the next step.
        grads = [backend.to_host(region.grads).copy() for region in regions]
        try:
            found, lines = explain(trainer.model, batches(range(comm.rank, count, comm.size)), count, launched.lr)
        finally:
            for region, values in zip(regions, grads, strict=True):
                region.grads[...] = backend.asarray(values)
    except MemoryError:
        lines = ["out of memory when repeating the step with checks"]
    text = "\n".join(lines).encode()[: MESSAGE - 1]
    packed = np.frombuffer(bytes([found]) + text.ljust(MESSAGE - 1), np.uint8)
    reports = [row.tobytes() for row in comm.all_gather(packed)]
    report = next((report for report in reports if report[0]), reports[0])  # from the first rank that found the value
    return report[1:].decode(errors="ignore").strip().splitlines() + comm.from_root(write)


def too_many(trainer: Training, launched: LaunchedStep) -> str:
    """The error message after too many consecutive skipped steps."""
    loss, norm = launched.numbers or (math.nan, math.nan)
    count, limit, finding = trainer.progress.bad_steps, trainer.options.max_bad_steps, "; ".join(trainer.explanation)
    return (
        f"step {launched.step}: the loss is {loss} and the gradient norm {norm}; the step was skipped, and the "
        f"weights are unchanged. This is skipped step {count} in a row, and --max-bad-steps is {limit}. "
        f"{trainer.folder.last_checkpoint()} The first skipped step: {finding}"
    )


@dataclass
class LaunchedStep:
    """A step whose loss and gradient norm may not have arrived from the device yet.

    samples  the number of sequences trained on before the step.
    spans    spans of device time whose sum is the duration of the step: from the end of the previous step to its end.
    waited   the number of seconds that the step waited for other ranks.
    update   the span of the optimizer's update.
    numbers  the loss and the gradient norm, or None until they have arrived.
    """

    step: int
    samples: int
    lr: float
    step_tokens: int
    tokens: int
    result: PendingScalars
    spans: list[Span]
    waited: float
    update: Span
    numbers: tuple[float, ...] | None = None

    def row(self, backend: Backend, profiled: bool) -> JsonObject:
        """The row of the step in log.jsonl, which includes the time of the optimizer if the run is profiled."""
        assert self.numbers is not None
        seconds = sum(backend.seconds(*span) for span in self.spans)
        loss, norm = self.numbers
        return {
            "step": self.step,
            "loss": loss,
            "lr": self.lr,
            "grad_norm": norm,
            "seconds": round(seconds, 6),
            "comm_seconds": round(self.waited, 6),
            "tokens_per_s": round(self.step_tokens / seconds, 1),
            "tokens": self.tokens,
            **({} if math.isfinite(loss) and math.isfinite(norm) else {"skipped": True}),
            **({"optimizer_seconds": round(backend.seconds(*self.update), 6)} if profiled else {}),
        }
