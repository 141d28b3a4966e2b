"""Train GPT-2. Without options: the nano model on the documentation that ships inside Python, in about two minutes.

Goes on from the newest checkpoint in the out-dir where there is one. Ctrl-C finishes the step and saves.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt2 import console

    console.begin()

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer, doctor, report
from gpt2.config import BYTE_PRESETS
from gpt2.console import discard_output
from gpt2.evaluate import describe_task, evaluate_task, mean_loss
from gpt2.formats import huggingface
from gpt2.generate import stream_text
from gpt2.training import run
from gpt2.training.dataset import SampleOrder, TokenDataset, baselines, find_dataset
from gpt2.training.options import FIXED, Options, UsageError, complete, flag, parse
from gpt2.training.tasks import TASKS, load
from tinygrad2 import Key, distributed, optim, threads
from tinygrad2.backend import PRECISIONS, Fetch, get_backend
from tinygrad2.distributed import Comm
from tinygrad2.profiler import Profiler


def main(argv: list[str] | None = None) -> int:
    try:
        comm = distributed.world()
        comm.silence_other_ranks()
        return train(comm.from_root(lambda: parse(argv, __doc__)), comm)
    except (ValueError, OSError, MemoryError) as error:
        return distributed.fail(f"train.py: {one_line(error)}", 1)
    except KeyboardInterrupt:
        return distributed.fail("train.py: interrupted; what was saved before is as it was", 130)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a loss that is no number is said in one line, below
def train(given: dict[str, Any], comm: Comm) -> int:
    folder = run.RunFolder(given.get("out_dir", Options.out_dir), given.get("keep", Options.keep), comm)
    renew = given.pop("fresh", False)
    saved = None if renew else folder.resume(say)
    options, config = resumed(given, saved) if saved else fresh(given)
    progress = saved.progress if saved else run.Progress()
    if progress.step >= options.max_iters:
        say(f"{folder.path}/ has made its {progress.step:,} steps. {sample_command(folder)} samples from it;")
        say(f"--max-iters {2 * progress.step} trains on, --fresh starts anew (the folder is renamed, not deleted).")
        return 0
    if options.min_lr > options.learning_rate:
        raise UsageError(f"--min-lr {options.min_lr:g} is more than --learning-rate {options.learning_rate:g}")
    micro_steps = accumulation(options, comm.size)
    options.total_batch_size = micro_steps * comm.size * options.batch_size * options.block_size
    if lacks := get_backend(options.device).lacks(options.dtype):
        say(f"--dtype {lacks}; computing in float32")
        options.dtype = "float32"
    writer = run.tensorboard_writer() if options.tensorboard else None
    if options.threads:
        threads.set_count(options.threads)
    data, validation, tokenizer = open_data(options, comm)
    asked = [TASKS[name] for name in TASKS if name in (options.eval or "").split(",")]
    questions = [(task, comm.from_root(partial(load, task, limit=options.eval_items))) for task in asked]
    if saved and saved.data != data.fingerprint:
        raise UsageError(
            f"{data.path} is not the data that {folder.path}/ was trained on so far: it is another set, or was "
            f"prepared anew. Use another --out-dir, or --fresh to start anew (the folder is renamed, not deleted)"
        )
    source = saved.folder if saved else run.find_model(Path(options.init), say) if options.init else None
    config = with_vocabulary(config, tokenizer, source, options.preset)
    with explained(config, options):
        model = GPT2(
            config,
            seed=None if source else options.seed,
            device=options.device,
            dtype=options.dtype,
            recompute=options.recompute,
            head_rows=options.head_rows,
        )
        if source:
            huggingface.load_into(model, source)
        optimizer = optim.AdamW(
            model,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            shared_by=comm if options.zero else None,
        )
        sums = optim.GradientSum(model, comm, share_only=options.zero)
        if saved:
            folder.load_optimizer(saved, optimizer)
    order = SampleOrder(data.windows(options.block_size), options.seed)
    # What a later start of this run needs to know: a step has as many tokens on another number of ranks.
    kept = {**(saved.options if saved else {}), **given, "total_batch_size": options.total_batch_size}
    if renew and (aside := folder.set_aside()):
        say(f"{folder.path}/ is now {aside}/")

    with folder.opened(progress.step, writer), StopRequest(speak=comm.size == 1) as stop:
        folder.log_start(progress.step, given=kept, **circumstances(options, model, tokenizer, data, validation, comm))
        page = report.Writer(folder.path, say)
        comm.from_root(partial(describe, options, model, tokenizer, data, validation, micro_steps, progress, comm))
        launched: deque[Launched] = deque()  # steps whose loss has not come back from the device yet
        first, started, stopping, written = progress.step, time.perf_counter(), False, None
        profiler = Profiler(model.backend) if options.profile else None
        mark, waited = started, comm.waited
        peak = model.backend.peak(model.precision)  # of this rank's GPU; each rank has one
        while progress.step < options.max_iters and not stopping:
            # The first step compiles and takes memory: it is not what the others are like.
            profiled = profiler if profiler and progress.step > first else nullcontext()
            with explained(config, options), profiled:
                launched.append(take_step(model, optimizer, data, order, options, micro_steps, progress, sums, stop))
            stopping = launched[-1].stopping
            if progress.step == first + 1 or every(COMPARE_INTERVAL, progress.step):
                model.arena().check_equal(comm)
            last = progress.step == options.max_iters
            evaluating = last or every(options.eval_interval, progress.step)
            saving = last or stopping or every(options.save_interval, progress.step)

            # What came back is logged: on a GPU the host launches a step while the one before is still computed.
            while launched and (evaluating or saving or len(launched) > 1 or launched[0].result.ready()):
                row = launched.popleft().finish(time.perf_counter() - mark, comm.waited - waited, folder)
                mark, waited = time.perf_counter(), comm.waited
                progress.seconds += row["seconds"]
                if peak is not None:
                    flops = row["tokens_per_s"] * model.config.flops_per_token(options.block_size)
                    row["mfu"] = round(flops / (peak * 1e12 * comm.size), 4)
                n = row["step"]
                if n in (first + 1, options.max_iters) or every(options.log_interval, n):
                    say_step(row, options.max_iters, (mark - started) / (n - first) if n > first + 1 else None)
                if evaluating and n == progress.step:
                    sizes = options.batch_size, options.block_size, options.eval_iters
                    value = mean_loss(model, validation, *sizes, comm)
                    row["val_loss"] = value
                    for task, items in questions:
                        figures = evaluate_task(task, model, tokenizer, items, options.batch_size, comm)
                        row |= {f"{task.name}_{key}": figure for key, figure in figures.items()}
                        say(f"  {describe_task(task, figures)}")
                    if progress.best is None or value < progress.best["val_loss"]:
                        progress.best = {"step": n, "val_loss": value}
                        saving = True
                folder.log(**row)
            if saving:
                written = folder.save(model, optimizer, tokenizer, progress, kept, data.fingerprint)
            if evaluating:
                assert progress.best is not None
                remark = " (the best so far)" if progress.best["step"] == progress.step else ""
                say(f"  validation loss {value:.4f}{remark}. A sample:")
                sample = comm.from_root(partial(make_sample, model, tokenizer, options.seed + progress.step))
                say("".join(f"    {line}\n" for line in report.printable(sample).splitlines()).rstrip("\n"))
                folder.log_sample(progress.step, sample)
            if evaluating or stopping:
                comm.from_root(partial(page.update, always=last or stopping))
            if evaluating or saving:
                mark, waited = time.perf_counter(), comm.waited

    if profiler and profiler.steps:
        say("\n".join(profiler.table()))
    if progress.step < options.max_iters:
        say(f"stopped after step {progress.step:,}, saved in {written}; {restart_command(folder)} goes on from there.")
        return 0
    assert progress.best is not None
    say(
        f"done: {progress.step:,} steps in {clock(time.perf_counter() - started)}, best validation loss "
        f"{progress.best['val_loss']:.4f} at step {progress.best['step']:,}, saved in {written}"
    )
    say(f"its curves and samples: {folder.path / report.REPORT}")
    say(f"next: {sample_command(folder)}")
    return 0


@dataclass
class Launched:
    """A step that the device has been told to make: its loss and gradient norm are on their way back."""

    step: int
    lr: float
    step_tokens: int
    tokens: int
    stopping: bool  # a rank was told to stop
    result: Fetch

    def finish(self, seconds: float, waited: float, folder: run.RunFolder) -> dict[str, Any]:
        """The row for the log. Raises ValueError where the loss or the norm is not finite."""
        loss, norm = self.result.get()
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise ValueError(
                f"step {self.step}: the loss is {loss} and the gradient's norm {norm}; this step was not made. "
                f"{last_checkpoint(folder)} Try a lower --learning-rate (it was {self.lr:.2e})"
            )
        return {
            "step": self.step,
            "loss": loss,
            "lr": self.lr,
            "grad_norm": norm,
            "seconds": round(seconds, 6),
            "comm_seconds": round(waited, 6),
            "tokens_per_s": round(self.step_tokens / seconds, 1),
            "tokens": self.tokens,
        }


def take_step(
    model: GPT2,
    optimizer: optim.AdamW,
    data: TokenDataset,
    order: SampleOrder,
    options: Options,
    micro_steps: int,
    progress: run.Progress,
    sums: optim.GradientSum,
    stop: StopRequest,
) -> Launched:
    """One step: gradients of the mean loss over all ranks' micro-steps, clipped, then AdamW."""
    rank, size = sums.comm.rank, sums.comm.size
    loss: Any = 0.0
    for micro in range(micro_steps):
        first_sample = (micro * size + rank) * options.batch_size
        indices = order.indices(progress.samples + first_sample, options.batch_size)
        tokens, targets = data.batch(indices, options.block_size)
        part = model.loss(tokens, targets, Key(options.seed, progress.step, first_sample)) * (1 / (micro_steps * size))
        if micro == micro_steps - 1:
            sums.start()
        part.backward()
        loss = loss + part.data
    loss, step_tokens, stopping = sums.finish(
        loss, micro_steps * options.batch_size * options.block_size, stop.requested
    )
    optimizer.lr = optim.cosine(
        progress.step,
        lr=options.learning_rate,
        min_lr=options.min_lr,
        warmup=options.warmup_iters,
        decay_steps=options.lr_decay_iters,
    )
    norm = optimizer.step(max_norm=options.grad_clip or None)
    optimizer.zero_grad()
    progress.step += 1
    progress.samples += micro_steps * size * options.batch_size
    progress.tokens += int(step_tokens)
    fetch = model.backend.fetch(loss, norm)
    return Launched(progress.step, optimizer.lr, int(step_tokens), progress.tokens, bool(stopping), fetch)


