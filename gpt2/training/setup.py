"""Sets up a run before its first step: options, config, data, model and optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gpt2 import console
from gpt2.config import BYTE_PRESETS, GPT2Config
from gpt2.formats import model_file
from gpt2.language_model import LanguageModel, ModelConfig
from gpt2.memory_model import Step, describe_need, largest_batch, needed
from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer
from gpt2.training import ranks
from gpt2.training.dataset import TokenDataset, find_dataset
from gpt2.training.display import say, say_first_loss
from gpt2.training.exchange import UNKNOWN_DATA
from gpt2.training.options import (
    FIXED_OPTIONS,
    MODEL_SIZES,
    PART_OF_STEPS,
    Options,
    OptionValues,
    UsageError,
    check_optimizer,
    check_schedule,
    default_options,
    fit_to_data,
    flag,
    model_config,
    resolve_options,
)
from gpt2.training.run import Progress, RunFolder, RunOptions, RunState
from gpt2.training.tasks import TASKS, Questions, load_items
from gpt2.training.trainer import Trainer
from tinygrad2 import blas, machine, optim, threads
from tinygrad2.backend import get_backend
from tinygrad2.distributed import Comm
from tinygrad2.precision import Precision

Splits = tuple[TokenDataset, TokenDataset, Tokenizer]


def new_run(given: OptionValues) -> tuple[Options, GPT2Config, RunOptions]:
    """The options and the model config of a new run, from the given options."""
    if "init" in given:
        if extra := [flag(name) for name in ("preset", *MODEL_SIZES) if name in given]:
            raise UsageError(f"--init determines the sizes of the model; remove {' and '.join(extra)}")
        config = model_file.load_config(model_file.find_model(Path(given["init"]), say))
    else:
        config = model_config(given)
    defaults = default_options(given, config)
    options = resolve_options(given, config, defaults)
    check_optimizer(given, options.optimizer)
    check_schedule(given)
    if options.block_size > config.n_positions:
        raise UsageError(
            f"--block-size {options.block_size} is longer than the model's context of {config.n_positions} tokens"
        )
    return options, _with_dropout(config, options), RunOptions(given, defaults)


def resumed_run(given: OptionValues, saved: RunState) -> tuple[Options, GPT2Config, RunOptions]:
    """The options and the model config of a resumed run. Options given now take precedence over earlier options."""
    config = model_file.load_config(saved.folder)
    merged = {**saved.options, **given}
    first_defaults = saved.defaults or default_options(saved.options, config, earlier=True)
    # The defaults are those of the first start, unless a recipe is given now. It applies to options never given before.
    defaults = default_options(merged, config) if "recipe" in given else first_defaults
    before = resolve_options(saved.options, config, first_defaults)
    options = resolve_options(merged, config, defaults)
    check_optimizer(given, options.optimizer)
    check_schedule(given)
    for name in FIXED_OPTIONS:
        old, new = getattr(before, name), getattr(options, name)
        if old != new and not (name == "dtype" and Precision.of(old).parameters == Precision.of(new).parameters):
            raise UsageError(
                f"{saved.folder.parent}/ contains a run with {flag(name)} {old}; it cannot be resumed with {new}. "
                f"Use another --out-dir, or --fresh to start a new run (the folder is renamed, not deleted)"
            )
    say(f"resuming from {saved.folder}, step {saved.progress.step:,}")
    notes = [] if {"learning_rate", "lr_schedule"} & given.keys() else _rate_notes(before, options, saved.progress.step)
    return options, _with_dropout(config, options), RunOptions(merged, dict(defaults), notes)


def _rate_notes(before: Options, options: Options, step: int) -> list[str]:
    """A note if the learning rate increases or drops after `step` because the resumed run has another schedule."""
    was, now = before.learning_rate_at(max(0, step - 1)), options.learning_rate_at(step)
    kept = before.learning_rate_at(step)
    if step < before.warmup_iters or kept / 1.1 <= now <= 1.1 * was:
        return []
    keep = (
        f"--lr-decay-iters {before.lr_decay_iters} keeps it at {kept:.1e}"
        if kept
        else "--learning-rate X sets a lower peak"
    )
    change = "increases again" if now > was else "drops"
    return [
        f"rate       the learning rate was {was:.1e} at step {step:,} and {change} to {now:.1e}, because its decay now "
        f"ends at step {options.lr_decay_iters:,}; {keep}"
    ]


def _with_dropout(config: GPT2Config, options: Options) -> GPT2Config:
    """The config with the rate --dropout, if given, for embeddings, attention and residuals."""
    if options.dropout is None:
        return config
    rate = options.dropout
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


def settle_options(options: Options, run_options: RunOptions, saved: RunState | None, ranks: int) -> None:
    """Set the options that depend on other options, the number of ranks, the device or the processor.

    Raises UsageError if options contradict each other.
    """
    if options.min_lr > options.learning_rate:
        raise UsageError(f"--min-lr {options.min_lr:g} is more than --learning-rate {options.learning_rate:g}")
    if options.early_stop and not options.eval_interval:
        raise UsageError("--early-stop needs evaluations during the run; expected an --eval-interval of 1 or more")
    if note := options.fit_batch(run_options.options, ranks):
        run_options.notes.append(f"batch      {note}")
    if "total_batch_size" not in run_options.options:  # recorded, so that it is the same on any number of ranks
        run_options.defaults["total_batch_size"] = options.total_batch_size
    settle_precision(options, run_options, saved)
    if options.threads:
        threads.set_count(options.threads)


def settle_precision(options: Options, run_options: RunOptions, saved: RunState | None) -> None:
    """Use float32 if the device does not support --dtype, or supports it only with slower arithmetic.

    A new run records this, and uses float32 wherever it is resumed. A run that was started in the slower precision
    keeps it.
    """
    backend = get_backend(options.device)
    reason = backend.unsupported_reason(options.dtype)
    slow = None if reason else backend.slow_reason(options.dtype)
    begun = saved is not None and saved.options.get("dtype") == options.dtype
    if slow and begun:
        say(f"--dtype {options.dtype}: {slow}; products are computed in float32 from the same values, so the run is "
            f"slower than with --dtype float32")  # fmt: skip
    elif reason or slow:
        say(f"--dtype {reason or f'{options.dtype}: {slow}'}; computing in float32")
        options.dtype = "float32"
        if not begun:
            run_options.options["dtype"] = options.dtype


def choose_blas(options: Options, run_options: RunOptions, saved: RunState | None, comm: Comm) -> None:
    """Choose the BLAS library. A resumed run on the same processor uses the same library again, since another library
    rounds differently. Otherwise, the fastest is used. Rank 0 decides for all ranks that have the same processor."""

    if get_backend(options.device).cuda:
        return

    def decide() -> tuple[str, str]:
        if saved and saved.blas and saved.blas["processor"] == machine.processor_model():
            blas.use(saved.blas["name"])
        return machine.processor_model(), blas.chosen().name

    processor, name = comm.from_root(decide)
    if processor == machine.processor_model():
        blas.use(name)
    title = blas.chosen().title
    run_options.blas = {"name": blas.chosen().name, "title": title, "processor": machine.processor_model()}
    if saved and saved.blas and (saved.blas["title"], saved.blas["processor"]) != (title, machine.processor_model()):
        elsewhere = "" if saved.blas["processor"] == machine.processor_model() else " on another processor"
        note = f"products   until now by {saved.blas['title']}{elsewhere}, from now on by {title}: rounding differs"
        run_options.notes.append(note)


def fit_options(options: Options, run_options: RunOptions, data_tokens: int) -> None:
    """Limit the defaults of a new run based on the size of its data (see fit_to_data)."""
    given, defaults = run_options.options, run_options.defaults
    notes = fit_to_data(given, defaults, options.total_batch_size or 1, data_tokens)
    for name in ("max_iters", *PART_OF_STEPS):
        setattr(options, name, given.get(name, defaults[name]))
    options.lr_decay_iters = given.get("lr_decay_iters", options.max_iters)
    if notes:
        run_options.notes.append(f"chosen     {', '.join(notes)}")


def open_data(options: Options, saved: RunState | None) -> Splits:
    """The training split, the validation split, and their tokenizer.

    Raises UsageError if a resumed run was trained on other data.
    """
    if options.data is None:
        raise UsageError(
            f"--data is missing: prepare a data set, for example with `{console.script('prepare')} my.txt --out "
            f"data/mine`, then use --data mine"
        )
    path = find_dataset(options.data)
    data, validation = TokenDataset.open(path, "train"), TokenDataset.open(path, "val")
    fewest = options.block_size + 1
    if (shortest := min(data.tokens, validation.tokens)) < fewest:
        shorter = f"--block-size {shortest - 1} or less, or " if shortest > 1 else ""
        raise UsageError(
            f"{path}: the splits have {data.tokens:,} (train) and {validation.tokens:,} (val) tokens; --block-size "
            f"{options.block_size:,} needs at least {fewest:,} in each: use {shorter}about "
            f"{math.ceil(fewest / max(1, shortest)):,} times as much text"
        )
    if saved and saved.data not in (UNKNOWN_DATA, data.fingerprint):
        raise UsageError(
            f"{data.path} is not the data that {saved.folder.parent}/ was trained on: it is another data set, or the "
            f"same data set prepared differently. Use another --out-dir, or --fresh to start a new run (the "
            f"folder is renamed, not deleted)"
        )
    return data, validation, data.tokenizer()


def load_questions(options: Options, comm: Comm) -> Questions:
    """The tasks of --eval, with their items."""
    named = [TASKS[name] for name in TASKS if name in (options.eval or "").split(",")]
    return [(task, comm.from_root(partial(load_items, task, limit=options.eval_items))) for task in named]


def build_trainer(
    options: Options, config: GPT2Config, data: Splits, folder: RunFolder, saved: RunState | None
) -> Trainer:
    """Create the Trainer, with an optimizer, and a model that is new or loaded from a checkpoint or a model file."""
    ranks.compare(folder.comm, options, data[:2])
    source = saved.folder if saved else model_file.find_model(Path(options.init), say) if options.init else None
    config, tokenizer = with_vocabulary(config, data[2], source, options.preset)
    data = (*data[:2], tokenizer)
    with explain_memory(config, options, folder.comm.size):
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


def trained(saved: RunState, options: Options) -> tuple[LanguageModel, Tokenizer]:
    """Load the model in a checkpoint, in the precision of its run, and its tokenizer."""
    dtype = "float32" if get_backend(options.device).unsupported_reason(options.dtype) else options.dtype
    return GPT2.from_pretrained(saved.folder, options.device, dtype), Tokenizer.load(saved.folder)


def measure_first_loss(trainer: Trainer) -> None:
    """Measure and print the validation loss of a new run before its first step."""
    if trainer.progress.step == 0:
        with explain_memory(trainer.model.config, trainer.options, trainer.comm.size):
            trainer.loss_before = trainer.validation_loss()
        say_first_loss(trainer.loss_before)


def build_optimizer(model: LanguageModel, options: Options, comm: Comm) -> optim.Optimizer:
    """Create the optimizer that --optimizer selects, for the model's parameters."""
    shared_by = comm if options.zero else None
    decay, betas, momentum = options.weight_decay, (options.beta1, options.beta2), options.momentum
    match options.optimizer:
        case "adamw":
            return optim.AdamW(model, betas=betas, weight_decay=decay, shared_by=shared_by)
        case "muon":
            return optim.Muon(
                model,
                model.hidden_matrices(),
                momentum=0.95 if momentum is None else momentum,
                betas=betas,
                weight_decay=decay,
                shared_by=shared_by,
                ranks=comm,
            )
        case "sgd":
            momentum, nesterov = 0.9 if momentum is None else momentum, options.nesterov
            return optim.SGD(model, momentum=momentum, nesterov=nesterov, weight_decay=decay, shared_by=shared_by)
    raise AssertionError(f"--optimizer {options.optimizer} has no branch here")


