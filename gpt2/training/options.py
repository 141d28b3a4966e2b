"""The options of train.py: one table gives the flags, their help, the keys of a TOML file, and what is allowed."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gpt2.config import BYTE_PRESETS, PRESETS, RECOMPUTE, GPT2Config
from gpt2.console import Parser, nearest
from gpt2.training.tasks import TASKS
from tinygrad2 import optim
from tinygrad2.backend import DEVICES
from tinygrad2.precision import PRECISIONS

OPTIMIZERS = ("adamw", "muon", "sgd")
LIMIT = 2**31  # more steps, tokens or bytes than any of these options is about


class UsageError(ValueError):
    """The options do not make sense; the message says which and why."""


def _option(
    default: Any, kind: type, help: str, allowed: Callable[[Any], bool] | None = None, expected: str = ""
) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help, "allowed": allowed, "expected": expected})


def _positive(default: Any, kind: type, help: str) -> Any:
    return _option(default, kind, help, lambda value: 0 < value < LIMIT, "more than 0 and less than 2**31")


def _at_least_0(default: Any, kind: type, help: str) -> Any:
    return _option(default, kind, help, lambda value: 0 <= value < LIMIT, "0 or more, and less than 2**31")


def _text(default: Any, help: str) -> Any:
    return _option(default, str, help, bool, "some text")


def _fraction(default: Any, help: str) -> Any:
    return _option(default, float, help, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _one_of(default: Any, help: str, choices: Sequence[str]) -> Any:
    listed = ", ".join(choices)
    return _option(default, str, f"{help}: {listed}", lambda value: value in choices, listed)


def _some_of(default: Any, help: str, choices: Sequence[str]) -> Any:
    listed = f"{', '.join(choices)}, or several: {','.join(choices)}"
    return _option(default, str, f"{help}: {listed}", lambda value: set(value.split(",")) <= set(choices), listed)


@dataclass
class Options:
    """Everything that train.py can be told. Where the default is None, `resolve_options` fills in what other options
    imply; only those whose type says so may stay None."""

    preset: str = _one_of("nano", "sizes of the model", tuple(PRESETS))
    recipe: str | None = _one_of(None, "a set of published training options", ("paper", "modern"))
    init: str | None = _text(
        None, "fine-tune: a model folder or file (as sample.py's --checkpoint), an out-dir, or a name such as gpt2"
    )
    device: str = _one_of("auto", "where to compute", DEVICES)
    threads: int | None = _positive(None, int, "threads on the CPU [the cores this process may use]")
    dtype: str = _one_of("float32", "what to compute in (tf32 and bfloat16 on a GPU)", tuple(PRECISIONS))
    data: str | None = _text(None, "data set: a name under data/, or a folder [pydoc, for nano and micro]")
    out_dir: str = _text("out", "where the log and the checkpoints go")
    fresh: bool = _option(False, bool, "rename an existing out-dir away and start anew")
    batch_size: int = _positive(None, int, "sequences per rank and micro-step")
    block_size: int = _positive(None, int, "tokens per sequence [the model's context]")
    recompute: str = _one_of("none", "what to compute again in the backward pass, to save memory", RECOMPUTE)
    head_rows: int | None = _positive(None, int, "rows of logits at a time, to save memory [all]")
    total_batch_size: int | None = _positive(None, int, "tokens per step, from which accumulation is derived")
    max_iters: int = _positive(None, int, "steps in all")
    eval_interval: int = _at_least_0(None, int, "steps between evaluations; 0: only at the end")
    eval_iters: int = _positive(None, int, "batches per evaluation")
    eval: str | None = _some_of(None, "tasks to score at each evaluation", tuple(TASKS))
    eval_items: int | None = _positive(None, int, "items of each task, spread over its file [all]")
    save_interval: int = _at_least_0(None, int, "steps between checkpoints; 0: only at the end")
    log_interval: int = _positive(None, int, "steps between lines on the screen")
    keep: int = _positive(2, int, "checkpoints kept, beside the best")
    tensorboard: bool = _option(False, bool, "log for TensorBoard too, in the out-dir")
    learning_rate: float = _positive(None, float, "peak learning rate [with --init a tenth]")
    min_lr: float = _at_least_0(None, float, "learning rate at the end of the cosine [a tenth of the peak]")
    warmup_iters: int = _at_least_0(None, int, "steps of linear warm-up")
    lr_decay_iters: int = _positive(None, int, "step at which min-lr is reached [max-iters]")
    optimizer: str = _one_of(
        "adamw",
        "update rule; muon orthogonalizes the momentum of hidden matrices, which costs about 4e13 operations a step at "
        "124M (some 5 s on two CPU cores, 0.4 % of a step of 524,288 tokens)",
        OPTIMIZERS,
    )
    weight_decay: float = _at_least_0(0.1, float, "weight decay, on matrices")
    beta1: float = _fraction(0.9, "AdamW's decay of the first moment (adamw, muon)")
    beta2: float = _fraction(0.95, "AdamW's decay of the second moment (adamw, muon)")
    momentum: float | None = _fraction(None, "momentum of muon [0.95] and sgd [0.9]")
    nesterov: bool = _option(False, bool, "Nesterov momentum (sgd)")
    grad_clip: float = _at_least_0(1.0, float, "largest norm of the gradient; 0: no clipping")
    dropout: float | None = _fraction(None, "dropout rate, at all three places [the preset's]")
    profile: bool = _option(False, bool, "at the end, show where the steps' time went, by operation")
    zero: bool = _option(False, bool, "with several ranks, each keeps its share of the optimizer's moments only")
    seed: int = _option(1337, int, "of weights, data order and dropout", lambda v: 0 <= v < 2**64, "0 to 2**64 - 1")

    def micro_steps(self, ranks: int) -> int:
        """Micro-steps of a step on every rank, from the tokens that a step is to have. Raises UsageError where they do
        not divide into whole micro-steps."""
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
            raise UsageError(
                f"--total-batch-size {total:,} is no multiple of {f'{ranks} ranks x ' * (ranks > 1)}--batch-size {B} x "
                f"--block-size {T} = {micro:,} tokens; the nearest that is: {near}{other}"
            )
        return total // micro

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then half a cosine."""
        return optim.cosine(
            step,
            lr=self.learning_rate,
            min_lr=self.min_lr,
            warmup=self.warmup_iters,
            decay_steps=self.lr_decay_iters,
        )


