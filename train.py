"""Train GPT-2. Without options it trains the nano model on the documentation that comes with Python.

A run resumes from the newest checkpoint in its out-dir, if there is one. Ctrl-C finishes the micro-step and saves.
"""

from __future__ import annotations

from gpt2 import console  # first: Ctrl-C during the other imports ends silently

# isort: split
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data.prepare import prepare
from gpt2 import report
from gpt2.generate import sample_text
from gpt2.training import display, setup
from gpt2.training.options import Options, OptionValues, parse_options
from gpt2.training.run import Progress, RunFolder, RunOptions
from gpt2.training.stop import StopRequest
from gpt2.training.tasks import Questions
from gpt2.training.trainer import Trainer
from tinygrad2 import distributed, machine
from tinygrad2.distributed import Comm


@console.command(
    console.script_name("train"), closed_pipe=None, kept="earlier checkpoints are intact", fail=distributed.fail
)
def main(arguments: Sequence[str] | None = None) -> int:
    comm = distributed.world()
    comm.silence_other_ranks()
    given = comm.from_root(lambda: parse_options(arguments, __doc__))
    return train(given, comm, display.typed_command(arguments, comm.size))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # the trainer checks that losses are finite
def train(given: OptionValues, comm: Comm, command: str) -> int:
    """Set up a new or resumed run from the options given, and train."""
    fresh = given.pop("fresh", False)
    folder = RunFolder(given.get("out_dir", Options.out_dir), given.get("keep", Options.keep), comm)
    saved = None if fresh else folder.resume(display.say)
    options, config, run_options = setup.resumed_run(given, saved) if saved else setup.new_run(given)
    progress = saved.progress if saved else Progress()
    best_step = progress.best["step"] if progress.best else progress.step
    if progress.step >= options.max_iters or options.stops_early(progress.step, best_step):
        display.say_finished(folder.path, progress.step)
        return 0
    setup.settle_options(options, run_options, saved, comm.size)
    setup.choose_blas(options, run_options, saved, comm)
    if options.data == "pydoc":
        comm.from_root(prepare_pydoc)
    data, questions = setup.open_data(options, saved), setup.load_questions(options, comm)
    if saved is None:
        setup.fit_options(options, run_options, data[0].tokens)
    trainer = setup.build_trainer(options, config, data, folder, saved)
    if fresh and (aside := folder.set_aside()):
        display.say(f"{folder.path}/ renamed to {aside}/")

    with folder.opened(progress.step), StopRequest(verbose=comm.size == 1) as stop:
        baselines = comm.from_root(partial(display.baseline_losses, trainer))
        comm.from_root(partial(display.describe_start, trainer, run_options.notes, baselines))
        if progress.step == 0:
            with setup.explain_memory(config, options):
                trainer.loss_before = trainer.validation_loss()
            display.say_first_loss(trainer.loss_before)
        start = display.start_record(trainer, command, machine.describe(), baselines)
        folder.log_start(progress.step, given=run_options.options, **start)
        written = training_loop(trainer, questions, run_options, stop, report.Writer(folder.path, display.say))
    display.say_end(trainer, written, folder.path / report.REPORT)
    return 0


def training_loop(
    trainer: Trainer, questions: Questions, run_options: RunOptions, stop: StopRequest, page: report.Writer
) -> Path | None:
    """Train until the last step, or until a rank is requested to stop. Returns the last checkpoint written."""
    options, progress, folder, comm = trainer.options, trainer.progress, trainer.folder, trainer.comm
    written = None
    trainer.restart_clock()
    while progress.step < options.max_iters and not trainer.stopping:
        with setup.explain_memory(trainer.model.config, options):
            # Forward, loss and backward of each micro-step; all-reduce of the gradients; the learning rate of this
            # step; clipping; the optimizer's update; zero_grad.
            made = trainer.step(lambda: stop.requested)
        step = progress.step
        last = step == options.max_iters
        evaluating = made and (last or every(options.eval_interval, step))
        saving = last or trainer.stopping or every(options.save_interval, step)

        for row in trainer.finished_steps(wait=evaluating or saving):
            if row["step"] in (trainer.first_step, options.max_iters) or every(options.log_interval, row["step"]):
                display.say_step(row, trainer)
            if evaluating and row["step"] == step:
                row |= trainer.evaluate(questions)
                display.say_tasks(row, questions)
            folder.log(**row)
        is_best = evaluating and progress.best is not None and progress.best["step"] == step
        early = not last and evaluating and options.stops_early(step, progress.best["step"] if progress.best else step)
        if (saving or is_best or early) and step >= trainer.first_step:
            written = trainer.save(run_options)
        if evaluating:
            text = comm.from_root(partial(sample_text, trainer.model, trainer.tokenizer, options.seed + step))
            display.say_sample(row["val_loss"], is_best, text)
            folder.log_sample(step, text)
        if evaluating or trainer.stopping:
            comm.from_root(partial(page.update, last=last or early or trainer.stopping))
        if early:
            display.say_early_stop(trainer)
            break
        if evaluating or saving:
            trainer.restart_clock()
    return written


def every(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps (0 for never) happens after this step."""
    return interval > 0 and step % interval == 0


def prepare_pydoc() -> None:
    """Make the default data set, if it does not exist yet."""
    folder = Path("data/pydoc")
    if not folder.exists():
        display.say(f"no data set yet: preparing {folder} from the documentation of this Python")
        prepare(["pydoc"], "bytes", folder)


if __name__ == "__main__":
    sys.exit(console.run(main))
