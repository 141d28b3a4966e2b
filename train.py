"""Train GPT-2. Without options: the nano model on the documentation that ships inside Python, in about two minutes.

Goes on from the newest checkpoint in the out-dir where there is one. Ctrl-C finishes the step and saves.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer, run, weights
from gpt2.dataset import SampleOrder, TokenDataset, baselines, find_dataset
from gpt2.evaluate import mean_loss
from gpt2.generate import stream_text
from gpt2.options import FIXED, Options, UsageError, complete, flag, parse
from tinygrad2 import Key, optim
from tinygrad2.backend import Fetch


def main(argv: list[str] | None = None) -> int:
    given = parse(argv, __doc__)
    try:
        return train(given)
    except (ValueError, OSError, MemoryError) as error:
        print(f"train.py: {error}", file=sys.stderr)
    return 1


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a loss that is no number is said in one line, below
def train(given: dict[str, Any]) -> int:
    folder = run.RunFolder(given.get("out_dir", Options.out_dir), given.get("keep", Options.keep))
    if given.pop("fresh", False) and (aside := folder.set_aside()):
        say(f"{folder.path}/ is now {aside}/")
    saved = folder.resume(say)
    options, config = resumed(given, saved) if saved else fresh(given)
    progress = saved.progress if saved else run.Progress()
    if progress.step >= options.max_iters:
        say(f"{folder.path}/ has made its {progress.step:,} steps. {sample_command(folder)} samples from it;")
        say(f"--max-iters {2 * progress.step} trains on, --fresh starts anew (the folder is renamed, not deleted).")
        return 0
    micro_steps = accumulation(options)

    data, validation, tokenizer = open_data(options)
    config = with_vocabulary(config, tokenizer, options, saved)
    source = saved.folder if saved else options.init
    model = GPT2(config, seed=None if source else options.seed, device=options.device, dtype=options.dtype)
    if source:
        weights.load_into(model, source)
    optimizer = optim.AdamW(model, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)
    if saved:
        folder.load_optimizer(saved, optimizer)
    order = SampleOrder(data.windows(options.block_size), options.seed)
    kept = {**(saved.options if saved else {}), **given}  # what a later start of this run needs to know
    folder.start_log(progress.step)

    describe(options, model, tokenizer, data, validation, micro_steps, progress)
    stop = StopRequest()
    launched: deque[tuple[Fetch, dict[str, Any]]] = deque()  # steps whose loss has not come back from the device yet
    per_step, first, started = micro_steps * options.batch_size, progress.step, time.perf_counter()
    mark = started
    while progress.step < options.max_iters and not stop.requested:
        # One step: gradients of the mean loss over the micro-steps, clipped, then AdamW.
        loss: Any = 0.0
        with explained(config, options, model):
            for micro in range(micro_steps):
                first_sample = micro * options.batch_size
                indices = order.indices(progress.samples + first_sample, options.batch_size)
                tokens, targets = data.batch(indices, options.block_size)
                key = Key(options.seed, progress.step, first_sample)
                part = model.loss(tokens, targets, key) * (1 / micro_steps)
                part.backward()
                loss = loss + part.data
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
        progress.samples += per_step
        progress.tokens += per_step * options.block_size
        row = {"step": progress.step, "lr": optimizer.lr, "tokens": progress.tokens}
        launched.append((model.backend.fetch(loss, norm), row))

        # What came back is logged: on a GPU the host launches a step while the one before is still computed.
        last = progress.step == options.max_iters
        evaluating = last or every(options.eval_interval, progress.step)
        saving = last or every(options.save_interval, progress.step)
        waiting = evaluating or saving or stop.requested
        while launched and (waiting or len(launched) > 1 or launched[0][0].ready()):
            fetch, row = launched.popleft()
            loss_value, norm_value = fetch.get()
            finish(row, loss_value, norm_value, time.perf_counter() - mark, per_step * options.block_size, folder)
            mark = time.perf_counter()
            progress.seconds += row["seconds"]
            n = int(row["step"])
            if n in (first + 1, options.max_iters) or every(options.log_interval, n):
                say_step(row, options.max_iters, (mark - started) / (n - first))
            if not (evaluating and n == progress.step):
                folder.log(**row)
        if evaluating:
            value = mean_loss(model, validation, options.batch_size, options.block_size, options.eval_iters)
            folder.log(**row, val_loss=value)
            if progress.best is None or value < progress.best["val_loss"]:
                progress.best = {"step": progress.step, "val_loss": value}
                saving = True
            remark = " (the best so far)" if progress.best["step"] == progress.step else ""
            say(f"  validation loss {value:.4f}{remark}. A sample:")
            show_sample(model, tokenizer, options.seed + progress.step)
        if saving or stop.requested:
            written = folder.save(model, optimizer, tokenizer, progress, kept)
        if waiting:
            mark = time.perf_counter()

    if progress.step < options.max_iters:
        if stop.requested and progress.step == first:
            say(f"stopped before the first step; {restart_command(folder)} goes on.")
            return 0
        say(f"stopped after step {progress.step:,}, saved in {written}; {restart_command(folder)} goes on from there.")
        return 0
    run.plot(folder.path)
    assert progress.best is not None
    best = progress.best
    say(
        f"done: {progress.step:,} steps in {clock(time.perf_counter() - started)}, "
        f"best validation loss {best['val_loss']:.4f} at step {best['step']:,}, saved in {written}"
    )
    say(f"next: {sample_command(folder)}")
    return 0


def finish(row: dict[str, Any], loss: float, norm: float, seconds: float, tokens: int, folder: run.RunFolder) -> None:
    """Complete the row of a step with what came back from it. Raises ValueError where that is not finite."""
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise ValueError(
            f"step {row['step']}: the loss is {loss} and the gradient's norm {norm}; this step was not made. "
            f"{last_checkpoint(folder)} Try a lower --learning-rate (it was {row['lr']:.2e})"
        )
    lr, total = row.pop("lr"), row.pop("tokens")
    row.update(loss=loss, lr=lr, grad_norm=norm, seconds=round(seconds, 6))
    row.update(tokens_per_s=round(tokens / seconds, 1), tokens=total)


@contextmanager
def explained(config: GPT2Config, options: Options, model: GPT2) -> Iterator[None]:
    """Where memory runs out, say what a step needs."""
    try:
        yield
    except MemoryError:
        need = config.memory(options.batch_size, options.block_size, np.dtype(options.dtype).itemsize)
        parts = " + ".join(f"{value / 1e9:.2f} {name}" for name, value in need.items())
        there = model.backend.memory()
        raise MemoryError(
            f"out of memory: {options.batch_size} sequences of {options.block_size} tokens need {parts} = "
            f"{sum(need.values()) / 1e9:.2f} GB and temporary arrays"
            + (f"; {there[0] / 1e9:.2f} of the device's {there[1] / 1e9:.2f} GB are free" if there else "")
            + "; use a smaller --batch-size, with --total-batch-size for as many tokens a step"
        ) from None


def fresh(given: dict[str, Any]) -> tuple[Options, GPT2Config]:
    """The options and the model's config of a run that starts anew."""
    if "init" in given:
        if "preset" in given:
            raise UsageError("--init brings the sizes of its model; leave --preset out")
        config = weights.load_config(given["init"])
    else:
        config = GPT2Config.preset(given.get("preset", Options.preset))
    options = complete(given, config)
    if options.block_size > config.n_positions:
        raise UsageError(
            f"--block-size {options.block_size} is longer than the model's context of {config.n_positions} tokens"
        )
    if options.dropout is not None:
        rate = options.dropout
        config = dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    return options, config


