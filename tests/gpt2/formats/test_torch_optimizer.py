"""gpt2/formats/torch_optimizer.py: conversion of the optimizer state to and from nanoGPT's layout."""

import re

import numpy as np
import pytest

from gpt2.formats import torch_file
from gpt2.formats.stored import Stored
from gpt2.formats.torch_optimizer import MOMENTS, NO_LOSS, TrainingState, numbered, pack, unpack
from tests.gpt2.formats.models import random_model, values


def state(model, **changes):
    rng = np.random.default_rng(1)
    arrays = {f"{kind}.{name}": rng.random(a.shape, "float32") for kind in MOMENTS for name, a in values(model).items()}
    moments = {name: Stored(a.shape, "float32", lambda a=a: a) for name, a in arrays.items()}
    settings = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "options": {"batch_size": 4}}
    return TrainingState(
        **{"step": 7, "best_val_loss": 1.5, "moments": moments, "optimizer_steps": 6, **settings, **changes}
    )


@pytest.fixture
def model():
    return random_model()


def test_round_trip(model, tmp_path):
    before = state(model)
    packed = pack(model.config, before)
    torch_file.write_pickle(tmp_path / "a.pt", {**packed, "config": before.options})
    found = unpack(torch_file.read_pickle(tmp_path / "a.pt"), model.config, values(model))
    for name in ("step", "best_val_loss", "optimizer_steps", "learning_rate", "betas", "weight_decay", "options"):
        assert getattr(found, name) == getattr(before, name)
    assert found.moments.keys() == before.moments.keys()
    for name, stored in before.moments.items():
        assert np.array_equal(found.moments[name].read(), stored.read())


def test_packed_state_has_the_order_and_layout_of_nanogpt(model):
    """Matrices and embeddings come first, in the order of the model, then gains and biases."""
    packed = pack(model.config, state(model))["optimizer"]
    decay, others = numbered(model.config)
    assert decay[:4] == ["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"]
    assert others[:3] == ["h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.bias"]
    assert [group["params"] for group in packed["param_groups"]] == [list(range(10)), list(range(10, 28))]
    assert [group["weight_decay"] for group in packed["param_groups"]] == [0.1, 0.0]
    assert packed["state"][0]["exp_avg"].shape == (257, 8)
    assert packed["state"][2]["exp_avg"].shape == (24, 8)  # (out, in)


def test_state_before_the_first_evaluation_and_the_first_step(model):
    packed = pack(model.config, state(model, best_val_loss=None, step=0, optimizer_steps=0))
    assert packed["best_val_loss"] == NO_LOSS
    packed["optimizer"]["state"] = {}
    found = unpack(packed, model.config, values(model))
    assert (found.best_val_loss, found.step, found.optimizer_steps) == (None, 0, 0)
    assert not any(stored.read().any() for stored in found.moments.values())


def test_state_of_a_model_without_biases(model):
    names = [name for name in values(model) if not name.endswith(".bias")]
    packed = pack(model.config, state(model))
    decay, others = numbered(model.config)
    order = {name: i for i, name in enumerate([*decay, *others])}
    kept = [name for name in [*decay, *others] if name in names]
    packed["optimizer"]["state"] = {i: packed["optimizer"]["state"][order[name]] for i, name in enumerate(kept)}
    first, second = packed["optimizer"]["param_groups"]
    first["params"], second["params"] = list(range(10)), list(range(10, len(kept)))
    found = unpack(packed, model.config, dict.fromkeys(names))
    expected = state(model).moments
    for name, stored in found.moments.items():
        assert np.array_equal(
            stored.read(), expected[name].read() if name.split(".", 1)[1] in names else 0 * stored.read()
        )


def remove(tree, *path):
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


def replace(tree, value, *path):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: remove(t, "optimizer"), "it has no optimizer state"),
        (lambda t: replace(t, {}, "optimizer"), "it has no optimizer state"),
        (lambda t: remove(t, "iter_num"), "its iter_num is NoneType"),
        (lambda t: replace(t, -1, "iter_num"), "its iter_num is int -1; expected a non-negative number"),
        (lambda t: replace(t, "x", "best_val_loss"), "its best_val_loss is str x"),
        (lambda t: remove(t, "optimizer", "param_groups", 1), "its optimizer has 1 parameter groups; expected"),
        (lambda t: replace(t, [0], "optimizer", "param_groups", 0, "params"), "two groups, with 10 and 18"),
        (lambda t: replace(t, True, "optimizer", "param_groups", 0, "amsgrad"), "its optimizer has amsgrad True"),
        (lambda t: replace(t, 1e-6, "optimizer", "param_groups", 0, "eps"), "its optimizer has eps 1e-06"),
        (lambda t: replace(t, 3, "optimizer", "param_groups", 0, "betas"), "has no betas"),
        (lambda t: remove(t, "optimizer", "state", 3), "no state for parameter 3, h.0.attn.c_proj.weight"),
        (lambda t: remove(t, "optimizer", "state", 3, "exp_avg"), "no exp_avg of h.0.attn.c_proj.weight"),
        (
            lambda t: replace(t, t["optimizer"]["state"][0]["exp_avg"], "optimizer", "state", 3, "exp_avg"),
            "exp_avg of h.0.attn.c_proj.weight has shape (8, 257); expected (8, 8)",
        ),
    ],
)
def test_a_state_with_another_structure_is_rejected(change, message, model):
    tree = pack(model.config, state(model))
    change(tree)
    with pytest.raises(ValueError, match=re.escape(message)):
        unpack(tree, model.config, values(model))
