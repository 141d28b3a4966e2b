"""tinygrad2/optim/optimizer.py: what all optimizers have in common."""

import math
from functools import partial

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import strict_cupy
from tests.tinygrad2.copies import copy_of, with_copies
from tinygrad2 import nn, optim
from tinygrad2.params import Parameter

R = np.random.default_rng(0)


class Model(nn.Module):
    def __init__(self, dtype="float64"):
        self.a = Parameter(np.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4))
        self.b = Parameter(np.linspace(0.5, 1, 5, dtype=dtype))
        self.c = Parameter(np.linspace(2, 1, 6, dtype=dtype).reshape(2, 3))


OPTIMIZERS = {
    "AdamW": (optim.AdamW, {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in "abc"}),
    "SGD": (optim.SGD, {f"momentum_buffer.{name}" for name in "abc"}),
    "SGD, Nesterov": (partial(optim.SGD, nesterov=True), {f"momentum_buffer.{name}" for name in "abc"}),
    "SGD, no momentum": (partial(optim.SGD, momentum=0.0), set()),
    "Muon": (
        partial(optim.Muon, matrices={"a": 2}),
        {"momentum_buffer.a", *(f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in "bc")},
    ),
}
every_optimizer = pytest.mark.parametrize(("make", "names"), OPTIMIZERS.values(), ids=OPTIMIZERS)


def gradients(model, scale=1.0):
    for p in model.parameters():
        p.grad = scale * R.normal(size=p.shape)
    return [p.backend.to_host(p.grad).copy() for p in model.parameters()]


def distance(array, expected):
    """The norm of the difference, relative to the norm of the expected array."""
    return np.linalg.norm(array - expected) / np.linalg.norm(expected)


@every_optimizer
def test_float32_parameters_have_float32_gradients_and_state(make, names):
    model = Model("float32")
    optimizer = make(model)
    gradients(model, 1e3)
    assert optimizer.step(1.0).dtype == np.float32
    arrays = [array for region in optimizer.arena.regions for array in (region.values, region.grads)]
    arrays += [array for part in optimizer.parts for array in part.state]
    assert {array.dtype.name for array in arrays} == {"float32"}


@every_optimizer
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_updates_bfloat16_copies_and_does_not_synchronize(make, names, device, max_norm):
    plain = Model("float32")
    with strict_cupy.registered() as counters:
        model = with_copies(Model("float32").to(device))
        optimizers = [make(m, lr=0.1) for m in (plain, model)]
        for _ in range(3):
            gradients(plain)
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                q.grad = p.grad
            optimizers[0].step(max_norm)
            counters.reset()
            optimizers[1].step(max_norm)
            assert (counters.syncs, counters.waits, counters.float64) == (0, 0, 0)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            data, copy = q.backend.to_host(q.data), copy_of(q)
            np.testing.assert_allclose(data, p.data, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(copy, data.astype(bfloat16))


@every_optimizer
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # on the stand-in, reference.py computes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_gradient_changes_nothing(make, names, device, bad):
    with strict_cupy.registered():
        skips_a_step(Model().to(device), make, bad)


def skips_a_step(model, make, bad):
    optimizer = make(model)
    gradients(model)
    optimizer.step()
    before = [p.numpy().copy() for p in model.parameters()], {k: v.copy() for k, v in optimizer.state().items()}
    model.b.grad[2] = bad
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(float(optimizer.step(1.0)))
    for p, value in zip(model.parameters(), before[0], strict=True):
        np.testing.assert_array_equal(p.numpy(), value)
    for name, value in optimizer.state().items():
        np.testing.assert_array_equal(value, before[1][name])


def test_zero_grad_clears_all_gradients():
    model = Model()
    optimizer = optim.AdamW(model)
    gradients(model)
    assert optimizer.grad_norm() > 0
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0


@every_optimizer
def test_state_can_be_saved_and_loaded(make, names):
    first, second = Model(), Model()
    optimizers = [make(model, lr=0.1) for model in (first, second)]
    for _ in range(3):
        gradients(first)
        optimizers[0].step()
    state = {name: array.copy() for name, array in optimizers[0].state().items()}
    assert state.keys() == names
    for name, array in state.items():
        assert array.shape == getattr(first, name[-1]).shape
        assert array.any()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        q.data = p.data
    optimizers[1].load_state(state, steps=3)
    for p, q, g in zip(first.parameters(), second.parameters(), gradients(first), strict=True):
        q.grad = g
        assert p is not q
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_an_incompatible_state_is_rejected():
    optimizer = optim.AdamW(Model())
    state = dict(optimizer.state())
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg\.b is missing$"):
        optimizer.load_state({name: array for name, array in state.items() if name != "exp_avg.b"}, 1)
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg\.d is unexpected$"):
        optimizer.load_state({**state, "exp_avg.d": np.zeros(3)}, 1)
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg_sq\.a has shape \(4, 3\); expected \(3, 4\)$"):
        optimizer.load_state({**state, "exp_avg_sq.a": np.zeros((4, 3))}, 1)
    assert optimizer.steps == 0
