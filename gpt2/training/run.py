"""The folder of a training run: checkpoints, a log with one line per step, samples, and a record of each start."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TextIO, TypedDict

from gpt2 import console
from gpt2.formats.model_file import BEST, TRAINER
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
OPTIMIZER, LOCK = "optimizer.safetensors", ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors for which a retry does not help


class Best(TypedDict):
    """The best evaluation of a run: its step and its validation loss."""

    step: int
    val_loss: float


@dataclass
class Progress:
    """The progress of a run.

    step       number of completed steps.
    samples    number of sequences trained on, which is the position in the data order, for any batch size.
    tokens     number of tokens trained on.
    seconds    time spent in steps.
    best       the best evaluation so far, or None.
    bad_steps  number of consecutive skipped steps, up to the last step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best | None = None
    bad_steps: int = 0

    @property
    def best_step(self) -> int:
        """The step of the best evaluation, or the current step if there is none."""
        return self.best["step"] if self.best else self.step


@dataclass
class RunOptions:
    """The options that a run keeps when it is resumed.

    options   the given options.
    defaults  the defaults of the other options.
    notes     lines that explain the chosen values, printed at the start of the run.
    blas      see RunState; set by setup.choose_blas.
    """

    options: OptionValues
    defaults: OptionValues
    notes: list[str] = field(default_factory=list)
    blas: dict[str, str] | None = None

    @property
    def keep(self) -> int:
        """The number of checkpoints to keep."""
        return int({**self.defaults, **self.options}.get("keep", Options.keep))


@dataclass
class RunState:
    """The state of a run in a checkpoint, without the arrays.

    options   the options given to the run.
    defaults  the defaults of the other options when the run was started, which later versions do not change; None if
              unknown.
    data      the fingerprint of the training data.
    blas      the name and title of the BLAS library, and the processor; None if unknown.
    unknown   fields that another version wrote, at the top level (under "") and in `progress`. They are written back
              unchanged. Unknown options and defaults remain in `options` and `defaults`.
    """

    folder: Path
    progress: Progress
    optimizer_steps: int
    options: OptionValues
    data: str
    defaults: OptionValues | None = None
    blas: dict[str, str] | None = None
    unknown: dict[str, JsonObject] = field(default_factory=dict)

    def as_json(self) -> JsonObject:
        """The contents of trainer.json."""
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "unknown")}
        progress = {**values["progress"], **self.unknown.get("progress", {})}
        return {**values, **self.unknown.get("", {}), "progress": progress}

    def unknown_names(self) -> list[str]:
        """The names of all fields that are unknown to this version."""
        known = {f.name for f in fields(Options)}
        options = {"options": self.options, "defaults": self.defaults or {}}
        names = [f"{part}.{name}" for part, values in options.items() for name in values if name not in known]
        return names + [f"{part}.{name}".lstrip(".") for part, values in self.unknown.items() for name in values]


