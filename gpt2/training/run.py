"""The folder of a training run: checkpoints, a log with one line a step, samples, and how the run was started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.options import DERIVED_OPTIONS, Options, UsageError, check_options
from tinygrad2 import checkpoint, files, optim
from tinygrad2.distributed import Comm, SoloComm

ALONE = SoloComm()
LOG, SAMPLES, STARTS = "log.jsonl", "samples.jsonl", "starts.jsonl"  # a row a step, a sample, a start
TRAINER, OPTIMIZER, LOCK, TENSORBOARD = "trainer.json", "optimizer.safetensors", ".lock", "tensorboard"


@dataclass
class Progress:
    """Where a run stands.

    step     steps made.
    samples  sequences seen; the data order goes on from here, whatever the size of a batch.
    tokens   tokens seen.
    seconds  time spent in steps.
    best     the step and validation loss of the best evaluation so far, or None.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None


@dataclass
class Remembered:
    """What a resumed run takes over: the options that it was given, and the defaults of the others at its start."""

    options: dict[str, Any]
    defaults: dict[str, Any]


@dataclass
class Saved:
    """What a checkpoint holds beside the weights.

    options   that the run was given;  defaults  what held for the others when it was started, or None where that is
              not known: later versions may have other defaults, but not for this run.
    data      the fingerprint of the training data.
    """

    folder: Path
    progress: Progress
    optimizer_steps: int
    options: dict[str, Any]
    data: str
    defaults: dict[str, Any] | None = None


