"""The folder of a training run: checkpoints, and a log with one line a step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer
from tinygrad2 import checkpoint, optim

LOG, TRAINER, OPTIMIZER = "log.jsonl", "trainer.json", "optimizer.safetensors"


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
class Saved:
    """What a checkpoint holds beside the weights."""

    folder: Path
    progress: Progress
    optimizer_steps: int
    options: dict[str, Any] = field(default_factory=dict)


class RunFolder:
    """`out/`: log.jsonl, and checkpoints ckpt-000100 and so on, of which the newest, the best and the last few stay."""

    def __init__(self, path: str | Path, keep: int = 2):
        self.path = Path(path)
        self.keep = keep
        self._log: Any = None

    def resume(self, say: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that is whole, or None where there is none. Damaged ones are named, and passed over."""
        folder, damaged = checkpoint.newest(self.path)
        for line in damaged:
            say(f"damaged checkpoint, not used: {line}")
        if folder is None:
            if damaged:
                raise checkpoint.CheckpointError(f"{self.path}: no checkpoint is whole; --fresh starts anew beside it")
            return None
        state = checkpoint.read_json(folder / TRAINER)
        try:
            return Saved(folder, Progress(**state["progress"]), state["optimizer_steps"], state["options"])
        except (KeyError, TypeError):
            raise checkpoint.CheckpointError(f"{folder / TRAINER}: it is not what train.py writes") from None

    def save(
        self, model: GPT2, optimizer: optim.AdamW, tokenizer: Tokenizer, progress: Progress, options: dict[str, Any]
    ) -> Path:
        """Write the checkpoint of the step that `progress` names, point `best` at the best one, clear old ones away."""
        folder = self.path / checkpoint.name(progress.step)
        with checkpoint.writing(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save(partial)
            checkpoint.save_arrays(partial / OPTIMIZER, optimizer.state())
            state = {"progress": asdict(progress), "optimizer_steps": optimizer.steps, "options": options}
            checkpoint.write_json(partial / TRAINER, state)
        best = set() if progress.best is None else {checkpoint.name(progress.best["step"])}
        checkpoint.prune(self.path, self.keep, best)
        for name in best:
            self._point("best", name)
        return folder

    def _point(self, link: str, name: str) -> None:
        """Make out/best a link to a checkpoint, where the file system has links."""
        if (self.path / name).is_dir():
            new = self.path / f".{link}.new"
            try:
                new.unlink(missing_ok=True)
                new.symlink_to(name, target_is_directory=True)
                os.replace(new, self.path / link)
            except OSError:
                pass  # Windows gives links only to administrators; trainer.json names the best step too

    def load_optimizer(self, saved: Saved, optimizer: optim.AdamW) -> None:
        """Take over the optimizer's state from a checkpoint."""
        optimizer.load_state(checkpoint.load_arrays(saved.folder / OPTIMIZER), saved.optimizer_steps)

    def start_log(self, step: int) -> None:
        """Open the log for rows after `step`; rows past it, of steps that are made again, are cut off."""
        self.path.mkdir(parents=True, exist_ok=True)
        log = self.path / LOG
        kept = [row for row in read_log(log) if row["step"] <= step]
        rewritten = self.path / f".{LOG}.new"
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(rewritten, log)
        self._log = log.open("a", encoding="utf-8")

    def log(self, **row: Any) -> None:
        """Append one step's row."""
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()

    def set_aside(self) -> Path | None:
        """Rename the folder, if it is there, so that a new run can take its name; returns the new name."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = [f"{self.path.name}-{stamp}", *(f"{self.path.name}-{stamp}-{i}" for i in range(1, 100))]
        aside = next(path for path in map(self.path.with_name, names) if not path.exists())
        return self.path.rename(aside)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that was cut short by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def plot(out: Path) -> None:
    """Draw the loss over the steps as out/loss.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_log(out / LOG)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.8, label="training")
    measured = [row for row in rows if "val_loss" in row]
    axes.plot([row["step"] for row in measured], [row["val_loss"] for row in measured], "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
