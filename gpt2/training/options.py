"""The options of train.py. One table defines the flags, their help, the keys of a TOML file, and the allowed values."""

from __future__ import annotations

import argparse
import math
import reprlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from gpt2 import console, familiar_options
from gpt2.config import BYTE_PRESETS, PRESETS, RECOMPUTE, GPT2Config
from gpt2.console import Parser, nearest
from gpt2.training.tasks import TASKS
from tinygrad2 import optim
from tinygrad2.backend import DEVICES
from tinygrad2.precision import TRAINING

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd")
OptionValues = dict[str, Any]  # option values by name, with the types of the fields of Options

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
TOML_BYTES = 1 << 14  # maximum size of a TOML file with options
SHOWN = 80  # maximum number of characters of a name or a value in a message
TOO_LARGE = 2**31  # upper bound for any number of steps, tokens or bytes


class UsageError(ValueError):
    """An option is invalid, or options contradict each other. The message names the options and the reason."""


def _option(
    default: Value | None,
    kind: type[Value],
    unit: str,
    help: str,
    allowed: Callable[[Value], bool] | None = None,
    expected: str = "",
) -> Value:
    metadata = {"kind": kind, "unit": unit, "help": help, "allowed": allowed, "expected": expected}
    return cast(Value, field(default=default, metadata=metadata))  # the dataclass replaces it with the value


def _positive(default: Number | None, kind: type[Number], unit: str, help: str) -> Number:
    return _option(default, kind, unit, help, lambda value: 0 < value < TOO_LARGE, "more than 0 and less than 2**31")


def _at_least_0(default: Number | None, kind: type[Number], unit: str, help: str) -> Number:
    return _option(default, kind, unit, help, lambda value: 0 <= value < TOO_LARGE, "0 or more, and less than 2**31")


def _text(default: str | None, unit: str, help: str) -> str:
    return _option(default, str, unit, help, bool, "some text")


