"""The output of train.py, and the record of each start for the report."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gpt2 import console
from gpt2.config import GPT2Config
from gpt2.console import clock
from gpt2.console import say_if_possible as say
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import TokenDataset, baselines, bytes_per_token
from gpt2.training.evaluation import describe_task
from gpt2.training.options import MODEL_SIZES, Options
from gpt2.training.tasks import Questions
from gpt2.training.trainer import Trainer
from tinygrad2 import blas, machine, threads
from tinygrad2.checkpoint import JsonObject

PRINT_SECONDS = 30.0  # maximum time between two printed steps, if the steps themselves are shorter
PROMPT_TOKENS = 4096  # number of tokens at the start of the validation data that are searched for a prompt
PROMPT_LENGTH = 40  # maximum number of characters


def baseline_losses(trainer: Trainer) -> dict[str, float]:
    """The losses of n-gram models, by name. Empty for a resumed run, since they are recorded only once."""
    return {} if trainer.progress.step else baselines(trainer.train, trainer.validation)


def describe_start(trainer: Trainer, notes: Sequence[str], losses: dict[str, float]) -> None:
    """Print the model, the data, the batch, the schedule, notes about the chosen values, and the `losses` of n-gram
    models."""
    model, options, comm, train = trainer.model, trainer.options, trainer.comm, trainer.train
    per_step, count = options.total_batch_size or 0, threads.count()
    preset = GPT2Config.preset(options.preset)
    own = any(getattr(options, name) != getattr(preset, name) for name in MODEL_SIZES)
    name = options.init or options.preset + (" with other sizes" if own else "")
    say(f"model      {name}: {model.n_parameters():,} parameters ({model.config.summary()})")
    each = f" on each of {comm.size} ranks" if comm.size > 1 else ""
    say(f"device     {model.backend.device}, {options.dtype}, {_plural(count, 'thread')}{each}")
    if not model.backend.cuda:
        say(f"products   {blas.description()}")
    if (load := machine.load_average()) > (cores := os.cpu_count() or 1) + 0.5:
        say(
            f"load       other programs use the cores (load average {load:.1f} on {cores}); steps will be slower, and "
            f"--threads 1 may be faster"
        )
    if comm.size > 1 and model.backend.cuda:
        direct = comm.nccl(model.backend)
        say(f"all-reduce {'GPU to GPU (NCCL)' if direct else 'through host memory'}")
    if comm.idle_cores:
        idle = f"{_plural(comm.idle_cores, 'core')} of this machine idle"
        say(f"cores      {idle}: the launcher bound the ranks to the other cores; mpirun --bind-to none uses all cores")
    say(
        f"data       {train.path}: {train.tokens:,} training tokens, {trainer.validation.tokens:,} validation tokens "
        f"(tokenizer {trainer.tokenizer.name}, vocabulary {trainer.tokenizer.vocab_size:,})"
    )
    factors = [
        _plural(options.batch_size, "sequence"),
        _plural(options.block_size, "token"),
        _plural(options.micro_steps(comm.size), "micro-step"),
        *([f"{comm.size} ranks"] if comm.size > 1 else []),
    ]
    say(f"batch      {per_step:,} tokens per step = {' x '.join(factors)}")
    say(f"steps      {options.max_iters:,}, which is {options.max_iters * per_step / train.tokens:.2f} epochs")
    say(f"lr         {describe_schedule(options)}")
    regularization = f"weight decay {options.weight_decay:g}, gradient clipping {options.grad_clip or 'off'}"
    say(f"optimizer  {options.optimizer}, {regularization}")
    say(
        f"output     {trainer.folder.path}/: a checkpoint {_interval(options.save_interval)} (the last {options.keep} "
        f"and the best are kept), an evaluation {_interval(options.eval_interval)}"
    )
    for note in notes:
        say(note)
    if losses:
        listed = ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
        say(f"baselines  validation loss of n-gram models, in nats per token: {listed}")


def describe_schedule(options: Options) -> str:
    """Describe the learning-rate schedule in words."""
    peak, warmup = f"{options.learning_rate:.1e}", options.warmup_iters
    earlier = f"; this run ends earlier, at {options.learning_rate_at(options.max_iters - 1):.1e}"
    if warmup >= options.max_iters:
        return f"warm-up to {peak} over {warmup:,} steps{earlier}"
    rise = f"warm-up to {peak} over {_plural(warmup, 'step')}" if warmup else f"from {peak}"
    stable = f", constant until step {options.stable_iters:,}" if options.lr_schedule == "wsd" else ""
    shape = "cosine" if options.lr_schedule == "cosine" else "linear"
    decay = f"{shape} decay to {options.min_lr:.1e} at step {options.lr_decay_iters:,}"
    return f"{rise}{stable}, {decay}{earlier if options.max_iters < options.lr_decay_iters else ''}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _interval(steps: int) -> str:
    return f"every {_plural(steps, 'step')}" if steps > 1 else "every step" if steps else "at the end"


def start_record(trainer: Trainer, command: str, machine: dict[str, str], losses: dict[str, float]) -> JsonObject:
    """The record of a start for the report: command, options, model, data, machine, the validation loss before
    training, and the `losses` of n-gram models."""
    model, train = trainer.model, trainer.train
    return {
        "command": command,
        "baselines": losses,
        "options": dataclasses.asdict(trainer.options),
        **({} if trainer.loss_before is None else {"val_loss": trainer.loss_before}),
        "model": {"parameters": f"{model.n_parameters():,}", **dataclasses.asdict(model.config)},
        "data": {
            "path": str(train.path),
            "tokens": f"{train.tokens:,}",
            "validation tokens": f"{trainer.validation.tokens:,}",
            "tokenizer": trainer.tokenizer.name,
            "tokenizer fingerprint": trainer.tokenizer.fingerprint,
            "bytes per token": bytes_per_token(trainer.validation, trainer.tokenizer),
            "fingerprint": train.fingerprint,
        },
        "machine": {
            "device": model.backend.name(),
            "ranks": trainer.comm.size,
            "threads": threads.count(),
            **machine,
        },
    }


def typed_command(arguments: Sequence[str] | None, ranks: int) -> str:
    """The command line of this run as the user typed it, including the launcher if there are several ranks.

    arguments  the arguments of main; None for the arguments of the process.
    """
    own = sys.orig_argv if arguments is None else ["python", "train.py", *arguments]
    if ranks == 1:
        return shlex.join(own)
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # not Linux, or no permission
        words = [""]
    launcher = Path(words[0]).name
    if launcher in ("prterun", "mpirun", "mpiexec", "orterun", "mpiexec.hydra", "srun"):
        return shlex.join(["mpirun" if launcher == "prterun" else launcher, *words[1:]])  # Open MPI 5
    return shlex.join(["srun" if "SLURM_STEP_ID" in os.environ else "mpirun", "-n", str(ranks), *own])


class StepLines:
    """Prints a line for some of the steps: the first, the last, every --log-interval steps, skipped steps, and a step
    that ends PRINT_SECONDS or more after the previous line."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._printed = 0.0  # when the last line was printed, in seconds since this start
        self._first_end: float | None = None  # when the first step ended

    def add(self, row: JsonObject) -> None:
        """Print the line of a step if it is due."""
        options, step, now = self._trainer.options, row["step"], self._trainer.elapsed()
        ends = step in (self._trainer.first_step, options.max_iters)
        if ends or "skipped" in row or step % options.log_interval == 0 or now - self._printed >= PRINT_SECONDS:
            say_step(row, self._trainer, self._seconds_left(step, now))
            self._printed = now
        if self._first_end is None:
            self._first_end = now

    def _seconds_left(self, step: int, now: float) -> float | None:
        """The estimated time from this step to the end. The first step, which compiles and allocates, is excluded."""
        if self._first_end is None:
            return None
        per_step = (now - self._first_end) / (step - self._trainer.first_step)
        return per_step * (self._trainer.options.max_iters - step)


