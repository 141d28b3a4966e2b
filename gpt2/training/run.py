"""The folder of a training run: checkpoints, a log with one line per step, samples, and a record of each start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TextIO, TypedDict

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.options import (
    DERIVED_OPTIONS,
    REMOVED_OPTIONS,
    Options,
    OptionValues,
    UsageError,
    validate_options,
)
from tinygrad2 import checkpoint, files, optim
from tinygrad2.checkpoint import JsonObject
from tinygrad2.distributed import Comm, SoloComm

ALONE = SoloComm()
LOG, SAMPLES, STARTS = "log.jsonl", "samples.jsonl", "starts.jsonl"  # one row per step, sample, and start
TRAINER, OPTIMIZER, LOCK = "trainer.json", "optimizer.safetensors", ".lock"


class Best(TypedDict):
    """The best evaluation of a run: its step and its validation loss."""

    step: int
    val_loss: float


@dataclass
class Progress:
    """How far a run has trained.

    step     number of completed steps.
    samples  number of sequences trained on: the position in the data order, for any batch size.
    tokens   number of tokens trained on.
    seconds  time spent in steps.
    best     the best evaluation so far, or None.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best | None = None


@dataclass
class RunOptions:
    """The options that a run keeps when it is resumed: those given to it, and the defaults of the others.

    notes  lines on what was chosen and why, for the start of the run.
    blas   see RunState; set by setup.choose_blas.
    """

    options: OptionValues
    defaults: OptionValues
    notes: list[str] = field(default_factory=list)
    blas: dict[str, str] | None = None


@dataclass
class RunState:
    """The state of a run in a checkpoint, without the arrays.

    options   given to the run.
    defaults  of the other options when it was started, which later versions must not change; None if unknown.
    data      the fingerprint of the training data.
    blas      the library that multiplied the matrices, its title and the processor; None if unknown.
    """

    folder: Path
    progress: Progress
    optimizer_steps: int
    options: OptionValues
    data: str
    defaults: OptionValues | None = None
    blas: dict[str, str] | None = None