def _fraction(default: float | None, help: str) -> float:
    return _option(default, float, "X", help, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def _one_of(default: str | None, unit: str, help: str, choices: Sequence[str]) -> str:
    listed = ", ".join(choices)
    return _option(default, str, unit, help.format(listed), lambda value: value in choices, listed)


def _some_of(default: str | None, unit: str, help: str, choices: Sequence[str]) -> str:
    listed = f"{', '.join(choices)}, or several: {','.join(choices)}"
    return _option(default, str, unit, help.format(listed), lambda value: set(value.split(",")) <= set(choices), listed)


@dataclass
class Options:
    """All options of train.py. If a default is None, `resolve_options` derives the value from other options. Only
    options whose type includes None may remain None."""

    preset: str = _one_of("nano", "NAME", "model sizes: {}", tuple(PRESETS))
    n_layer: int = _positive(None, int, "N", "number of layers of a new model [default: the preset's]")
    n_head: int = _positive(None, int, "N", "number of attention heads of a new model [default: the preset's]")
    n_embd: int = _positive(None, int, "N", "embedding size of a new model [default: the preset's]")
    recipe: str | None = _one_of(
        None, "NAME", "published training options, as defaults: {} [default: none]", ("paper", "modern")
    )
    init: str | None = _text(
        None,
        "MODEL",
        "fine-tune this model: a folder or file (as for sample.py's --checkpoint), an out-dir, or a name such as gpt2 "
        "[default: train a new model]",
    )
    device: str = _one_of("auto", "NAME", "the device to use: {}", DEVICES)
    threads: int | None = _positive(None, int, "N", "number of CPU threads [default: the number of available cores]")
    dtype: str = _one_of("float32", "NAME", "precision of the computation: {} (tf32 needs a GPU)", TRAINING)
    data: str | None = _text(
        None, "NAME", "data set: a name in data/, or a folder [default: pydoc for nano and micro, otherwise required]"
    )
    out_dir: str = _text("out", "FOLDER", "folder for the checkpoints, the log and the report")
    fresh: bool = _option(False, bool, "", "rename an existing out-dir and start a new run, instead of resuming")
    batch_size: int = _positive(
        None,
        int,
        "SEQUENCES",
        "sequences per micro-step and rank; without --total-batch-size, sequences per step, divided among the ranks",
    )
    block_size: int = _positive(
        None, int, "TOKENS", "tokens per sequence; a new model's context is at least this [default: the preset's]"
    )
    recompute: str = _one_of("none", "NAME", "what to recompute in the backward pass, to save memory: {}", RECOMPUTE)
    head_rows: int | None = _positive(
        None, int, "ROWS", "number of tokens whose logits are computed at a time, to save memory [default: all]"
    )
    total_batch_size: int | None = _positive(
        None,
        int,
        "TOKENS",
        "tokens per step; determines the number of micro-steps (gradient accumulation) [default: one micro-step]",
    )
    max_iters: int = _positive(
        None, int, "STEPS", "total number of steps of the run; with --init, at most 3 epochs of the data"
    )
    eval_interval: int = _at_least_0(None, int, "STEPS", "steps between evaluations; 0: only at the end")
    eval_iters: int = _positive(None, int, "BATCHES", "batches per evaluation of the validation loss")
    eval: str | None = _some_of(None, "NAME", "tasks to score at each evaluation: {} [default: none]", tuple(TASKS))
    eval_items: int | None = _positive(
        None, int, "N", "use only N items of each task, evenly spaced in its file [default: all]"
    )
    early_stop: int = _at_least_0(
        0, int, "N", "stop after N consecutive evaluations without a lower validation loss; 0: never"
    )
    save_interval: int = _at_least_0(None, int, "STEPS", "steps between checkpoints; 0: only at the end")
    log_interval: int = _positive(
        None, int, "STEPS", "steps between printed lines; at most 30 s pass between lines (log.jsonl has every step)"
    )
    keep: int = _positive(2, int, "N", "number of checkpoints to keep, in addition to the best")
    learning_rate: float = _positive(None, float, "X", "peak learning rate; with --init, a tenth of the default")
    min_lr: float = _at_least_0(
        None, float, "X", "learning rate at the end of the decay [default: for cosine a tenth of the peak, else 0]"
    )
    warmup_iters: int = _at_least_0(None, int, "STEPS", "steps of linear warm-up; at most a tenth of the steps")
    lr_decay_iters: int = _positive(None, int, "STEP", "step at which the rate reaches min-lr [default: max-iters]")
    lr_schedule: str = _one_of(
        "cosine",
        "NAME",
        "decay of the learning rate after the warm-up: {} (constant, then linear in the last fifth)",
        SCHEDULES,
    )
    optimizer: str = _one_of(
        "adamw",
        "NAME",
        "{}; muon orthogonalizes the momentum of hidden-layer matrices and uses AdamW for the rest",
        OPTIMIZERS,
    )
    weight_decay: float = _at_least_0(0.1, float, "X", "weight decay of matrices; vectors have none")
    beta1: float = _fraction(0.9, "AdamW's decay rate of the first moment (adamw, muon)")
    beta2: float = _fraction(0.95, "AdamW's decay rate of the second moment (adamw, muon)")
    momentum: float | None = _fraction(
        None, "decay rate of the momentum [default: 0.95 for muon, 0.9 for small models and sgd]"
    )
    nesterov: bool = _option(False, bool, "", "Nesterov momentum (sgd)")
    grad_clip: float = _at_least_0(1.0, float, "NORM", "clip the gradient to this global norm; 0: no clipping")
    max_bad_steps: int = _positive(
        3, int, "N", "stop the run after N consecutive steps that were skipped because of a non-finite loss or gradient"
    )
    hang_timeout: int = _at_least_0(
        0, int, "SECONDS", "end the job if a step takes longer than this; 0: only print the stacks of every rank"
    )
    dropout: float | None = _fraction(
        None, "dropout rate of embeddings, attention and residuals [default: the preset's or the model's]"
    )
    profile: bool = _option(False, bool, "", "print a table of the time per operation at the end")
    zero: bool = _option(False, bool, "", "shard the optimizer state over the ranks (ZeRO stage 1)")
    seed: int = _option(
        1337, int, "N", "seed of the weights, the data order and dropout", lambda v: 0 <= v < 2**64, "0 to 2**64 - 1"
    )

    def micro_steps(self, ranks: int) -> int:
        """The number of micro-steps per step on each rank. Raises UsageError if it is not an integer."""
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
                other = f". Its {sequences:,} sequences can be divided among {', '.join(counts)} ranks"
            step = f"{f'{ranks} ranks x ' * (ranks > 1)}--batch-size {B} x --block-size {T} = {micro:,} tokens"
            raise UsageError(
                f"--total-batch-size {total:,} is not a multiple of {step}; the nearest multiple is {near}{other}"
            )
        return total // micro

    def fit_batch(self, given: OptionValues, ranks: int) -> str:
        """Set the tokens per step, if not set, and derive the batch size of each rank from it. Returns a note, or "".

        A step has the same tokens on any number of ranks: --batch-size sequences, rounded up to a multiple of the
        number of ranks, and divided among the ranks. With --total-batch-size, a given --batch-size is kept. Raises
        UsageError if the batch size does not divide the tokens per step evenly.
        """
        note = ""
        if self.total_batch_size is None:
            sequences = math.ceil(self.batch_size / ranks) * ranks
            self.total_batch_size = sequences * self.block_size
            if sequences > self.batch_size:
                note = f"{self.batch_size} sequences per step cannot be divided among {ranks} ranks; using {sequences}"
        if not {"batch_size", "total_batch_size"} <= given.keys():
            total, unit = self.total_batch_size, self.block_size * ranks
            fitting = (batch for batch in range(self.batch_size, 0, -1) if total % (batch * unit) == 0)
            self.batch_size = next(fitting, self.batch_size)
        self.micro_steps(ranks)
        return note

    def stops_early(self, step: int, best_step: int) -> bool:
        """Whether --early-stop stops the run after the evaluation at `step`, if the best one was at `best_step`."""
        return 0 < self.early_stop <= (step - best_step) / max(1, self.eval_interval)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, followed by the decay of --lr-schedule."""
        lr, min_lr, warmup, last = self.learning_rate, self.min_lr, self.warmup_iters, self.lr_decay_iters
        match self.lr_schedule:
            case "cosine":
                return optim.cosine(step, lr=lr, min_lr=min_lr, warmup=warmup, decay_steps=last)
            case "linear":
                return optim.linear(step, lr=lr, min_lr=min_lr, warmup=warmup, decay_steps=last)
            case "wsd":
                stable = self.stable_iters
                return optim.wsd(step, lr=lr, min_lr=min_lr, warmup=warmup, stable_steps=stable, decay_steps=last)
        raise AssertionError(f"--lr-schedule {self.lr_schedule} has no branch here")

    @property
    def stable_iters(self) -> int:
        """The step at which wsd begins to decay. The decay is the last fifth of the steps, as in arXiv:2405.18392."""
        return self.lr_decay_iters - self.lr_decay_iters // 5


# Defaults that depend on the size of the model. The defaults of small models are for runs of a few minutes on a CPU.
SMALL_MODEL = 20_000_000  # parameters
SIZE_DEFAULTS: dict[str, OptionValues] = {
    "small": {
        "optimizer": "muon",
        "lr_schedule": "linear",
        "batch_size": 16,  # smaller batches reach a higher loss in the same time: orthogonalization takes as long
        "block_size": 1024,
        "max_iters": 600,
        "learning_rate": 1e-2,
        "momentum": 0.9,
        "warmup_iters": 40,
        "eval_interval": 120,
        "eval_iters": 50,
        "save_interval": 120,
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

# Different defaults for small models with an optimizer other than Muon, with a recipe, or with --init.
SMALL_ADAMW: OptionValues = {
    "optimizer": "adamw",
    "lr_schedule": "cosine",
    "batch_size": 8,
    "max_iters": 3000,
    "learning_rate": 3e-3,
    "momentum": None,
    "warmup_iters": 100,
    "eval_interval": 500,
    "eval_iters": 100,
    "save_interval": 500,
}

RECIPES: dict[str, OptionValues] = {
    # Radford et al. (2018, 2019): the learning rate of GPT, dropout 0.1, batches of 512 sequences of 1024 tokens.
    "paper": {
        "optimizer": "adamw",
        "lr_schedule": "cosine",
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
        "optimizer": "adamw",
        "lr_schedule": "cosine",
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

REMOVED_OPTIONS = ("tensorboard",)  # options of earlier versions, which old checkpoints may contain
MODEL_SIZES = ("n_layer", "n_head", "n_embd")
# Options that are derived from other options or from the model if they are not given.
DERIVED_OPTIONS = ("lr_decay_iters", "min_lr", *MODEL_SIZES)

FINE_TUNING_EPOCHS = 3
# Defaults that are limited to the number of steps divided by this number.
PART_OF_STEPS = {"warmup_iters": 10, "eval_interval": 5, "save_interval": 2, "log_interval": 10}

# Options that only some optimizers use.
OPTIMIZER_OPTIONS = {
    "beta1": ("adamw", "muon"),
    "beta2": ("adamw", "muon"),
    "momentum": ("muon", "sgd"),
    "nesterov": ("sgd",),
}
# A run can only be resumed with the same values of these options. For dtype, only the dtype of the parameters must be
# the same; the precision of the computation and the device may change. The data must also be the same. It is identified
# by its fingerprint, so its folder may be renamed.
FIXED_OPTIONS = ("preset", *MODEL_SIZES, "init", "block_size", "dtype", "seed", "optimizer")


# The groups of `train.py --help`.
GROUPS = {
    "model": ("preset", *MODEL_SIZES, "init", "dropout"),
    "data and batches": ("data", "batch_size", "block_size", "total_batch_size", "max_iters"),
    "learning rate": ("learning_rate", "lr_schedule", "min_lr", "warmup_iters", "lr_decay_iters"),
    "optimizer": (
        "optimizer",
        "weight_decay",
        "beta1",
        "beta2",
        "momentum",
        "nesterov",
        "grad_clip",
        "max_bad_steps",
        "zero",
    ),
    "evaluation": ("eval_interval", "eval_iters", "eval", "eval_items", "early_stop"),
    "output": ("out_dir", "fresh", "save_interval", "keep", "log_interval", "profile"),
    "computation": ("device", "threads", "dtype", "recompute", "head_rows", "seed", "hang_timeout"),
    "sets of options": ("recipe",),
}


def flag(name: str) -> str:
    """The option's flag on the command line."""
    return "--" + name.replace("_", "-")


def command_line(description: str | None) -> Parser:
    """The parser of train.py. Its result contains only the given options."""
    note = (
        f"If two defaults are listed, the second is for models with {SMALL_MODEL:,} parameters or more. A resumed run "
        "keeps its options, except those that are given again."
    )
    parser = Parser(console.script("train"), description, epilog=note, familiar=familiar_options.TRAIN)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        add_options(group, names)
    group.add_argument(
        "--config", metavar="FILE", help="read options of the same names from a TOML file [default: none]"
    )
    return parser


def add_options(group: argparse._ArgumentGroup, names: Sequence[str]) -> None:
    """Add the flags of these options to a command line. The parsed result contains only the given options."""
    by_name = {f.name: f for f in fields(Options)}
    for f in (by_name[name] for name in names):
        kind: type = f.metadata["kind"]
        # BooleanOptionalAction adds --no-NAME, which turns off a flag that a resumed run was started with.
        form: dict[str, Any] = {"type": kind, "metavar": f.metadata["unit"]}
        form = {"action": argparse.BooleanOptionalAction} if kind is bool else form
        text = _help(f.name, f.metadata["help"], f.default).replace("%", "%%")
        group.add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, help=text, **form)


