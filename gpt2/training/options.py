"""The options of train.py: one table defines the flags, their help, the keys of a TOML file, and the allowed values."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from gpt2.config import BYTE_PRESETS, PRESETS, RECOMPUTE, GPT2Config
from gpt2.console import Parser, nearest
from gpt2.training.tasks import TASKS
from tinygrad2 import optim
from tinygrad2.backend import DEVICES
from tinygrad2.precision import PRECISIONS

OPTIMIZERS = ("adamw", "muon", "sgd")
OptionValues = dict[str, Any]  # values by option; their types are those of the fields of Options

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
TOO_LARGE = 2**31  # for any number of steps, tokens or bytes


class UsageError(ValueError):
    """An option is invalid, or options contradict each other; the message says which, and why."""


def _option(
    default: Value | None,
    kind: type[Value],
    help: str,
    allowed: Callable[[Value], bool] | None = None,
    expected: str = "",
) -> Value:
    metadata = {"kind": kind, "help": help, "allowed": allowed, "expected": expected}
    return cast(Value, field(default=default, metadata=metadata))  # Options replaces it by the value


def _positive(default: Number | None, kind: type[Number], help: str) -> Number:
    return _option(default, kind, help, lambda value: 0 < value < TOO_LARGE, "more than 0 and less than 2**31")


def _at_least_0(default: Number | None, kind: type[Number], help: str) -> Number:
    return _option(default, kind, help, lambda value: 0 <= value < TOO_LARGE, "0 or more, and less than 2**31")


def _text(default: str | None, help: str) -> str:
    return _option(default, str, help, bool, "some text")


def _fraction(default: float | None, help: str) -> float:
    return _option(default, float, help, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _one_of(default: str | None, help: str, choices: Sequence[str]) -> str:
    listed = ", ".join(choices)
    return _option(default, str, f"{help}: {listed}", lambda value: value in choices, listed)


def _some_of(default: str | None, help: str, choices: Sequence[str]) -> str:
    listed = f"{', '.join(choices)}, or several: {','.join(choices)}"
    return _option(default, str, f"{help}: {listed}", lambda value: set(value.split(",")) <= set(choices), listed)


@dataclass
class Options:
    """All options of train.py. Where the default is None, `resolve_options` derives the value from other options; only
    options whose type includes None may stay None."""

    preset: str = _one_of("nano", "sizes of the model", tuple(PRESETS))
    recipe: str | None = _one_of(None, "a set of published training options", ("paper", "modern"))
    init: str | None = _text(
        None, "fine-tune: a model folder or file (as for sample.py's --checkpoint), an out-dir, or a name such as gpt2"
    )
    device: str = _one_of("auto", "where to compute", DEVICES)
    threads: int | None = _positive(None, int, "threads on the CPU [the cores this process may use]")
    dtype: str = _one_of("float32", "precision of the computation (tf32 and bfloat16 on a GPU)", tuple(PRECISIONS))
    data: str | None = _text(None, "data set: a name under data/, or a folder [pydoc, for nano and micro]")
    out_dir: str = _text("out", "folder of the log and the checkpoints")
    fresh: bool = _option(False, bool, "rename an existing out-dir and start a new run")
    batch_size: int = _positive(None, int, "sequences per rank and micro-step")
    block_size: int = _positive(None, int, "tokens per sequence [the model's context]")
    recompute: str = _one_of("none", "what to recompute in the backward pass, to save memory", RECOMPUTE)
    head_rows: int | None = _positive(None, int, "rows of logits at a time, to save memory [all]")
    total_batch_size: int | None = _positive(None, int, "tokens per step, from which the number of micro-steps follows")
    max_iters: int = _positive(None, int, "total number of steps")
    eval_interval: int = _at_least_0(None, int, "steps between evaluations; 0: only at the end")
    eval_iters: int = _positive(None, int, "batches per evaluation")
    eval: str | None = _some_of(None, "tasks to score at each evaluation", tuple(TASKS))
    eval_items: int | None = _positive(None, int, "items of each task, spread over its file [all]")
    save_interval: int = _at_least_0(None, int, "steps between checkpoints; 0: only at the end")
    log_interval: int = _positive(None, int, "steps between printed lines")
    keep: int = _positive(2, int, "number of checkpoints to keep, besides the best")
    tensorboard: bool = _option(False, bool, "also log for TensorBoard, in the out-dir")
    learning_rate: float = _positive(None, float, "peak learning rate [with --init a tenth]")
    min_lr: float = _at_least_0(None, float, "learning rate at the end of the cosine decay [a tenth of the peak]")
    warmup_iters: int = _at_least_0(None, int, "steps of linear warm-up")
    lr_decay_iters: int = _positive(None, int, "step at which the learning rate reaches min-lr [max-iters]")
    optimizer: str = _one_of(
        "adamw",
        "update rule (muon orthogonalizes the momentum of hidden matrices: 1.6e12 operations a step at 124M, 0.4 % "
        "of a step of 524,288 tokens)",
        OPTIMIZERS,
    )
    weight_decay: float = _at_least_0(0.1, float, "weight decay, on matrices")
    beta1: float = _fraction(0.9, "AdamW's decay of the first moment (adamw, muon)")
    beta2: float = _fraction(0.95, "AdamW's decay of the second moment (adamw, muon)")
    momentum: float | None = _fraction(None, "momentum of muon [0.95] and sgd [0.9]")
    nesterov: bool = _option(False, bool, "Nesterov momentum (sgd)")
    grad_clip: float = _at_least_0(1.0, float, "maximum norm of the gradient; 0: no clipping")
    dropout: float | None = _fraction(None, "dropout rate of embeddings, attention and residuals [the preset's]")
    profile: bool = _option(False, bool, "at the end, print the time of the steps by operation")
    zero: bool = _option(False, bool, "with several ranks, shard the optimizer's moments over them (ZeRO stage 1)")
    seed: int = _option(1337, int, "of weights, data order and dropout", lambda v: 0 <= v < 2**64, "0 to 2**64 - 1")

    def micro_steps(self, ranks: int) -> int:
        """Micro-steps per step on every rank. Raises UsageError if the tokens per step are not a multiple of one."""
        B, T = self.batch_size, self.block_size
        micro = B * T * ranks
        total = self.total_batch_size or micro
        if total % micro:
            lower = total // micro * micro
            near = f"{lower:,} or {lower + micro:,}" if lower else f"{micro:,}"
            fitting = [b for b in range(1, B) if total % (b * T * ranks) == 0]
            other = f", or --batch-size {fitting[-1]}" if fitting else ""
            if ranks > 1 and total % T == 0 and not fitting:
                sequences = total // T
                counts = [str(n) for n in range(1, min(sequences, 2 * ranks) + 1) if sequences % n == 0]
                other = f". Its {sequences:,} sequences divide over {', '.join(counts)} ranks"
            step = f"{f'{ranks} ranks x ' * (ranks > 1)}--batch-size {B} x --block-size {T} = {micro:,} tokens"
            raise UsageError(
                f"--total-batch-size {total:,} is not a multiple of {step}; the nearest multiple is {near}{other}"
            )
        return total // micro

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then cosine decay."""
        return optim.cosine(
            step,
            lr=self.learning_rate,
            min_lr=self.min_lr,
            warmup=self.warmup_iters,
            decay_steps=self.lr_decay_iters,
        )