def say_step(row: JsonObject, trainer: Trainer, seconds_left: float | None) -> None:
    """Print the line of a step with the estimated remaining time, if known. For a skipped step, print the reason."""
    steps = trainer.options.max_iters
    if "skipped" in row:
        say(
            f"step {row['step']:,}/{steps:,} | skipped: the loss is {row['loss']} and the gradient norm "
            f"{row['grad_norm']}; the weights are unchanged"
        )
        for line in trainer.explanation if row["step"] == trainer.first_skipped else ():
            say(f"  {line}")
        return
    left = "" if seconds_left is None else f" | eta {clock(seconds_left)}"
    comm = f" | comm {1000 * row['comm_seconds']:,.0f} ms" if row["comm_seconds"] else ""
    update = f" | {trainer.options.optimizer} {1000 * row['optimizer_seconds']:,.0f} ms" if trainer.profiler else ""
    mfu = f" | {100 * row['mfu']:.0f}% MFU" if "mfu" in row else ""
    say(
        f"step {row['step']:,}/{steps:,} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
        f"{1000 * row['seconds']:,.0f} ms{update}{comm} | {row['tokens_per_s']:,.0f} tok/s{mfu}{left}"
    )


def say_first_loss(loss: float) -> None:
    """Print the validation loss before the first step."""
    say(f"step 0: validation loss {loss:.4f}, before training")