def resumed(given: dict[str, Any], saved: run.Saved) -> tuple[Options, GPT2Config]:
    """The options and the config of a run that goes on: as it was started, but for what is given now."""
    config = weights.load_config(saved.folder)
    before, options = complete(saved.options, config), complete({**saved.options, **given}, config)
    for name in FIXED:
        was, asked = getattr(before, name), getattr(options, name)
        if was != asked:
            raise UsageError(
                f"{saved.folder.parent}/ holds a run with {flag(name)} {was}; it cannot go on with {asked}. Use "
                f"another --out-dir, or --fresh to start anew (the folder is renamed, not deleted)"
            )
    if options.dropout is not None:
        rate = options.dropout
        config = dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    say(f"going on from {saved.folder}, step {saved.progress.step:,}")
    return options, config


def accumulation(options: Options) -> int:
    """Micro-steps per step, from the tokens that a step is to have."""
    micro = options.batch_size * options.block_size
    total = options.total_batch_size or micro
    if total % micro:
        lower = total // micro * micro
        near = f"{lower:,} or {lower + micro:,}" if lower else f"{micro:,}"
        raise UsageError(
            f"--total-batch-size {total:,} is no multiple of --batch-size {options.batch_size} x --block-size "
            f"{options.block_size} = {micro:,} tokens; the nearest that is: {near}"
        )
    return total // micro