@contextmanager
def explained(config: GPT2Config, options: Options) -> Iterator[None]:
    """Where memory runs out, say what a step needs."""
    try:
        yield
    except MemoryError:
        B, T = options.batch_size, options.block_size
        need = config.memory(B, T, options.dtype, options.recompute, options.head_rows)
        parts = " + ".join(f"{value / 1e9:.2f} {name}" for name, value in need.items())
        there = get_backend(options.device).memory()
        raise MemoryError(
            f"out of memory: {B} sequences of {T} tokens need {parts} = "
            f"{sum(need.values()) / 1e9:.2f} GB and temporary arrays"
            + (f"; {there[0] / 1e9:.2f} of the device's {there[1] / 1e9:.2f} GB are free" if there else "")
            + "; use a smaller --batch-size, with --total-batch-size for as many tokens a step"
            + (", or --recompute block" if options.recompute == "none" else "")
        ) from None


def fresh(given: dict[str, Any]) -> tuple[Options, GPT2Config]:
    """The options and the model's config of a run that starts anew."""
    if "init" in given:
        if "preset" in given:
            raise UsageError("--init brings the sizes of its model; leave --preset out")
        config = huggingface.load_config(run.find_model(Path(given["init"]), say))
    else:
        config = GPT2Config.preset(given.get("preset", Options.preset))
    options = complete(given, config)
    if options.block_size > config.n_positions:
        raise UsageError(
            f"--block-size {options.block_size} is longer than the model's context of {config.n_positions} tokens"
        )
    return options, with_dropout(config, options)


