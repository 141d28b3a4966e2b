"""The lines that train.py prints, and the record of each start for the report."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from gpt2.console import clock
from gpt2.training.dataset import baselines
from gpt2.training.evaluation import describe_task
from gpt2.training.options import Options
from gpt2.training.tasks import Questions
from gpt2.training.trainer import Trainer
from tinygrad2 import threads
from tinygrad2.checkpoint import JsonObject
from tinygrad2.files import discard_stdout


def say(line: str) -> None:
    """Print a line. Output that fails (a closed pipe, a full disk) must not end a run."""
    try:
        print(line, flush=True)
    except OSError:
        discard_stdout()


def describe_start(trainer: Trainer) -> None:
    """Print the model, the data and the schedule before training starts."""
    model, options, comm, train = trainer.model, trainer.options, trainer.comm, trainer.train
    micro_steps, per_step = options.micro_steps(comm.size), options.total_batch_size or 0
    ranks = f"{comm.size} ranks x " if comm.size > 1 else ""
    count = threads.count()
    say(
        f"model     {options.init or options.preset}: {model.n_parameters():,} parameters ({model.config.summary()})"
        f", {options.dtype} on {model.backend.device} ({ranks}{count} thread{'s' * (count > 1)})"
    )
    if comm.size > 1 and model.backend.cuda:
        direct = comm.nccl(model.backend)
        say(f"all-reduce: {'GPU to GPU (NCCL)' if direct else 'through host memory'}")
    if comm.idle_cores:
        hint = "mpirun --bind-to none uses them"
        say(f"cores     {comm.idle_cores} of this machine stay idle, since the ranks are bound to others; {hint}")
    tokens, name = trainer.validation.tokens, trainer.tokenizer.name
    say(f"data      {train.tokens:,} tokens to train on, {tokens:,} to validate ({name})")
    say(
        f"batch     {ranks}{options.batch_size} sequences x {options.block_size} tokens x {micro_steps} micro-step"
        f"{'s' * (micro_steps > 1)} = {per_step:,} tokens a step; {options.max_iters:,} steps are "
        f"{options.max_iters * per_step / train.tokens:.2f} epochs"
    )
    intervals = (("evaluate", options.eval_interval), ("save", options.save_interval))
    plan = [f"{what} {f'every {n:,} steps' if n else 'at the end'}" for what, n in intervals]
    say(f"schedule  {', '.join(plan)}; the best and the last {options.keep} checkpoints are kept in {options.out_dir}/")
    short = " (never reached: it is all warm-up)" if options.warmup_iters >= options.max_iters else ""
    say(
        f"rate      up to {options.learning_rate:.1e} in {options.warmup_iters:,} steps{short}, then down by a cosine "
        f"to {options.min_lr:.1e} at step {options.lr_decay_iters:,}"
    )
    if trainer.progress.step == 0:
        losses = ", ".join(f"{key} {value:.4f}" for key, value in baselines(train, trainer.validation).items())
        say(f"baselines {losses} nats a token (validation)")


def start_record(trainer: Trainer, machine: dict[str, str]) -> dict[str, JsonObject]:
    """The options, model, data and machine of this start, for the report."""
    model, train = trainer.model, trainer.train
    return {
        "options": dataclasses.asdict(trainer.options),
        "model": {"parameters": f"{model.n_parameters():,}", **dataclasses.asdict(model.config)},
        "data": {
            "path": str(train.path),
            "tokens": f"{train.tokens:,}",
            "validation tokens": f"{trainer.validation.tokens:,}",
            "tokenizer": trainer.tokenizer.name,
            "fingerprint": train.fingerprint,
        },
        "machine": {
            "device": model.backend.name(),
            "ranks": trainer.comm.size,
            "threads": threads.count(),
            **machine,
        },
    }


def say_step(row: JsonObject, trainer: Trainer) -> None:
    """Print the line of a step, with the estimated time left from the second step on."""
    steps, done = trainer.options.max_iters, row["step"] - trainer.first_step
    left = f" | eta {clock(trainer.elapsed() / (done + 1) * (steps - row['step']))}" if done else ""
    comm = f" | comm {1000 * row['comm_seconds']:,.0f} ms" if row["comm_seconds"] else ""
    update = f" | {trainer.options.optimizer} {1000 * row['optimizer_seconds']:,.0f} ms" if trainer.profiler else ""
    mfu = f" | {100 * row['mfu']:.0f} % MFU" if "mfu" in row else ""
    say(
        f"step {row['step']:,}/{steps:,} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
        f"{1000 * row['seconds']:,.0f} ms{update}{comm} | {row['tokens_per_s']:,.0f} tok/s{mfu}{left}"
    )


def say_tasks(row: JsonObject, questions: Questions) -> None:
    """Print a line with each task's results in a row of the log."""
    for task, _ in questions:
        prefix = f"{task.name}_"
        results = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        say(f"  {describe_task(task, results)}")


def say_sample(val_loss: float, is_best: bool, text: str) -> None:
    """Print the loss of an evaluation, and a sampled text."""
    say(f"  validation loss {val_loss:.4f}{' (the best so far)' if is_best else ''}. A sample:")
    say("".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))


def say_finished(out: Path, steps: int) -> None:
    """Print that the run is complete, and what to do next."""
    say(f"the run in {out}/ is already finished ({steps:,} steps). {sample_command(out)} samples from it;")
    say(f"--max-iters {2 * steps} continues it, --fresh starts a new run (the folder is renamed, not deleted).")


def say_end(trainer: Trainer, written: Path | None, page: Path) -> None:
    """Print how training ended, and what to do next."""
    progress, out = trainer.progress, trainer.folder.path
    if trainer.profiler and trainer.profiler.steps:
        say("\n".join(trainer.profiler.table()))
    if progress.step < trainer.options.max_iters:
        say(f"stopped after step {progress.step:,}, saved in {written}; {resume_command(out)} resumes it.")
        return
    assert progress.best is not None
    say(
        f"done: {progress.step:,} steps in {clock(trainer.elapsed())}, best validation loss "
        f"{progress.best['val_loss']:.4f} at step {progress.best['step']:,}, saved in {written}"
    )
    say(f"its curves and samples: {page}")
    say(f"next: {sample_command(out)}")


def sample_command(out: Path) -> str:
    """The command that samples from a run."""
    return f'python sample.py --checkpoint {shlex.quote(str(out))} -p "The function returns"'


def resume_command(out: Path) -> str:
    """The command that resumes a run."""
    return "python train.py" + ("" if out == Path(Options.out_dir) else f" --out-dir {shlex.quote(str(out))}")