# Defaults that depend on the size of the model: small models train in minutes on a small machine.
SMALL_MODEL = 20_000_000  # parameters
SIZE_DEFAULTS: dict[str, OptionValues] = {
    "small": {
        "batch_size": 8,  # in a minute or two, many small steps reach a lower loss than a few large ones
        "block_size": 1024,
        "max_iters": 3000,
        "learning_rate": 3e-3,
        "warmup_iters": 100,
        "eval_interval": 500,
        "eval_iters": 100,
        "save_interval": 500,
        "log_interval": 50,
    },
    "large": {
        "batch_size": 4,
        "block_size": 1024,
        "max_iters": 19_073,
        "learning_rate": 6e-4,
        "warmup_iters": 715,
        "eval_interval": 250,
        "eval_iters": 20,
        "save_interval": 250,
        "log_interval": 1,
    },
}

RECIPES: dict[str, OptionValues] = {
    # Radford et al. (2018, 2019): the learning rate of GPT, dropout 0.1, batches of 512 sequences of 1024 tokens.
    "paper": {
        "block_size": 1024,
        "total_batch_size": 524_288,
        "learning_rate": 2.5e-4,
        "min_lr": 0.0,
        "warmup_iters": 2000,
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "dropout": 0.1,
    },
    # Brown et al., arXiv:2005.14165, appendix B, as in Karpathy's "Let's reproduce GPT-2".
    "modern": {
        "block_size": 1024,
        "total_batch_size": 524_288,
        "learning_rate": 6e-4,
        "warmup_iters": 715,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "dropout": 0.0,
    },
}

DERIVED_OPTIONS = ("lr_decay_iters", "min_lr")  # follow from other options if they are not given