def resumed(given: dict[str, Any], saved: run.Saved) -> tuple[Options, GPT2Config]:
    """The options and the config of a run that goes on: as it was started, but for what is given now."""
    config = huggingface.load_config(saved.folder)
    before, options = complete(saved.options, config), complete({**saved.options, **given}, config)
    for name in FIXED:
        was, asked = getattr(before, name), getattr(options, name)
        if was != asked and not (name == "dtype" and PRECISIONS[was] == PRECISIONS[asked]):
            raise UsageError(
                f"{saved.folder.parent}/ holds a run with {flag(name)} {was}; it cannot go on with {asked}. Use "
                f"another --out-dir, or --fresh to start anew (the folder is renamed, not deleted)"
            )
    say(f"going on from {saved.folder}, step {saved.progress.step:,}")
    return options, with_dropout(config, options)


def with_dropout(config: GPT2Config, options: Options) -> GPT2Config:
    """The config with the dropout rate that was asked for, at all three places."""
    if options.dropout is None:
        return config
    rate = options.dropout
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


def accumulation(options: Options, ranks: int) -> int:
    """Micro-steps per step on every rank, from the tokens that a step is to have."""
    B, T = options.batch_size, options.block_size
    micro = B * T * ranks
    total = options.total_batch_size or micro
    if total % micro:
        lower = total // micro * micro
        near = f"{lower:,} or {lower + micro:,}" if lower else f"{micro:,}"
        fitting = [b for b in range(1, B) if total % (b * T * ranks) == 0]
        other = f", or --batch-size {fitting[-1]}" if fitting else ""
        if ranks > 1 and total % T == 0 and not fitting:
            sequences = total // T
            counts = [str(n) for n in range(1, min(sequences, 2 * ranks) + 1) if sequences % n == 0]
            other = f". Its {sequences:,} sequences divide over {', '.join(counts)} ranks"
        raise UsageError(
            f"--total-batch-size {total:,} is no multiple of {f'{ranks} ranks x ' * (ranks > 1)}--batch-size {B} x "
            f"--block-size {T} = {micro:,} tokens; the nearest that is: {near}{other}"
        )
    return total // micro