def open_data(options: Options) -> tuple[TokenDataset, TokenDataset, Tokenizer]:
    """The training and the validation split, and the tokenizer that made them."""
    name = options.data or ("pydoc" if options.preset == "nano" and not options.init else None)
    if name is None:
        raise UsageError(
            "no data set is named: make one, such as `python data/prepare.py my.txt --out data/mine`, then --data mine"
        )
    embedded = Path("data/pydoc")
    if name == "pydoc" and not embedded.exists():
        say(f"no data yet: preparing the documentation inside this Python as {embedded}")
        prepare(["pydoc"], "bytes", embedded)
    path = find_dataset(name)
    return TokenDataset.open(path, "train"), TokenDataset.open(path, "val"), Tokenizer.load(str(path))


def with_vocabulary(config: GPT2Config, tokenizer: Tokenizer, options: Options, saved: run.Saved | None) -> GPT2Config:
    """The config with the data's vocabulary, which a new nano takes over and every other model must have already."""
    source = saved.folder if saved else options.init
    if source is None and options.preset == "nano":
        return dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    same = config.vocab_size == tokenizer.vocab_size
    if source is not None and same:
        same = Tokenizer.for_model(source, config.vocab_size).fingerprint == tokenizer.fingerprint
    if not same:
        raise UsageError(
            f"the data was made with the tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens), which is not "
            f"that of {source or f'the preset {options.preset}'} ({config.vocab_size:,} tokens); prepare the data with "
            f"the model's tokenizer"
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
) -> None:
    """Say what is about to happen, before it happens."""
    c = model.config
    name = options.init or options.preset
    per_step = micro_steps * options.batch_size * options.block_size
    epochs = options.max_iters * per_step / data.tokens
    say(
        f"model     {name}: {model.n_parameters():,} parameters ({c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads)"
        f", {options.dtype} on {model.backend.device} ({os.cpu_count()} cores)"
    )
    say(f"data      {data.tokens:,} tokens to train on, {validation.tokens:,} to validate ({tokenizer.name})")
    say(
        f"batch     {options.batch_size} sequences x {options.block_size} tokens x {micro_steps} micro-steps = "
        f"{per_step:,} tokens a step; {options.max_iters:,} steps are {epochs:.2f} epochs"
    )
    intervals = (("evaluate", options.eval_interval), ("save", options.save_interval))
    plan = [f"{what} {f'every {n:,} steps' if n else 'at the end'}" for what, n in intervals]
    say(f"schedule  {', '.join(plan)}; the best and the last {options.keep} checkpoints are kept in {options.out_dir}/")
    if progress.step == 0:
        losses = baselines(data, validation)
        say(
            "baselines "
            + ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
            + " nats a token (validation)"
        )


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second acts at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        say("finishing this step, then saving (once more to stop at once)")


def show_sample(model: GPT2, tokenizer: Tokenizer, seed: int) -> None:
    pieces = stream_text(model, tokenizer, [tokenizer.end_of_text], 160, temperature=0.8, top_k=50, seed=seed)
    text = "".join(piece for _, piece in pieces)
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)  # bytes could steer the terminal
    say("".join(f"    {line}\n" for line in text.strip().splitlines()).rstrip("\n"))


def say_step(row: dict[str, Any], steps: int, seconds_each: float) -> None:
    say(
        f"step {row['step']:,}/{steps:,} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
        f"{1000 * row['seconds']:,.0f} ms | {row['tokens_per_s']:,.0f} tok/s | "
        f"eta {clock(seconds_each * (steps - row['step']))}"
    )


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def last_checkpoint(folder: run.RunFolder) -> str:
    saved = folder.resume(lambda line: None)
    return f"The last checkpoint is {saved.folder}." if saved else "There is no checkpoint yet."


def sample_command(folder: run.RunFolder) -> str:
    where = "" if folder.path == Path(Options.out_dir) else f" --checkpoint {folder.path}"
    return f'python sample.py{where} -p "The function returns"'


def restart_command(folder: run.RunFolder) -> str:
    return "python train.py" + ("" if folder.path == Path(Options.out_dir) else f" --out-dir {folder.path}")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