def _help(name: str, text: str, default: object) -> str:
    """The help text of an option with its default."""
    if text.endswith("]"):
        return text
    if default is False:
        return f"{text} [default: off]"
    by_size = dict.fromkeys(str(values.get(name, default)) for values in SIZE_DEFAULTS.values())
    return f"{text} [default: {' or '.join(by_size)}]"


def parse_options(argv: Sequence[str] | None, description: str | None) -> OptionValues:
    """The options given on the command line and in the --config file, without defaults. The command line takes
    precedence."""
    parser = command_line(description)
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    try:
        return validate_options({**(_read_toml(Path(file)) if file else {}), **given})
    except UsageError as error:
        parser.error(str(error))


def _read_toml(path: Path) -> OptionValues:
    try:
        if path.stat().st_size > TOML_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes; expected at most {TOML_BYTES:,}")
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        encoding = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        reason = error.strerror if isinstance(error, OSError) else f"not valid TOML ({error}){encoding}"
        raise UsageError(f"{path}: {reason}") from None
    given = {}
    names = [f.name for f in fields(Options)]
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            advice = familiar_options.TRAIN.get(flag(name))
            more = f"; {advice}" if advice else nearest(name[:SHOWN], names)
            raise UsageError(f"{path}: unknown option {key[:SHOWN]}{more}")
        kind = next(f.metadata["kind"] for f in fields(Options) if f.name == name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{path}: {key} is {reprlib.repr(value)}; expected a value of type {kind.__name__}")
        given[name] = value
    try:
        return validate_options(given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def validate_options(given: OptionValues) -> OptionValues:
    """Return `given`. Raises UsageError if a value has the wrong type or is out of range."""
    for f in fields(Options):
        value, allowed = given.get(f.name), f.metadata["allowed"]
        if value is not None and type(value) is not f.metadata["kind"]:
            kind = f.metadata["kind"].__name__
            raise UsageError(f"{flag(f.name)} is {reprlib.repr(value)}; expected a value of type {kind}")
        if value is not None and allowed is not None and not allowed(value):
            expected, shown = f.metadata["expected"], str(value)[:SHOWN] or "empty"
            similar = nearest(shown, expected.split(", ")) if isinstance(value, str) else ""
            raise UsageError(f"{flag(f.name)} is {shown}; expected {expected}{similar}")
    return given


def default_options(given: OptionValues, config: GPT2Config, earlier: bool = False) -> OptionValues:
    """The default values: those of the recipe, or else those for the size of the model, or else the general ones.
    DERIVED_OPTIONS are not included (see `resolve_options`).

    earlier  whether the run is from an earlier version, which did not store the defaults; all such runs used AdamW and
             a cosine schedule.
    """
    size = "small" if config.n_parameters < SMALL_MODEL else "large"
    by_size = dict(SIZE_DEFAULTS[size])
    muon = given.get("optimizer", "muon") == "muon" and not given.get("recipe") and "init" not in given
    if size == "small" and (earlier or not muon):
        by_size |= SMALL_ADAMW
    recipe = dict(RECIPES[given["recipe"]]) if given.get("recipe") else {}
    for values in (by_size, recipe):  # limit block_size to the model's context
        if "block_size" in values:
            values["block_size"] = min(values["block_size"], config.n_positions)
    if recipe and "block_size" not in given and recipe["block_size"] < 1024:
        recipe["total_batch_size"] = 512 * recipe["block_size"]  # the same number of sequences
    if "init" in given:
        by_size["learning_rate"] /= 10  # fine-tuning starts near a minimum
    elif given.get("preset", Options.preset) in BYTE_PRESETS:
        by_size["data"] = "pydoc"
    general = {f.name: f.default for f in fields(Options) if f.default is not None}
    return {**general, **by_size, **recipe}


def model_config(given: OptionValues) -> GPT2Config:
    """The config of a new model: the preset with the given sizes, and a context of at least --block-size."""
    config = GPT2Config.preset(given.get("preset", Options.preset))
    sizes = {name: given[name] for name in MODEL_SIZES if name in given}
    heads, size = (sizes.get(name, getattr(config, name)) for name in ("n_head", "n_embd"))
    if size % heads:
        raise UsageError(
            f"--n-embd {size} is not a multiple of --n-head {heads}; the nearest multiple is {_nearest(size, heads)}"
        )
    return replace(config, n_positions=max(config.n_positions, given.get("block_size", 1)), **sizes)


def _nearest(number: int, factor: int) -> int:
    """The positive multiple of `factor` that is nearest to `number`."""
    return max(1, round(number / factor)) * factor


def fit_to_data(given: OptionValues, defaults: OptionValues, step_tokens: int, data_tokens: int) -> list[str]:
    """Limit the defaults of a new run based on its data and its number of steps. Returns a note for each change.

    Fine-tuning takes at most FINE_TUNING_EPOCHS epochs; see PART_OF_STEPS for the other limits.
    """
    notes = []
    epochs = max(1, math.ceil(FINE_TUNING_EPOCHS * data_tokens / step_tokens))
    if "init" in given and "max_iters" not in given and epochs < defaults["max_iters"]:
        defaults["max_iters"] = epochs
        notes.append(f"{flag('max_iters')} {epochs:,} ({FINE_TUNING_EPOCHS} epochs)")
    steps = int(given.get("max_iters") or defaults["max_iters"])
    decay = min(steps, int(given.get("lr_decay_iters") or steps))
    for name, part in PART_OF_STEPS.items():
        most = decay // part if name == "warmup_iters" else max(1, steps // part)
        if name not in given and defaults[name] > most:
            defaults[name] = most
            total = "decay" if name == "warmup_iters" and decay < steps else "steps"
            notes.append(f"{flag(name)} {most:,} (1/{part} of the {total})")
    return notes


def check_optimizer(given: OptionValues, optimizer: str) -> None:
    """Raise UsageError if an option is given that only other optimizers use."""
    for name, users in OPTIMIZER_OPTIONS.items():
        if given.get(name) not in (None, False) and optimizer not in users:
            raise UsageError(f"{flag(name)} is only for --optimizer {' and '.join(users)}; this run has {optimizer}")


def check_schedule(given: OptionValues) -> None:
    """Raise UsageError if the given warm-up ends after the given end of the decay."""
    warmup, end = given.get("warmup_iters", 0), given.get("lr_decay_iters", math.inf)
    if warmup > end:
        raise UsageError(
            f"--warmup-iters {warmup} is more than --lr-decay-iters {end}, the step at which the decay ends"
        )


def resolve_options(given: OptionValues, config: GPT2Config, defaults: OptionValues | None = None) -> Options:
    """All options. A value is the given one, or else the default, or else derived from other options. A resumed run may
    have options of other versions, which are ignored.

    defaults  the defaults with which a resumed run was started, possibly by another version; None for the current ones.
    """
    values = {**(default_options(given, config) if defaults is None else defaults), **given}
    values.setdefault("lr_decay_iters", values["max_iters"])
    schedule = values.get("lr_schedule", Options.lr_schedule)  # earlier versions had only cosine
    values.setdefault("min_lr", values["learning_rate"] / 10 if schedule == "cosine" else 0.0)
    for name in MODEL_SIZES:
        values.setdefault(name, getattr(config, name))
    known = {f.name for f in fields(Options)}
    return Options(
        **{name: value for name, value in values.items() if name in known}
    )  # ignores options of other versions