def with_vocabulary(
    config: GPT2Config, tokenizer: Tokenizer, source: Path | None, preset: str
) -> tuple[GPT2Config, Tokenizer]:
    """The config and the tokenizer of a model that will be trained on data of `tokenizer`.

    A new model with one of BYTE_PRESETS gets the vocabulary of the data. A loaded model keeps its vocabulary, its
    tokenizer and its begin and end ids: it may have added tokens that the data does not use, and more ids than its
    tokenizer (padding). Raises UsageError if the data's ids represent other tokens in the model.
    """
    ends = tokenizer.end_ids
    if source is None and (preset in BYTE_PRESETS or config.vocab_size == tokenizer.vocab_size):
        unknown = dataclasses.replace(config, bos_token_id=None, eos_token_id=None, vocab_size=tokenizer.vocab_size)
        return unknown.with_ids(tokenizer.begin if ends else None, ends), tokenizer
    if source is not None and tokenizer.vocab_size <= config.vocab_size:
        own = Tokenizer.for_model(source, config.vocab_size)
        if own.includes(tokenizer):
            return config.with_ids(own.begin if own.end_ids else None, own.end_ids), own
    raise UsageError(
        f"the data was prepared with tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens); expected the one of "
        f"{source or f'the preset {preset}'} ({config.vocab_size:,} tokens): prepare the data with the model's "
        f"tokenizer, --tokenizer {_tokenizer_option(source, config.vocab_size, tokenizer.name)}"
    )


