"""What a run is made of before its first step: options, the model's config, data, the model and its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gpt2.config import BYTE_PRESETS, GPT2Config
from gpt2.formats import model_file
from gpt2.language_model import LanguageModel, ModelConfig
from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer
from gpt2.training.dataset import TokenDataset, find_dataset
from gpt2.training.display import say
from gpt2.training.options import (
    FIXED_OPTIONS,
    Options,
    UsageError,
    check_optimizer,
    default_options,
    flag,
    resolve_options,
)
from gpt2.training.run import Progress, Remembered, RunFolder, Saved
from gpt2.training.tasks import TASKS, Questions, load_items
from gpt2.training.trainer import Trainer
from tinygrad2 import optim, threads
from tinygrad2.backend import get_backend
from tinygrad2.distributed import Comm
from tinygrad2.precision import PRECISIONS

Splits = tuple[TokenDataset, TokenDataset, Tokenizer]


def new_run(given: dict[str, Any]) -> tuple[Options, GPT2Config, Remembered]:
    """The options and the model's config of a new run."""
    if "init" in given:
        if "preset" in given:
            raise UsageError("--init brings the sizes of its model; leave --preset out")
        config = model_file.load_config(model_file.find_model(Path(given["init"]), say))
    else:
        config = GPT2Config.preset(given.get("preset", Options.preset))
    defaults = default_options(given, config)
    options = resolve_options(given, config, defaults)
    check_optimizer(given, options.optimizer)
    if options.block_size > config.n_positions:
        raise UsageError(
            f"--block-size {options.block_size} is longer than the model's context of {config.n_positions} tokens"
        )
    return options, _with_dropout(config, options), Remembered(given, defaults)


def resumed_run(given: dict[str, Any], saved: Saved) -> tuple[Options, GPT2Config, Remembered]:
    """The options and the config of a resumed run: those that it was started with, then those given now."""
    config = model_file.load_config(saved.folder)
    told = {**saved.options, **given}
    first = saved.defaults or default_options(saved.options, config)
    # A recipe given now sets what the run was not told before; else the defaults are those that it started with.
    defaults = default_options(told, config) if "recipe" in given else first
    before, options = resolve_options(saved.options, config, first), resolve_options(told, config, defaults)
    check_optimizer(given, options.optimizer)
    for name in FIXED_OPTIONS:
        was, asked = getattr(before, name), getattr(options, name)
        if was != asked and not (name == "dtype" and PRECISIONS[was].parameters == PRECISIONS[asked].parameters):
            raise UsageError(
                f"{saved.folder.parent}/ holds a run with {flag(name)} {was}; it cannot be resumed with {asked}. "
                f"Use another --out-dir, or --fresh to start a new run (the folder is renamed, not deleted)"
            )
    say(f"resuming from {saved.folder}, step {saved.progress.step:,}")
    return options, _with_dropout(config, options), Remembered(told, defaults)


def _with_dropout(config: GPT2Config, options: Options) -> GPT2Config:
    """The config with the dropout rate that was asked for, at all three places."""
    if options.dropout is None:
        return config
    rate = options.dropout
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


def settle_options(options: Options, remembered: Remembered, ranks: int) -> None:
    """Check what depends on other options or on the device, and fill in the tokens of a step.

    Raises UsageError for options that contradict each other.
    """
    if options.min_lr > options.learning_rate:
        raise UsageError(f"--min-lr {options.min_lr:g} is more than --learning-rate {options.learning_rate:g}")
    options.total_batch_size = options.micro_steps(ranks) * ranks * options.batch_size * options.block_size
    remembered.options["total_batch_size"] = options.total_batch_size  # also on another number of ranks
    if reason := get_backend(options.device).unsupported_reason(options.dtype):
        say(f"--dtype {reason}; computing in float32")
        options.dtype = "float32"
    if options.threads:
        threads.set_count(options.threads)


def open_data(options: Options, saved: Saved | None) -> Splits:
    """The training and the validation split, and the tokenizer that made them.

    Raises UsageError where a resumed run was trained on other data.
    """
    if options.data is None:
        raise UsageError(
            "no data set is named: make one, such as `python data/prepare.py my.txt --out data/mine`, then --data mine"
        )
    path = find_dataset(options.data)
    data, validation = TokenDataset.open(path, "train"), TokenDataset.open(path, "val")
    for split in (data, validation):
        split.windows(options.block_size)  # raises now, not at the first evaluation, where there is not one
    if saved and saved.data != data.fingerprint:
        raise UsageError(
            f"{data.path} is not the data that {saved.folder.parent}/ was trained on so far: it is another set, or was "
            f"prepared again. Use another --out-dir, or --fresh to start a new run (the folder is renamed, not deleted)"
        )
    return data, validation, data.tokenizer()


def load_questions(options: Options, comm: Comm) -> Questions:
    """The tasks that --eval names, with their items."""
    named = [TASKS[name] for name in TASKS if name in (options.eval or "").split(",")]
    return [(task, comm.from_root(partial(load_items, task, limit=options.eval_items))) for task in named]


def build_trainer(
    options: Options, config: GPT2Config, data: Splits, folder: RunFolder, saved: Saved | None
) -> Trainer:
    """The model, new or from a checkpoint or a model file, its optimizer, and the Trainer that holds them."""
    source = saved.folder if saved else model_file.find_model(Path(options.init), say) if options.init else None
    config = with_vocabulary(config, data[2], source, options.preset)
    with explain_memory(config, options):
        model = GPT2(
            config,
            seed=None if source else options.seed,
            device=options.device,
            dtype=options.dtype,
            recompute=options.recompute,
            head_rows=options.head_rows,
        )
        if source:
            model_file.load_into(model, source)
        optimizer = build_optimizer(model, options, folder.comm)
        if saved:
            folder.load_optimizer(saved, optimizer)
        return Trainer(model, optimizer, options, data, folder, saved.progress if saved else Progress())


def build_optimizer(model: LanguageModel, options: Options, comm: Comm) -> optim.Optimizer:
    """The optimizer that --optimizer names, on the model's parameters."""
    shared_by = comm if options.zero else None
    decay, betas = options.weight_decay, (options.beta1, options.beta2)
    if options.optimizer == "sgd":
        momentum = 0.9 if options.momentum is None else options.momentum
        return optim.SGD(model, momentum=momentum, nesterov=options.nesterov, weight_decay=decay, shared_by=shared_by)
    if options.optimizer == "muon":
        momentum, matrices = 0.95 if options.momentum is None else options.momentum, model.hidden_matrices()
        places: dict[str, Any] = {"shared_by": shared_by, "ranks": comm}
        return optim.Muon(model, matrices, momentum=momentum, betas=betas, weight_decay=decay, **places)
    return optim.AdamW(model, betas=betas, weight_decay=decay, shared_by=shared_by)


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


@contextmanager
def explain_memory(config: ModelConfig, options: Options) -> Iterator[None]:
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