def open_data(options: Options, comm: Comm) -> tuple[TokenDataset, TokenDataset, Tokenizer]:
    """The training and the validation split, and the tokenizer that made them."""
    if options.data is None:
        raise UsageError(
            "no data set is named: make one, such as `python data/prepare.py my.txt --out data/mine`, then --data mine"
        )
    if options.data == "pydoc":
        comm.from_root(prepare_pydoc)
    path = find_dataset(options.data)
    data, validation = TokenDataset.open(path, "train"), TokenDataset.open(path, "val")
    for split in (data, validation):
        split.windows(options.block_size)  # raises now, not at the first evaluation, where there is not one
    return data, validation, data.tokenizer()


def prepare_pydoc() -> None:
    """Make the data set of the nano model, where it is not there yet."""
    embedded = Path("data/pydoc")
    if not embedded.exists():
        say(f"no data yet: preparing the documentation inside this Python as {embedded}")
        prepare(["pydoc"], "bytes", embedded)


def with_vocabulary(config: GPT2Config, tokenizer: Tokenizer, source: Path | None, preset: str) -> GPT2Config:
    """The config with the data's vocabulary, which a new small model takes over and every other must have already."""
    if source is None and preset in BYTE_PRESETS:
        return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    same = config.vocab_size == tokenizer.vocab_size
    if source is not None and same:
        same = Tokenizer.for_model(source, config.vocab_size).fingerprint == tokenizer.fingerprint
    if not same:
        raise UsageError(
            f"the data was made with the tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens), which is not "
            f"that of {source or f'the preset {preset}'} ({config.vocab_size:,} tokens); prepare the data with the "
            f"model's tokenizer"
        )
    return config