def say_tasks(row: JsonObject, questions: Questions) -> None:
    """Print a line for each task that has results in a row of the log."""
    for task, _ in questions:
        prefix = f"{task.name}_"
        results = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        say(f"  {describe_task(task, results)}")


def say_sample(val_loss: float, is_best: bool, text: str) -> None:
    """Print the loss of an evaluation, and a sample with control characters escaped."""
    say(f"  validation loss {val_loss:.4f}{' (the best so far)' if is_best else ''}. A sample:")
    shown = console.visible(text) or "(empty: the model generated no visible text)"
    say(console.wrapped(shown, console.terminal_width(), indent="    "))


def say_finished(out: Path, steps: int) -> None:
    """Print that the run is complete, and what to do next."""
    say(f"the run in {out}/ is already finished ({steps:,} steps). {sample_command(out)} samples from it;")
    say(f"--max-iters {2 * steps} continues it, --fresh starts a new run (the folder is renamed, not deleted).")


def say_early_stop(trainer: Trainer) -> None:
    """Print why training ends before the last step."""
    stop, best = _plural(trainer.options.early_stop, "evaluation"), trainer.progress.best
    assert best is not None
    say(f"early stop: no lower validation loss in {stop} since step {best['step']:,}; --early-stop 0 continues the run")


def say_end(trainer: Trainer, written: Path | None, page: Path) -> None:
    """Print how training ended, and what to do next."""
    progress, out = trainer.progress, trainer.folder.path
    if trainer.profiler and trainer.profiler.steps:
        say("\n".join(trainer.profiler.table()))
    if trainer.stopping:
        kept = f"saved in {written}; {resume_command(out)} resumes the run" if written else "nothing to save"
        say(f"stopped after step {progress.step:,}, {kept}")
        return
    best = progress.best
    loss = (
        f"best validation loss {best['val_loss']:.4f} at step {best['step']:,}"
        if best
        else "no validation loss was finite"
    )
    before = "" if trainer.loss_before is None else f" ({trainer.loss_before:.4f} before training)"
    say(f"done: {progress.step:,} steps in {clock(trainer.elapsed())}, {loss}{before}, saved in {written}")
    say(f"report: {page} (curves and samples)")
    say(f"next: {sample_command(out, suggested_prompt(trainer.validation, trainer.tokenizer))}")


def suggested_prompt(data: TokenDataset, tokenizer: Tokenizer) -> str:
    """The first words of a line of the data, preferably a line that begins with three words of letters and a capital.
    Returns "" if no line has printable text."""
    text = tokenizer.decode(data.read(0, min(data.tokens, PROMPT_TOKENS)).tolist())
    for end in tokenizer.end_ids:
        text = text.replace(tokenizer.decode([end]), "\n")
    lines = text.splitlines()
    lines = lines[1:] or lines  # the first line may be incomplete
    starts = [" ".join(line.split()[:3]) for line in lines if len(line.split()) > 3]
    plain = [start for start in starts if len(start) <= PROMPT_LENGTH and all(map(str.isalpha, start.split()))]
    if plain:
        return min(plain, key=lambda start: not start[0].isupper())
    shortened = (textwrap.shorten(line, PROMPT_LENGTH, placeholder="") or line[:PROMPT_LENGTH] for line in lines)
    return next((s for s in shortened if s.strip() and s.isprintable() and not s.startswith("-")), "")


def sample_command(out: Path, prompt: str = "") -> str:
    """The command that samples from a run."""
    command = f"{console.script('sample')} --checkpoint {shlex.quote(str(out))}"
    return f"{command} -p {console.quoted(prompt)}" if prompt else command


def resume_command(out: Path) -> str:
    """The command that resumes a run."""
    return console.script("train") + ("" if out == Path(Options.out_dir) else f" --out-dir {shlex.quote(str(out))}")