class RunFolder:
    """The folder of a run, `out/`. It contains the logs and the checkpoints, ckpt-000100 and so on; the best checkpoint
    and the most recent ones are kept.

    Every rank of `comm` has a RunFolder and makes the same calls, but only rank 0 writes.

    say           prints a line.
    unfinished    whether the previous process was killed, so that the report may be behind the log.
    lacks_sample  whether the step from which the run continues was evaluated, but its sample is missing.
    """

    def __init__(self, path: str | Path, comm: Comm = ALONE, say: Callable[[str], None] = console.say):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out-dir {self.path} is a file; expected a folder")
        self.comm, self.say = comm, say
        self.unfinished = self.lacks_sample = False
        self._opened_at = 0
        self._lock: files.Lock | None = None
        self._unknown: dict[str, JsonObject] = {}
        self._log: TextIO | None = None

    @contextmanager
    def taken(self) -> Iterator[RunFolder]:
        """Lock the folder before anything in it is read. The folder is created if it does not exist.

        Raises ValueError if another process has locked it.
        """
        made = not self.path.exists()
        self.comm.from_root(self._take)
        try:
            yield self
        finally:
            if self._lock:
                self._lock.release()
                if made:
                    with suppress(OSError):  # it is empty if the run could not be started
                        self.path.rmdir()

    def _take(self) -> None:
        files.make_folder(self.path)
        lock = files.Lock(self.path / LOCK, f"{self.path}/")
        lock.acquire()
        self._lock, self.unfinished = lock, lock.stale
        files.clean(self.path)

    def resume(self, say: Callable[[str], None]) -> RunState | None:
        """The state in the newest intact checkpoint, or None if there is no checkpoint. Damaged checkpoints are
        reported."""
        return self.comm.from_root(lambda: self.newest(say))

    def newest(self, say: Callable[[str], None]) -> RunState | None:
        """`resume` without communication, for a rank that fails while the others continue."""
        folders = checkpoint.find(self.path)
        for folder in folders:
            try:
                checkpoint.verify(folder)
                state = read_state(folder)
            except checkpoint.CheckpointError as error:
                say(f"skipping a damaged checkpoint: {error}")
                continue
            if names := state.unknown_names():
                listed = ", ".join(names)
                say(f"{folder / TRAINER}: fields of another version are kept, but have no effect here: {listed}")
            self._unknown = state.unknown
            return state
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
    def opened(self, progress: Progress, run_options: RunOptions) -> Iterator[None]:
        """Prepare the folder for a run that continues after `progress`, and open its log.

        Rows after that step are removed from the logs, since these steps will be repeated, and so is the record of a
        start from that step. Later checkpoints are damaged, so they are renamed, and none of them is used as the newest
        checkpoint. If a process was killed before it updated the link to the best checkpoint and deleted old
        checkpoints, this is done now.
        """
        if self.comm.rank:
            yield
            return
        self._opened_at = step = progress.step
        for folder in checkpoint.find(self.path):
            if checkpoint.step_of(folder) > step:
                folder.rename(files.free_name(folder.with_name(f"damaged-{folder.name}")))
        self._cut(STARTS, step - 1)
        row, sample = self._cut(LOG, step), self._cut(SAMPLES, step)
        self.lacks_sample = "val_loss" in row and row["step"] == step and sample.get("step") != step
        self._tidy(progress, run_options)
        self._log = (self.path / LOG).open("a", encoding="utf-8")
        try:
            yield
        finally:
            self._log.close()
            self._log = None

    def catch_up(self, sample: Callable[[int], str], seed: int, update_report: Callable[[bool], None]) -> None:
        """Write the sample and the report that a killed process did not write after the current checkpoint.

        sample         returns a text that is sampled from this checkpoint's model with a given seed.
        seed           the run's seed; the seed of a sample is seed + step.
        update_report  report.Writer.update; called with True, which always writes the report.
        """
        self.comm.from_root(lambda: self._catch_up(sample, seed, update_report))

    def _catch_up(self, sample: Callable[[int], str], seed: int, update_report: Callable[[bool], None]) -> None:
        if self.lacks_sample:
            self.log_sample(self._opened_at, sample(seed + self._opened_at))
        if self.lacks_sample or self.unfinished:
            update_report(True)

    def _cut(self, name: str, step: int) -> JsonObject:
        """Remove the rows of a log after `step`. Returns the last remaining row, or {} if there is none.

        A log that cannot be read is renamed.
        """
        log = self.path / name
        try:
            kept = [row for row in read_log(log) if row["step"] <= step]
        except OSError as error:
            aside = log.rename(files.free_name(log.with_name(f"damaged-{name}")))
            self.say(f"{log}: {error.strerror}; it was renamed to {aside}, and a new log is started")
            kept = []
        with files.atomic_write(log) as partial:
            partial.write_text("".join(checkpoint.to_json(row) + "\n" for row in kept), encoding="utf-8")
        return kept[-1] if kept else {}

    def _tidy(self, progress: Progress, run_options: RunOptions) -> None:
        """Point the link `best` to the best checkpoint, and delete old checkpoints."""
        best = set() if progress.best is None else {checkpoint.name(progress.best["step"])}
        for name in best:
            if (self.path / name).is_dir():
                # Some file systems do not support links, and on Windows only administrators can create them, so code
                # that opens out/best reads trainer.json instead.
                with suppress(OSError), files.atomic_write(self.path / BEST) as new:
                    new.symlink_to(name, target_is_directory=True)
        for line in checkpoint.prune(self.path, run_options.keep, best):
            self.say(line)

    def _check_folder(self) -> None:
        """If the folder was removed or renamed, create and lock a new one."""
        if self._lock is None or self._lock.held():
            return
        self.say(f"{self.path}/ was removed or renamed; training continues in a new folder with this name")
        self._lock.release()
        self._take()
        if self._log is not None:
            self._log.close()
            self._log = (self.path / LOG).open("a", encoding="utf-8")

    def save(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        tokenizer: Tokenizer,
        progress: Progress,
        run_options: RunOptions,
        data: str,
    ) -> Path:
        """Write the checkpoint of the current step, point the link `best` to the best checkpoint, and delete old ones.

        After a disk error, writing is retried once, unless the disk is full.

        data  the fingerprint of the training data.
        """
        folder = self.path / checkpoint.name(progress.step)
        moments = optimizer.state()
        if self.comm.rank:
            return folder
        given, defaults = run_options.options, run_options.defaults
        state = RunState(folder, progress, optimizer.steps, given, data, defaults, run_options.blas, self._unknown)

        def write() -> None:
            self._check_folder()
            if self._log is not None:  # so that no checkpoint is ahead of its log, even after a power failure
                with files.naming(self.path / LOG):
                    os.fsync(self._log.fileno())
            with checkpoint.writing(folder) as partial:
                model.save_pretrained(partial)
                tokenizer.save(partial)
                checkpoint.save_arrays(partial / OPTIMIZER, moments)
                checkpoint.write_json(partial / TRAINER, state.as_json())

        try:
            write()
        except OSError as error:
            if not error.errno or error.errno in NO_SPACE:
                raise
            self.say(f"{console.one_line(error)}; writing the checkpoint of step {progress.step:,} again")
            write()
        self._tidy(progress, run_options)
        return folder

    def load_optimizer(self, state: RunState, optimizer: optim.Optimizer) -> None:
        """Load the optimizer's state from a checkpoint."""
        file = state.folder / OPTIMIZER
        arrays = checkpoint.load_arrays(file)
        try:
            optimizer.load_state(arrays, state.optimizer_steps)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{file}: {error}") from None

    def log(self, step: int, **row: object) -> None:
        """Append the row of a step to the log. Numbers that are not finite are written as null."""
        if self._log is None:
            return
        self._check_folder()
        with files.naming(self.path / LOG):
            self._log.write(checkpoint.to_json({"step": step, **row}) + "\n")
            self._log.flush()

    def log_sample(self, step: int, text: str) -> None:
        """Append the text that was sampled after `step`."""
        self._append(SAMPLES, step=step, text=text)

    def log_start(self, step: int, **details: object) -> None:
        """Append the record of a start after `step`, for the report: options, model, data, machine."""
        self._append(STARTS, step=step, time=round(time.time()), **details)

    def _append(self, name: str, **row: object) -> None:
        if self.comm.rank == 0:
            self._check_folder()
            with files.naming(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(checkpoint.to_json(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def set_aside(self) -> Path | None:
        """Rename the folder, unless it is empty, so that a new run can use its name. Returns the new name, or None."""
        return self.comm.from_root(self._set_aside)

    def _set_aside(self) -> Path | None:
        if not self.path.exists() or all(path.name == LOCK for path in self.path.iterdir()):
            return None
        if not self.path.name:
            raise ValueError(f"--out-dir {self.path} cannot be renamed; choose a folder inside it")
        dated = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if self._lock and os.name == "nt":  # Windows cannot rename a folder with an open file
            self._lock.release()
        aside = self.path.rename(files.free_name(dated))
        if self._lock:
            self._lock.file = aside / LOCK
            self._lock.release()
            self._take()
        return aside


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint. Raises CheckpointError if trainer.json does not have the form that RunFolder.save
    writes.

    Fields that another version wrote are kept in RunState.unknown.
    """
    file = folder / TRAINER
    values = checkpoint.read_json(file)
    try:
        for name, kind in (("progress", dict), ("options", dict), ("data", str)):
            if not isinstance(values.get(name), kind):
                raise ValueError(f"{name} is {values.get(name)!r:.80}; expected a value of type {kind.__name__}")
        defaults = values["defaults"] if "defaults" in values else _first_defaults(folder.parent)
        if not isinstance(defaults, dict | None):
            raise ValueError(f"defaults is {defaults!r:.80}; expected a value of type dict")
        for removed in REMOVED_OPTIONS:
            values["options"].pop(removed, None)
            (defaults or {}).pop(removed, None)
        validate_options(values["options"])
        validate_options(defaults or {})
        known = {f.name for f in fields(Progress)}
        progress = Progress(**{name: value for name, value in values["progress"].items() if name in known})
        for name in ("step", "samples", "tokens", "bad_steps"):
            _check_count(f"progress.{name}", getattr(progress, name))
        _check_count("optimizer_steps", values.get("optimizer_steps"))
        if not _is_number(progress.seconds) or progress.seconds < 0:
            raise ValueError(f"progress.seconds is {progress.seconds!r:.80}; expected a non-negative number")
        progress.best = _read_best(progress.best)
        blas = _read_blas(values.get("blas"))
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{file}: not written by train.py, or damaged: {error}") from None
    names = {f.name for f in fields(RunState)} - {"folder", "unknown"}
    unknown = {
        "": {name: value for name, value in values.items() if name not in names},
        "progress": {name: value for name, value in values["progress"].items() if name not in known},
    }
    options, data = values["options"], values["data"]
    return RunState(folder, progress, values["optimizer_steps"], options, data, defaults, blas, unknown)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r:.80}; expected an integer from 0 to 2**63 - 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _read_best(best: object) -> Best | None:
    """Parse Progress.best. Raises ValueError if it does not have the expected form."""
    if best is None:
        return None
    if not isinstance(best, dict) or not _is_number(best.get("val_loss")):
        raise ValueError(f"progress.best is {best!r:.80}; expected a step and a val_loss")
    _check_count("progress.best.step", best.get("step"))
    return Best(step=best["step"], val_loss=best["val_loss"])


def _read_blas(blas: object) -> dict[str, str] | None:
    """Parse RunState.blas. Raises ValueError if it does not have the expected form."""
    if blas is None:
        return None
    if not isinstance(blas, dict) or not all(isinstance(blas.get(key), str) for key in ("name", "title", "processor")):
        raise ValueError(f"blas is {blas!r:.80}; expected the strings name, title and processor")
    return blas


def _first_defaults(out: Path) -> OptionValues | None:
    """The options with which a run was started, from starts.jsonl, since checkpoints of earlier versions do not contain
    the defaults."""
    starts = read_log(out / STARTS)
    options = starts[0].get("options") if starts else None
    if not isinstance(options, dict):
        return None
    known = {f.name for f in fields(Options)} - set(DERIVED_OPTIONS)
    return {name: value for name, value in options.items() if name in known and value is not None}


def read_log(path: Path) -> list[JsonObject]:
    """The rows of the log, the samples or the starts. Invalid lines, for example truncated by a crash, are skipped."""
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