def _tokenizer_option(source: Path | None, vocab_size: int, other: str) -> str:
    """The value of data/prepare.py's --tokenizer for a model, but never `other`, the name of a different tokenizer."""
    if source is None:
        return "gpt2"
    try:
        name = Tokenizer.for_model(source, vocab_size).name
    except (ValueError, OSError):
        name = ""
    folder = source.parent if source.is_file() else source
    return name if name in ("bytes", "gpt2") and name != other else str(folder)


def planned_step(config: GPT2Config, options: Options, ranks: int, cuda: bool) -> Step:
    """The step of a run, as input to memory_model.py."""
    return Step(
        config,
        options.batch_size,
        options.block_size,
        Precision.of(options.dtype),
        options.recompute,
        options.head_rows,
        options.optimizer,
        ranks,
        options.zero,
        cuda,
        threads.count(),
    )


@contextmanager
def explain_memory(config: ModelConfig, options: Options, ranks: int) -> Iterator[None]:
    """A context that converts a MemoryError to one that lists the memory that a step of GPT-2 needs, and suggests
    options that fit.

    It raises the error before the block runs if a step needs more memory than the device has.
    """
    if not isinstance(config, GPT2Config):
        yield
        return
    device = get_backend(options.device)
    memory = device.memory() or machine.memory()
    step = planned_step(config, options, ranks, device.cuda is not None)
    try:
        if memory and needed(step) > memory[1]:
            raise MemoryError
        yield
    except MemoryError:
        raise MemoryError(f"out of memory: {describe_need(step)}{_remedy(step, memory) if memory else ''}") from None


def _remedy(step: Step, memory: tuple[float, float]) -> str:
    """The free memory, and the options with which a step fits in the device's memory."""
    free, total = memory
    line = f"; {free / 1e9:.2f} of the device's {total / 1e9:.2f} GB are free"
    fitting = min(largest_batch(step, total), step.batch_size - 1)
    if fitting:
        return f"{line}; use --batch-size {fitting} or less, with --total-batch-size to keep the tokens per step"
    changes = (("--recompute block", {"recompute": "block"}), ("--head-rows 1024", {"head_rows": 1024}))
    helpful = [flag for flag, change in changes if needed(dataclasses.replace(step, **change)) < needed(step)]
    return f"{line}; use {', '.join([*helpful, 'a smaller model or --block-size'])}"