def describe(
    options: Options,
    model: GPT2,
    tokenizer: Tokenizer,
    data: TokenDataset,
    validation: TokenDataset,
    micro_steps: int,
    progress: run.Progress,
    comm: Comm,
) -> None:
    """Say what is about to happen, before it happens."""
    c = model.config
    name = options.init or options.preset
    per_step = options.total_batch_size or 0
    epochs = options.max_iters * per_step / data.tokens
    micro = f"{micro_steps} micro-step{'s' * (micro_steps > 1)}"
    ranks = f"{comm.size} ranks x " if comm.size > 1 else ""
    say(
        f"model     {name}: {model.n_parameters():,} parameters ({c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads)"
        f", {options.dtype} on {model.backend.device} ({ranks}{threads.count()} thread{'s' * (threads.count() > 1)})"
    )
    if comm.size > 1 and model.backend.device != "cpu":
        direct = comm.nccl(model.backend)
        say(f"sums      of gradients go {'from GPU to GPU (NCCL)' if direct else 'through host memory'}")
    if comm.idle_cores:
        hint = "mpirun --bind-to none frees them"
        say(f"cores     {comm.idle_cores} of this machine stay idle, since the ranks are bound to others; {hint}")
    say(f"data      {data.tokens:,} tokens to train on, {validation.tokens:,} to validate ({tokenizer.name})")
    say(
        f"batch     {ranks}{options.batch_size} sequences x {options.block_size} tokens x {micro} = "
        f"{per_step:,} tokens a step; {options.max_iters:,} steps are {epochs:.2f} epochs"
    )
    intervals = (("evaluate", options.eval_interval), ("save", options.save_interval))
    plan = [f"{what} {f'every {n:,} steps' if n else 'at the end'}" for what, n in intervals]
    say(f"schedule  {', '.join(plan)}; the best and the last {options.keep} checkpoints are kept in {options.out_dir}/")
    short = " (never reached: it is all warm-up)" if options.warmup_iters >= options.max_iters else ""
    say(
        f"rate      up to {options.learning_rate:.1e} in {options.warmup_iters:,} steps{short}, then down by a cosine "
        f"to {options.min_lr:.1e} at step {options.lr_decay_iters:,}"
    )
    if progress.step == 0:
        losses = baselines(data, validation)
        say(
            "baselines "
            + ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
            + " nats a token (validation)"
        )


def circumstances(
    options: Options, model: GPT2, tokenizer: Tokenizer, data: TokenDataset, validation: TokenDataset, comm: Comm
) -> dict[str, dict[str, Any]]:
    """How and where this start trains, for the report."""
    return {
        "options": dataclasses.asdict(options),
        "model": {"parameters": f"{model.n_parameters():,}", **dataclasses.asdict(model.config)},
        "data": {
            "path": str(data.path),
            "tokens": f"{data.tokens:,}",
            "validation tokens": f"{validation.tokens:,}",
            "tokenizer": tokenizer.name,
            "fingerprint": data.fingerprint,
        },
        "machine": {"device": model.backend.name(), "ranks": comm.size, "threads": threads.count(), **doctor.machine()},
    }


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request to stop after the step; the second acts at once."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, speak: bool):
        self.speak = speak

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before: dict[int, Any] = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
        if self.speak:
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"finishing this step, then saving (once more to stop at once)\n")


def make_sample(model: GPT2, tokenizer: Tokenizer, seed: int) -> str:
    pieces = stream_text(model, tokenizer, [tokenizer.end_of_text], 160, temperature=0.8, top_k=50, seed=seed)
    return "".join(piece for _, piece in pieces).strip()


def say_step(row: dict[str, Any], steps: int, seconds_each: float | None) -> None:
    comm = f" | comm {1000 * row['comm_seconds']:,.0f} ms" if row["comm_seconds"] else ""
    mfu = f" | {100 * row['mfu']:.0f} % MFU" if "mfu" in row else ""
    left = "" if seconds_each is None else f" | eta {clock(seconds_each * (steps - row['step']))}"
    say(
        f"step {row['step']:,}/{steps:,} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
        f"{1000 * row['seconds']:,.0f} ms{comm} | {row['tokens_per_s']:,.0f} tok/s{mfu}{left}"
    )


COMPARE_INTERVAL = 100  # steps between two looks whether all ranks still have the same parameters


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def last_checkpoint(folder: run.RunFolder) -> str:
    saved = folder.newest(lambda line: None)
    return f"The last checkpoint is {saved.folder}." if saved else "There is no checkpoint yet."


def sample_command(folder: run.RunFolder) -> str:
    return f'python sample.py --checkpoint {shlex.quote(str(folder.path))} -p "The function returns"'


def restart_command(folder: run.RunFolder) -> str:
    return "python train.py" + (
        "" if folder.path == Path(Options.out_dir) else f" --out-dir {shlex.quote(str(folder.path))}"
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def one_line(error: Exception) -> str:
    """What went wrong, with the file's name first where the operating system refused something."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}; what was saved before is as it was"
    return str(error)


def say(line: str) -> None:
    """Print a line. A screen that is gone (a closed pipe, a full disk behind it) must not end a run."""
    try:
        print(line, flush=True)
    except OSError:
        discard_output()


if __name__ == "__main__":
    sys.exit(console.run(main))