class RunFolder:
    """`out/`: what was logged, and checkpoints ckpt-000100 and so on: the newest, the best and the last few stay.

    Every rank of `comm` has one, and makes the same calls; rank 0 is the only one to write.
    """

    def __init__(self, path: str | Path, keep: int = 2, comm: Comm = ALONE):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out-dir {self.path} is a file; name a folder")
        self.keep = keep
        self.comm = comm
        self._log: Any = None
        self._board: Any = None

    def resume(self, say: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that is whole, or None where there is none. Damaged ones are named, and passed over."""
        return self.comm.from_root(lambda: self.newest(say))

    def newest(self, say: Callable[[str], None]) -> Saved | None:
        """What `resume` gives, without asking rank 0: for a rank that is about to fail alone."""
        folders = checkpoint.find(self.path)
        for folder in folders:
            try:
                checkpoint.verify(folder)
                return _read_state(folder)
            except checkpoint.CheckpointError as error:
                say(f"damaged checkpoint, not used: {error}")
        if folders:
            raise checkpoint.CheckpointError(f"{self.path}: no checkpoint is whole; --fresh starts a new run beside it")
        return None

    def last_checkpoint(self) -> str:
        """A sentence that names the newest checkpoint, for a rank that is about to fail alone."""
        saved = self.newest(lambda line: None)
        return f"The last checkpoint is {saved.folder}." if saved else "There is no checkpoint yet."

    @contextmanager
    def opened(self, step: int, writer: Any = None) -> Iterator[None]:
        """Hold the folder for a run that goes on after `step`: no other process trains in it, and the log is open.

        Rows past `step` are cut off what was logged, since those steps are made again. Checkpoints past it are damaged
        ones, and are renamed, so that they do not count as the newest.
        writer  tensorboard_writer(), where TensorBoard is to see the run too.
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
            # Its files are named by the second: the suffix keeps two starts within one apart.
            options = {"purge_step": step + 1, "filename_suffix": f".{step}"}
            board = writer(str(self.path / TENSORBOARD), **options) if writer else nullcontext()
            with (self.path / LOG).open("a", encoding="utf-8") as self._log, board as self._board:
                yield

    def save(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        tokenizer: Tokenizer,
        progress: Progress,
        remembered: Remembered,
        data: str,
    ) -> Path:
        """Write the checkpoint of the step that `progress` names, point `best` at the best one, clear old ones away.

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
            state = Saved(folder, progress, optimizer.steps, remembered.options, data, remembered.defaults)
            checkpoint.write_json(partial / TRAINER, {k: v for k, v in asdict(state).items() if k != "folder"})
        best = set() if progress.best is None else {checkpoint.name(progress.best["step"])}
        checkpoint.prune(self.path, self.keep, best)
        for name in best:
            self._point("best", name)
        return folder

    def _point(self, link: str, name: str) -> None:
        """Make out/best a link to a checkpoint, where the file system has links."""
        if (self.path / name).is_dir():
            # (Windows gives links only to administrators; trainer.json names the best step too)
            with suppress(OSError), files.atomic_write(self.path / link) as new:
                new.symlink_to(name, target_is_directory=True)

    def load_optimizer(self, saved: Saved, optimizer: optim.Optimizer) -> None:
        """Take over the optimizer's state from a checkpoint."""
        file = saved.folder / OPTIMIZER
        arrays = checkpoint.load_arrays(file)
        try:
            optimizer.load_state(arrays, saved.optimizer_steps)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{file}: {error}") from None

    def log(self, **row: Any) -> None:
        """Append one step's row."""
        if self._log is None:
            return
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        for key, value in row.items() if self._board else ():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, row["step"])

    def log_sample(self, step: int, text: str) -> None:
        """Append what the model wrote after `step`."""
        self._append(SAMPLES, step=step, text=text)
        if self._board:
            self._board.add_text("sample", text, step)

    def log_start(self, step: int, **circumstances: Any) -> None:
        """Append how and where the run goes on after `step`, for its report."""
        self._append(STARTS, step=step, time=round(time.time()), **circumstances)

    def _append(self, name: str, **row: Any) -> None:
        if self.comm.rank == 0:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def set_aside(self) -> Path | None:
        """Rename the folder, if it is there, so that a new run can take its name; returns the new name."""
        return self.comm.from_root(self._set_aside)

    def _set_aside(self) -> Path | None:
        if not self.path.exists():
            return None
        files.Lock(self.path / LOCK, str(self.path)).check()
        if not self.path.name:
            raise ValueError(f"--out-dir {self.path} cannot be renamed; name a folder of its own")
        dated = self.path.with_name(f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return self.path.rename(files.free_name(dated))


def _read_state(folder: Path) -> Saved:
    """Raises CheckpointError where trainer.json is not what RunFolder.save writes."""
    state = checkpoint.read_json(folder / TRAINER)
    try:
        defaults = state["defaults"] if "defaults" in state else _first_defaults(folder.parent)
        progress = Progress(**state["progress"])
        saved = Saved(folder, progress, state["optimizer_steps"], state["options"], state["data"], defaults)
        counts = (saved.progress.step, saved.progress.samples, saved.progress.tokens, saved.optimizer_steps)
        if not all(isinstance(count, int) for count in counts) or not isinstance(saved.options, dict):
            raise TypeError
        if saved.progress.best is not None:
            saved.progress.best["step"] + 0, saved.progress.best["val_loss"] + 0
        check_options(saved.options)
        check_options(saved.defaults or {})
        return saved
    except (KeyError, TypeError, ValueError):
        raise checkpoint.CheckpointError(f"{folder / TRAINER}: it is not what train.py writes") from None


def _first_defaults(out: Path) -> dict[str, Any] | None:
    """The options that a run had when it was started, as its folder recorded them: checkpoints of earlier versions
    do not hold the defaults."""
    starts = read_log(out / STARTS)
    options = starts[0].get("options") if starts else None
    if not isinstance(options, dict):
        return None
    known = {f.name for f in fields(Options)} - set(DERIVED_OPTIONS)
    return {name: value for name, value in options.items() if name in known and value is not None}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, samples or starts. Lines that hold none, such as one cut short by a crash, are left out."""
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


def tensorboard_writer() -> Any:
    """The class that writes TensorBoard's files. Raises UsageError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError('--tensorboard: tensorboardX is not installed; pip install -e ".[tensorboard]"') from None
    return SummaryWriter
