"""Train GPT-2. Without options, train the nano model on the documentation included with Python.

A run resumes from the newest checkpoint in its out-dir, if there is one. Ctrl-C finishes the micro-step and saves.
"""

from __future__ import annotations

from gpt2 import console  # first, so that Ctrl-C during the other imports exits silently

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
from gpt2.training.watch import Watch
from tinygrad2 import distributed, machine
from tinygrad2.distributed import Comm


@console.command(
    console.script_name("train"), closed_pipe=None, kept="earlier checkpoints are intact", fail=distributed.fail
)
def main(arguments: Sequence[str] | None = None) -> int:
    comm = distributed.world()
    comm.silence_other_ranks()
    given = comm.from_root(lambda: parse_options(arguments, __doc__))
    command = display.typed_command(arguments, comm.size)
    with RunFolder(given.get("out_dir", Options.out_dir), comm, display.say).taken() as folder:
        return train(folder, given, comm, command)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # steps that are not finite are skipped
def train(folder: RunFolder, given: OptionValues, comm: Comm, command: str) -> int:
    """Set up a new or resumed run with the given options, and train."""
    fresh = given.pop("fresh", False)
    saved = None if fresh else folder.resume(display.say)
    options, config, run_options = setup.resumed_run(given, saved) if saved else setup.new_run(given)
    progress, page = saved.progress if saved else Progress(), report.Writer(folder.path, display.say)
    if saved and (progress.step >= options.max_iters or options.stops_early(progress.step, progress.best_step)):
        with folder.opened(progress, run_options):
            folder.catch_up(lambda seed: sample_text(*setup.trained(saved, options), seed), options.seed, page.update)
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

    with folder.opened(progress, run_options), StopRequest(verbose=comm.size == 1) as stop, Watch.of(trainer) as watch:
        baselines = comm.from_root(partial(display.baseline_losses, trainer))
        comm.from_root(partial(display.describe_start, trainer, run_options.notes, baselines))
        setup.measure_first_loss(trainer)
        start = display.start_record(trainer, command, machine.describe(), baselines)
        folder.log_start(progress.step, given=run_options.options, **start)
        folder.catch_up(partial(sample_text, trainer.model, trainer.tokenizer), options.seed, page.update)
        comm.from_root(page.update)
        written = training_loop(trainer, questions, run_options, stop, page, watch)
    display.say_end(trainer, written, folder.path / report.REPORT)
    return 0


def training_loop(
    trainer: Trainer, tasks: Questions, run_options: RunOptions, stop: StopRequest, page: report.Writer, watch: Watch
) -> Path | None:
    """Train until the last step, or until a rank is requested to stop. Returns the last checkpoint written, or None."""
    options, progress, folder, comm = trainer.options, trainer.progress, trainer.folder, trainer.comm
    written, lines = None, display.StepLines(trainer)
    trainer.restart_clock()
    while progress.step < options.max_iters and not trainer.stopping:
        with setup.explain_memory(trainer.model.config, options, comm.size), watch.step():
            # Forward, loss and backward of each micro-step; all-reduce of the gradients; learning rate of the step;
            # gradient clipping; the optimizer's update; zero_grad.
            completed = trainer.step(lambda: stop.requested)
        step = progress.step
        last = step == options.max_iters
        evaluating = completed and (last or every(options.eval_interval, step))
        saving = last or trainer.stopping or every(options.save_interval, step)

        for row in trainer.finished_steps(wait=evaluating or saving):
            lines.add(row)
            if evaluating and row["step"] == step:
                row |= trainer.evaluate(tasks)
                display.say_tasks(row, tasks)
            folder.log(**row)
        is_best = evaluating and progress.best is not None and progress.best["step"] == step
        early = not last and evaluating and options.stops_early(step, progress.best_step)
        if (saving or is_best or early) and step >= trainer.first_step:
            written = trainer.save(run_options)
        if evaluating:
            text = comm.from_root(partial(sample_text, trainer.model, trainer.tokenizer, options.seed + step))
            display.say_sample(row["val_loss"], is_best, text)
            folder.log_sample(step, text)
        if evaluating or trainer.stopping:
            comm.from_root(partial(page.update, last=last or early or trainer.stopping))
        elif comm.rank == 0 and page.is_old():
            page.update()
            trainer.restart_clock()
        if early:
            display.say_early_stop(trainer)
            break
        if evaluating or saving:
            trainer.restart_clock()
    return written


def every(interval: int, step: int) -> bool:
    """Whether an action with this interval in steps (0 for never) is due after `step`."""
    return interval > 0 and step % interval == 0


def prepare_pydoc() -> None:
    """Prepare the default data set if it does not exist."""
    folder = Path("data/pydoc")
    if not folder.exists():
        display.say(f"no data set yet: preparing {folder} from Python's documentation")
        prepare(["pydoc"], "bytes", folder)


if __name__ == "__main__":
    sys.exit(console.run(main))