# What is implied where nothing else says so: for models that a small machine trains in minutes, and for the others.
SMALL_MODEL = 20_000_000  # parameters
IMPLIED: dict[str, dict[str, Any]] = {
    "small": {
        "batch_size": 8,  # small batches: in a minute or two, many small steps learn more than a few large ones
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

RECIPES: dict[str, dict[str, Any]] = {
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

DERIVED_OPTIONS = ("lr_decay_iters", "min_lr")  # which follow from others where they are not given

# A run is resumed only with these unchanged: they decide which numbers it computes on.
# So does the type of the parameters; in which precision they are computed with may change, as the device may. So does
# the data, which is known by its content: its folder may have another name.
# Options that only some optimizers use.
OPTIMIZER_OPTIONS = {
    "beta1": ("adamw", "muon"),
    "beta2": ("adamw", "muon"),
    "momentum": ("muon", "sgd"),
    "nesterov": ("sgd",),
}
FIXED_OPTIONS = ("preset", "init", "block_size", "dtype", "seed", "optimizer")


def flag(name: str) -> str:
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def parse_options(argv: Sequence[str] | None, description: str) -> dict[str, Any]:
    """The options given on the command line and in the files it names, the command line winning; nothing else."""
    parser = Parser(prog="train.py", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file (the same names)")
    for f in fields(Options):
        spellings = dict.fromkeys((flag(f.name), "--" + f.name))
        text = f.metadata["help"] + (f" [{f.default}]" if f.default not in (None, False) else "")
        kind: dict[str, Any] = {"type": f.metadata["kind"]}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}  # --no-... takes back what a run remembers
        parser.add_argument(*spellings, dest=f.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    try:
        return check_options({**(_read_toml(Path(file)) if file else {}), **given})
    except UsageError as error:
        parser.error(str(error))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
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


def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Raise UsageError for a value out of range; returns `given`."""
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


def default_options(given: dict[str, Any], config: GPT2Config) -> dict[str, Any]:
    """What holds where an option is not given: the recipe's value, else what the size of the model implies, else the
    default. Options that follow from others (see `resolve_options`) are not among them."""
    implied = dict(IMPLIED["small" if config.n_parameters < SMALL_MODEL else "large"])
    recipe = dict(RECIPES[given["recipe"]]) if given.get("recipe") else {}
    for values in (implied, recipe):  # sequences as long as the model can read, where the user names no length
        if "block_size" in values:
            values["block_size"] = min(values["block_size"], config.n_positions)
    if recipe and "block_size" not in given and recipe["block_size"] < 1024:
        recipe["total_batch_size"] = 512 * recipe["block_size"]  # as many sequences
    if "init" in given:
        implied["learning_rate"] /= 10  # fine-tuning starts near a minimum
    elif given.get("preset", Options.preset) in BYTE_PRESETS:
        implied["data"] = "pydoc"
    plain = {f.name: f.default for f in fields(Options) if f.default is not None}
    return {**plain, **implied, **recipe}


def check_optimizer(given: dict[str, Any], optimizer: str) -> None:
    """Raise UsageError where an option is given that only another optimizer uses."""
    for name, users in OPTIMIZER_OPTIONS.items():
        if given.get(name) not in (None, False) and optimizer not in users:
            raise UsageError(f"{flag(name)} is for --optimizer {' and '.join(users)} only; this run has {optimizer}")


def resolve_options(given: dict[str, Any], config: GPT2Config, defaults: dict[str, Any] | None = None) -> Options:
    """All options: those given, else the defaults, else what other options imply.

    defaults  of the version that started the run, where it is resumed; else those of this version.
    """
    values = {**(default_options(given, config) if defaults is None else defaults), **given}
    values.setdefault("lr_decay_iters", values["max_iters"])
    values.setdefault("min_lr", values["learning_rate"] / 10)
    return Options(**values)
