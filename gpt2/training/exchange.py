"""Converts runs to and from nanoGPT checkpoints: optimizer state, step, best loss and options."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt2.config import GPT2Config
from gpt2.formats import huggingface
from gpt2.formats.stored import Stored, naming_file
from gpt2.formats.torch_optimizer import TrainingState
from gpt2.tokenizer import Tokenizer
from gpt2.training.options import Options, OptionValues, default_options, resolve_options, validate_options
from gpt2.training.run import OPTIMIZER, TRAINER, Best, Progress, RunState, read_state
from tinygrad2 import checkpoint
from tinygrad2.checkpoint import JsonObject

# Options with the same names in nanoGPT.
SAME_NAMES = (
    "batch_size",
    "block_size",
    "max_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
    "learning_rate",
    "min_lr",
    "warmup_iters",
    "lr_decay_iters",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
)
ACCUMULATION = "gradient_accumulation_steps"  # nanoGPT's option; the total over all ranks
UNKNOWN_DATA = ""  # the fingerprint of data that the file does not identify


def is_run(folder: Path) -> bool:
    """Whether a folder is a checkpoint of train.py that includes the state of its run."""
    return (folder / TRAINER).is_file() and (folder / OPTIMIZER).is_file()


def read_run(folder: Path, config: GPT2Config) -> TrainingState:
    """The state of the run in a checkpoint of train.py. Raises ValueError if its optimizer is not AdamW."""
    run = read_state(folder)
    defaults = run.defaults or default_options(run.options, config, earlier=True)
    options = resolve_options(run.options, config, defaults)
    if options.optimizer != "adamw":
        raise ValueError(f"{folder}: its optimizer is {options.optimizer}; nanoGPT supports only AdamW")
    with naming_file(folder / OPTIMIZER):
        moments = huggingface.read_safetensors(folder / OPTIMIZER)
    own = {name: getattr(options, name) for name in SAME_NAMES}
    micro_steps = max(1, (options.total_batch_size or 0) // (options.batch_size * options.block_size))
    return TrainingState(
        step=run.progress.step,
        best_val_loss=run.progress.best["val_loss"] if run.progress.best else None,
        moments=moments,
        optimizer_steps=run.optimizer_steps,
        learning_rate=options.learning_rate_at(max(0, run.progress.step - 1)),
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        options={**own, ACCUMULATION: micro_steps, "decay_lr": True, "dataset": Path(options.data or "").name},
        trainer=checkpoint.read_json(folder / TRAINER),
    )


def write_run(
    folder: Path, config: GPT2Config, arrays: dict[str, Stored], tokenizer: Tokenizer | None, state: TrainingState
) -> None:
    """Write an out-dir with one checkpoint, from which train.py can resume the run."""
    folder.mkdir()
    with checkpoint.writing(folder / checkpoint.name(state.step)) as partial:
        huggingface.write(partial, config, {name: stored.read() for name, stored in arrays.items()})
        if tokenizer is not None:
            tokenizer.save(partial)
        checkpoint.save_arrays(partial / OPTIMIZER, {name: stored.read() for name, stored in state.moments.items()})
        checkpoint.write_json(partial / TRAINER, state.trainer or _trainer(partial, state))
        read_state(partial)  # raises an error if train.py could not read it


def _trainer(folder: Path, state: TrainingState) -> JsonObject:
    """The contents of trainer.json for a run of another program, whose training data is unknown."""
    options = _options(state)
    tokens = options.get("total_batch_size", 0) * state.step
    best: Best | None = None
    if state.best_val_loss is not None:
        best = {"step": state.step, "val_loss": state.best_val_loss}
    progress = Progress(state.step, tokens // options.get("block_size", 1), tokens, 0.0, best)
    return RunState(folder, progress, state.optimizer_steps, options, UNKNOWN_DATA).as_json()


def _options(state: TrainingState) -> OptionValues:
    """The options with which train.py resumes a nanoGPT run."""
    given: OptionValues = {"beta1": state.betas[0], "beta2": state.betas[1], "weight_decay": state.weight_decay}
    kinds: dict[str, Any] = {f.name: f.metadata["kind"] for f in fields(Options)}
    for name in SAME_NAMES:
        value = state.options.get(name)
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is kinds[name]:
            given[name] = value
    if state.options.get("decay_lr") is False and "learning_rate" in given:
        given["min_lr"] = given["learning_rate"]
    accumulation = state.options.get(ACCUMULATION)
    if type(accumulation) is int and accumulation > 0 and {"batch_size", "block_size"} <= given.keys():
        given["total_batch_size"] = accumulation * given["batch_size"] * given["block_size"]
    return validate_options(given)