# Options that only some optimizers use.
OPTIMIZER_OPTIONS = {
    "beta1": ("adamw", "muon"),
    "beta2": ("adamw", "muon"),
    "momentum": ("muon", "sgd"),
    "nesterov": ("sgd",),
}
# A run can only be resumed with the same values of these. Of dtype, only the dtype of the parameters has to stay: the
# precision of the computation may change, and so may the device. The data has to stay too; it is identified by its
# fingerprint, so its folder may have another name.
FIXED_OPTIONS = ("preset", "init", "block_size", "dtype", "seed", "optimizer")


def flag(name: str) -> str:
    """The option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def parse_options(argv: Sequence[str] | None, description: str) -> OptionValues:
    """The options given on the command line and in a file that --config names, without defaults. The command line takes
    precedence."""
    parser = Parser(prog="train.py", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file (the same names)")
    for f in fields(Options):
        spellings = dict.fromkeys((flag(f.name), "--" + f.name))
        text = f.metadata["help"] + (f" [{f.default}]" if f.default not in (None, False) else "")
        kind: type = f.metadata["kind"]
        parser.add_argument(
            *spellings,
            dest=f.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            # (--no-... resets a flag that a resumed run was started with)
            **({"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}),
        )
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    try:
        return validate_options({**(_read_toml(Path(file)) if file else {}), **given})
    except UsageError as error:
        parser.error(str(error))


def _read_toml(path: Path) -> OptionValues:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid TOML ({error})"
        raise UsageError(f"{path}: {reason}") from None
    given = {}
    names = [f.name for f in fields(Options)]
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise UsageError(f"{path}: unknown option {key}{nearest(name, names)}")
        kind = next(f.metadata["kind"] for f in fields(Options) if f.name == name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{path}: {key} is {value!r}; expected a value of type {kind.__name__}")
        given[name] = value
    return given


def validate_options(given: OptionValues) -> OptionValues:
    """Raise UsageError for a value of a wrong type or out of range; returns `given`."""
    for f in fields(Options):
        value, allowed = given.get(f.name), f.metadata["allowed"]
        if value is not None and type(value) is not f.metadata["kind"]:
            raise UsageError(f"{flag(f.name)} is {value!r}; expected a value of type {f.metadata['kind'].__name__}")
        if value is not None and allowed is not None and not allowed(value):
            expected = f.metadata["expected"]
            raise UsageError(
                f"{flag(f.name)} is {value or 'empty'}; expected {expected}{nearest(str(value), expected.split(', '))}"
                if isinstance(value, str)
                else f"{flag(f.name)} is {value}; expected {expected}"
            )
    return given


def default_options(given: OptionValues, config: GPT2Config) -> OptionValues:
    """The values of options that are not given: the recipe's, else those for the size of the model, else the general
    defaults. Without DERIVED_OPTIONS (see `resolve_options`)."""
    by_size = dict(SIZE_DEFAULTS["small" if config.n_parameters < SMALL_MODEL else "large"])
    recipe = dict(RECIPES[given["recipe"]]) if given.get("recipe") else {}
    for values in (by_size, recipe):  # at most the model's context
        if "block_size" in values:
            values["block_size"] = min(values["block_size"], config.n_positions)
    if recipe and "block_size" not in given and recipe["block_size"] < 1024:
        recipe["total_batch_size"] = 512 * recipe["block_size"]  # as many sequences
    if "init" in given:
        by_size["learning_rate"] /= 10  # fine-tuning starts near a minimum
    elif given.get("preset", Options.preset) in BYTE_PRESETS:
        by_size["data"] = "pydoc"
    general = {f.name: f.default for f in fields(Options) if f.default is not None}
    return {**general, **by_size, **recipe}


def check_optimizer(given: OptionValues, optimizer: str) -> None:
    """Raise UsageError where an option is given that only another optimizer uses."""
    for name, users in OPTIMIZER_OPTIONS.items():
        if given.get(name) not in (None, False) and optimizer not in users:
            raise UsageError(f"{flag(name)} is for --optimizer {' and '.join(users)} only; this run has {optimizer}")


def resolve_options(given: OptionValues, config: GPT2Config, defaults: OptionValues | None = None) -> Options:
    """All options: those given, else the defaults, else derived from other options.

    defaults  those with which a resumed run was started (versions may differ); None for the current ones.
    """
    values = {**(default_options(given, config) if defaults is None else defaults), **given}
    values.setdefault("lr_decay_iters", values["max_iters"])
    values.setdefault("min_lr", values["learning_rate"] / 10)
    return Options(**values)
