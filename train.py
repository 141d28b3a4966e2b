"""Train GPT-2. Without options it trains the nano model on the documentation that comes with Python.

A run resumes from the newest checkpoint in its out-dir, if there is one. Ctrl-C finishes the step and saves.
"""

from __future__ import annotations

from gpt2 import console  # first: Ctrl-C during the other imports ends silently

# isort: split
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data.prepare import prepare
from gpt2 import report
from gpt2.generate import sample_text
from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.display import (
    describe_start,
    say,
    say_end,
    say_finished,
    say_sample,
    say_step,
    say_tasks,
    start_record,
)  # fmt: skip
from gpt2.training.options import Options, OptionValues, parse_options
from gpt2.training.run import Progress, RunFolder, RunOptions, tensorboard_writer
from gpt2.training.setup import (
    build_trainer,
    explain_memory,
    load_questions,
    load_trained,
    new_run,
    open_data,
    resumed_run,
    settle_options,
)  # fmt: skip
from gpt2.training.stop import StopRequest
from gpt2.training.tasks import Questions
from gpt2.training.trainer import Trainer
from tinygrad2 import distributed, machine
from tinygrad2.distributed import Comm


@console.command("train.py", closed_pipe=None, kept="earlier checkpoints are intact", fail=distributed.fail)
def main(arguments: Sequence[str] | None = None) -> int:
    comm = distributed.world()
    comm.silence_other_ranks()
    return train(comm.from_root(lambda: parse_options(arguments, __doc__)), comm)


def train(given: OptionValues, comm: Comm) -> int:
    """Train in the out-dir, which is taken before anything in it is read."""
    folder = RunFolder(given.get("out_dir", Options.out_dir), comm, say)
    with folder.taken():
        return train_in(folder, given, comm)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # the trainer checks that losses are finite
def train_in(folder: RunFolder, given: OptionValues, comm: Comm) -> int:
    """Set up a new or resumed run from the options given, and train."""
    fresh = given.pop("fresh", False)
    saved = None if fresh else folder.resume(say)
    options, config, run_options = resumed_run(given, saved) if saved else new_run(given)
    progress = saved.progress if saved else Progress()
    page = report.Writer(folder.path, say)
    if saved and progress.step >= options.max_iters:
        with folder.opened(progress, run_options):
            comm.from_root(
                partial(catch_up, folder, page, options, progress.step, partial(load_trained, saved, options))
            )
        say_finished(folder.path, progress.step)
        return 0
    settle_options(options, run_options, comm.size)
    board = tensorboard_writer() if options.tensorboard else None
    if options.data == "pydoc":
        comm.from_root(prepare_pydoc)
    data, questions = open_data(options, saved), load_questions(options, comm)
    trainer = build_trainer(options, config, data, folder, saved)
    if fresh and (aside := folder.set_aside()):
        say(f"{folder.path}/ renamed to {aside}/")

    with folder.opened(progress, run_options, board), StopRequest(verbose=comm.size == 1) as stop:
        comm.from_root(
            partial(catch_up, folder, page, options, progress.step, lambda: (trainer.model, trainer.tokenizer))
        )
        folder.log_start(progress.step, given=run_options.options, **start_record(trainer, machine.describe()))
        comm.from_root(partial(describe_start, trainer))
        written = training_loop(trainer, questions, run_options, stop, page)
    say_end(trainer, written, folder.path / report.REPORT)
    return 0


def training_loop(
    trainer: Trainer, questions: Questions, run_options: RunOptions, stop: StopRequest, page: report.Writer
) -> Path | None:
    """Train until the last step, or until a rank is requested to stop. Returns the last checkpoint written."""
    options, progress, folder, comm = trainer.options, trainer.progress, trainer.folder, trainer.comm
    written = None
    trainer.restart_clock()
    while progress.step < options.max_iters and not trainer.stopping:
        with explain_memory(trainer.model.config, options):
            # Forward, loss and backward of each micro-step; all-reduce of the gradients; the learning rate of this
            # step; clipping; the optimizer's update; zero_grad.
            trainer.step(stop.requested)
        step = progress.step
        last = step == options.max_iters
        evaluating = last or every(options.eval_interval, step)
        saving = last or trainer.stopping or every(options.save_interval, step)

        for row in trainer.finished_steps(wait=evaluating or saving):
            if row["step"] in (trainer.first_step, options.max_iters) or every(options.log_interval, row["step"]):
                say_step(row, trainer)
            if evaluating and row["step"] == step:
                row |= trainer.evaluate(questions)
                say_tasks(row, questions)
            folder.log(**row)
        is_best = evaluating and progress.best is not None and progress.best["step"] == step
        if saving or is_best:
            written = trainer.save(run_options)
        if evaluating:
            text = comm.from_root(partial(sample_text, trainer.model, trainer.tokenizer, options.seed + step))
            say_sample(row["val_loss"], is_best, text)
            folder.log_sample(step, text)
        if evaluating or trainer.stopping:
            comm.from_root(partial(page.update, always=last or trainer.stopping))
        if evaluating or saving:
            trainer.restart_clock()
    return written


def catch_up(
    folder: RunFolder,
    page: report.Writer,
    options: Options,
    step: int,
    load: Callable[[], tuple[LanguageModel, Tokenizer]],
) -> None:
    """Do what a process that was killed after the checkpoint of `step` had still to do: the sample, and the report."""
    if folder.lacks_sample:
        folder.log_sample(step, sample_text(*load(), options.seed + step))
    if folder.lacks_sample or folder.unfinished:
        page.update(always=True)


def every(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps (0 for never) happens after this step."""
    return interval > 0 and step % interval == 0


def prepare_pydoc() -> None:
    """Make the default data set, if it does not exist yet."""
    folder = Path("data/pydoc")
    if not folder.exists():
        say(f"no data set yet: preparing {folder} from the documentation of this Python")
        prepare(["pydoc"], "bytes", folder)


if __name__ == "__main__":
    sys.exit(console.run(main))