class RunFolder:
    """`out/`: logs, and checkpoints ckpt-000100 and so on, of which the newest, the best and the last few are kept.

    Every rank of `comm` has a RunFolder and makes the same calls; only rank 0 writes.
    """

    def __init__(self, path: str | Path, keep: int = 2, comm: Comm = ALONE):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out-dir {self.path} is a file; name a folder")
        self.keep = keep
        self.comm = comm
        self._log: TextIO | None = None

    def resume(self, say: Callable[[str], None]) -> RunState | None:
        """The state in the newest intact checkpoint, or None if there is no checkpoint. Damaged ones are reported."""
        return self.comm.from_root(lambda: self.newest(say))

    def newest(self, say: Callable[[str], None]) -> RunState | None:
        """The same as `resume` without communication, for a rank that fails while the others continue."""
        folders = checkpoint.find(self.path)
        for folder in folders:
            try:
                checkpoint.verify(folder)
                return read_state(folder)
            except checkpoint.CheckpointError as error:
                say(f"skipping a damaged checkpoint: {error}")
        if folders:
            raise checkpoint.CheckpointError(
                f"{self.path}: no checkpoint is intact; --fresh starts a new run (the folder is renamed, not deleted)"
            )
        return None

    def last_checkpoint(self) -> str:
        """A sentence that names the newest checkpoint, for error messages."""
        saved = self.newest(lambda line: None)
        return f"The last checkpoint is {saved.folder}." if saved else "There is no checkpoint yet."

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Lock the folder for a run that continues after `step`, and open its log.

        Rows after `step` are removed from the logs, since these steps will be repeated. Later checkpoints are damaged;
        they are renamed, so that none of them counts as the newest.
        """
        if self.comm.rank:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with files.Lock(self.path / LOCK, str(self.path)):
            for folder in checkpoint.find(self.path):
                if checkpoint.step_of(folder) > step:
                    folder.rename(files.free_name(folder.with_name(f"damaged-{folder.name}")))
            for log in (self.path / LOG, self.path / SAMPLES, self.path / STARTS):
                kept = [row for row in read_log(log) if row["step"] <= step]
                with files.atomic_write(log) as partial:
                    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            with (self.path / LOG).open("a", encoding="utf-8") as self._log:
                yield

    def save(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        tokenizer: Tokenizer,
        progress: Progress,
        run_options: RunOptions,
        data: str,
    ) -> Path:
        """Write the checkpoint of the current step, point the link `best` to the best one, and delete old ones.

        data  the fingerprint of the training data.
        """
        folder = self.path / checkpoint.name(progress.step)
        moments = optimizer.state()
        if self.comm.rank:
            return folder
        with checkpoint.writing(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save(partial)
            checkpoint.save_arrays(partial / OPTIMIZER, moments)
            given, defaults = run_options.options, run_options.defaults
            state = RunState(folder, progress, optimizer.steps, given, data, defaults, run_options.blas)
            checkpoint.write_json(partial / TRAINER, {k: v for k, v in asdict(state).items() if k != "folder"})
        best = set() if progress.best is None else {checkpoint.name(progress.best["step"])}
        checkpoint.prune(self.path, self.keep, best)
        for name in best:
            self._point("best", name)
        return folder

    def _point(self, link: str, name: str) -> None:
        """Make out/best a symbolic link to a checkpoint, if the file system supports links."""
        if (self.path / name).is_dir():
            # (on Windows only administrators can create links; trainer.json also contains the best step)
            with suppress(OSError), files.atomic_write(self.path / link) as new:
                new.symlink_to(name, target_is_directory=True)

    def load_optimizer(self, state: RunState, optimizer: optim.Optimizer) -> None:
        """Load the optimizer's state from a checkpoint."""
        file = state.folder / OPTIMIZER
        arrays = checkpoint.load_arrays(file)
        try:
            optimizer.load_state(arrays, state.optimizer_steps)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{file}: {error}") from None

    def log(self, step: int, **row: object) -> None:
        """Append the row of a step to the log."""
        if self._log is None:
            return
        self._log.write(json.dumps({"step": step, **row}) + "\n")
        self._log.flush()

    def log_sample(self, step: int, text: str) -> None:
        """Append the text that was sampled after `step`."""
        self._append(SAMPLES, step=step, text=text)

    def log_start(self, step: int, **details: object) -> None:
        """Append a record of a start after `step`, for the report: options, model, data, machine."""
        self._append(STARTS, step=step, time=round(time.time()), **details)

    def _append(self, name: str, **row: object) -> None:
        if self.comm.rank == 0:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def set_aside(self) -> Path | None:
        """Rename the folder, if it exists, so that a new run can use its name; returns the new name."""
        return self.comm.from_root(self._set_aside)

    def _set_aside(self) -> Path | None:
        if not self.path.exists():
            return None
        files.Lock(self.path / LOCK, str(self.path)).check()
        if not self.path.name:
            raise ValueError(f"--out-dir {self.path} cannot be renamed; choose a folder inside it")
        dated = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return self.path.rename(files.free_name(dated))


def read_state(folder: Path) -> RunState:
    """Raises CheckpointError if trainer.json does not have the form that RunFolder.save writes."""
    values = checkpoint.read_json(folder / TRAINER)
    try:
        defaults = values["defaults"] if "defaults" in values else _first_defaults(folder.parent)
        for removed in REMOVED_OPTIONS:
            values["options"].pop(removed, None)
            (defaults or {}).pop(removed, None)
        progress = Progress(**values["progress"])
        given, blas = values["options"], values.get("blas")
        state = RunState(folder, progress, values["optimizer_steps"], given, values["data"], defaults, blas)
        counts = (progress.step, progress.samples, progress.tokens, state.optimizer_steps)
        if not all(isinstance(count, int) for count in counts):
            raise TypeError
        if not isinstance(state.options, dict) or not isinstance(state.defaults, dict | None):
            raise TypeError
        if blas is not None and not all(isinstance(blas[key], str) for key in ("name", "title", "processor")):
            raise TypeError
        if progress.best is not None:
            progress.best["step"] + 0, progress.best["val_loss"] + 0
        validate_options(state.options)
        validate_options(state.defaults or {})
        return state
    except (AttributeError, KeyError, TypeError, ValueError):
        raise checkpoint.CheckpointError(f"{folder / TRAINER}: not a valid file of train.py") from None


def _first_defaults(out: Path) -> OptionValues | None:
    """The options with which a run was started, from starts.jsonl: checkpoints of earlier versions have no defaults."""
    starts = read_log(out / STARTS)
    options = starts[0].get("options") if starts else None
    if not isinstance(options, dict):
        return None
    known = {f.name for f in fields(Options)} - set(DERIVED_OPTIONS)
    return {name: value for name, value in options.items() if name in known and value is not None}


def read_log(path: Path) -> list[JsonObject]:
    """The rows of a log, samples or starts. Invalid lines, such as one truncated by a crash, are skipped."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
