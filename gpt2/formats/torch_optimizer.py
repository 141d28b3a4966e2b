"""The training state in a nanoGPT checkpoint: AdamW's moments, the step and the best loss.

nanoGPT's AdamW has two parameter groups: the parameters with two or more axes, which have weight decay, and the others.
Its state dict numbers the parameters in this order, and within a group in the model's order. Moments have the layout of
their parameters: matrices are (out, in), as in nn.Linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2.config import GPT2Config, is_matrix
from gpt2.formats.stored import Stored
from tinygrad2.checkpoint import JsonObject

MOMENTS = ("exp_avg", "exp_avg_sq")
EPS = 1e-8  # AdamW's eps in train.py
NO_LOSS = 1e9  # nanoGPT's best_val_loss before the first evaluation
SETTINGS: JsonObject = {  # the other entries of a parameter group of torch.optim.AdamW
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


@dataclass
class TrainingState:
    """The state of a training run.

    step                 the number of completed steps.
    best_val_loss        the lowest validation loss, or None.
    moments              AdamW's moments, with the names in tinygrad2.optim, exp_avg.NAME and exp_avg_sq.NAME, and the
                         layout of gpt2.model.GPT2.
    optimizer_steps      the number of optimizer steps.
    learning_rate, betas, weight_decay   AdamW's settings.
    options              the settings of the run, with their names in nanoGPT.
    trainer              the contents of trainer.json, if train.py wrote the run.
    """

    step: int
    best_val_loss: float | None
    moments: dict[str, Stored]
    optimizer_steps: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    options: JsonObject
    trainer: JsonObject | None = None


def numbered(config: GPT2Config, names: Mapping[str, object] | None = None) -> tuple[list[str], list[str]]:
    """The names of the parameters in the order of nanoGPT's AdamW: those with weight decay, and the others.

    names  the parameters of the model, if some (biases) are missing.
    """
    shapes = {name: shape for name, shape in config.shapes() if names is None or name in names}
    return [n for n, shape in shapes.items() if len(shape) > 1], [n for n, shape in shapes.items() if len(shape) == 1]


def pack(config: GPT2Config, state: TrainingState) -> JsonObject:
    """The entries optimizer, iter_num and best_val_loss of a nanoGPT checkpoint."""
    decay, others = numbered(config)
    steps = np.array(state.optimizer_steps, np.float32)

    def moment(kind: str, name: str) -> Stored:
        stored = state.moments[f"{kind}.{name}"].cast("float32")
        return stored.transposed() if is_matrix(name) else stored

    moments = {
        i: {
            "step": Stored((), "float32", lambda: steps),
            **{kind: moment(kind, name) for kind in MOMENTS},
        }
        for i, name in enumerate([*decay, *others])
    }
    settings = {"lr": state.learning_rate, "betas": state.betas, "eps": EPS}
    numbers = list(range(len(moments)))
    groups = [
        {**settings, "weight_decay": weight_decay, **SETTINGS, "params": part}
        for weight_decay, part in ((state.weight_decay, numbers[: len(decay)]), (0.0, numbers[len(decay) :]))
    ]
    best = NO_LOSS if state.best_val_loss is None else state.best_val_loss
    optimizer = {"state": moments, "param_groups": groups}
    return {"optimizer": optimizer, "iter_num": state.step, "best_val_loss": best}


def unpack(tree: Mapping[str, Any], config: GPT2Config, names: Mapping[str, object]) -> TrainingState:
    """The state in a nanoGPT checkpoint, for a model with this config.

    names  the parameters in its state dict; the moments of other parameters are zero.
    Raises ValueError if it has no AdamW state with nanoGPT's two parameter groups, or if a shape is wrong.
    """
    step = _number(tree.get("iter_num"), "iter_num")
    optimizer = tree.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    decay, others = numbered(config, names)
    order = list(range(len(decay) + len(others)))
    expected = [order[: len(decay)], order[len(decay) :]]
    if not isinstance(groups, list) or not isinstance(states, dict) or not all(isinstance(g, dict) for g in groups):
        raise ValueError("it has no optimizer state; expected nanoGPT's entry `optimizer`")
    if [group.get("params") for group in groups] != expected:
        raise ValueError(
            f"its optimizer has {len(groups)} parameter groups; expected nanoGPT's two groups, with {len(decay)} and "
            f"{len(others)} parameters"
        )
    for group in groups:
        for name, value in (("amsgrad", False), ("maximize", False), ("eps", EPS)):
            if group.get(name, value) != value:
                raise ValueError(f"its optimizer has {name} {group[name]}; expected {value}, as in train.py's AdamW")
    shapes = dict(config.shapes())
    moments = {f"{kind}.{name}": _zeros(shape) for kind in MOMENTS for name, shape in shapes.items()}
    steps = {0}
    for i, name in enumerate([*decay, *others]):
        if states:  # (empty before the first step)
            state = states.get(i)
            if not isinstance(state, dict):
                raise ValueError(f"its optimizer has no state for parameter {i}, {name}")
            steps.add(round(_number(state.get("step"), "step")))
            for kind in MOMENTS:
                moments[f"{kind}.{name}"] = _moment(state.get(kind), f"{kind} of {name}", shapes[name], is_matrix(name))
    return TrainingState(
        step=round(step),
        best_val_loss=_best(tree.get("best_val_loss")),
        moments=moments,
        optimizer_steps=max(steps),
        learning_rate=_number(groups[0].get("lr"), "lr"),
        betas=_betas(groups[0].get("betas")),
        weight_decay=_number(groups[0].get("weight_decay"), "weight_decay"),
        options=dict(tree["config"]) if isinstance(tree.get("config"), dict) else {},
        trainer=tree["trainer"] if isinstance(tree.get("trainer"), dict) else None,
    )


def _moment(stored: object, what: str, shape: tuple[int, ...], transposed: bool) -> Stored:
    """A moment in the layout of gpt2.model.GPT2. The rows of padded tokens are dropped, as in the weights."""
    if not isinstance(stored, Stored):
        raise ValueError(f"its optimizer has no {what}")
    stored = stored.transposed() if transposed else stored
    if len(stored.shape) == len(shape) == 2 and not transposed and stored.shape[0] > shape[0]:
        stored = stored.rows(shape[0])
    if stored.shape != shape:
        raise ValueError(f"its optimizer's {what} has shape {stored.shape}; expected {shape}")
    return stored.cast("float32")


def _zeros(shape: tuple[int, ...]) -> Stored:
    return Stored(shape, "float32", lambda: np.zeros(shape, np.float32))


def _number(value: object, what: str) -> float:
    """A number from 0 to 2^53, or the value of a 0-d tensor. Raises ValueError for anything else."""
    if isinstance(value, Stored) and value.shape == ():
        value = value.read().item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 53:
        raise ValueError(f"its {what} is {type(value).__name__} {str(value)[:40]}; expected a non-negative number")
    return value


def _best(value: object) -> float | None:
    best = NO_LOSS if value is None else _number(value, "best_val_loss")
    return best if best < NO_LOSS else None


def _betas(value: object) -> tuple[float, float]:
    if isinstance(value, tuple | list) and len(value) == 2:
        return _number(value[0], "beta1"), _number(value[1], "beta2")
    raise ValueError("its optimizer has no betas; expected AdamW's two betas")
