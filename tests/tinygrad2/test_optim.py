import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import strict_cupy
from tinygrad2 import nn, optim
from tinygrad2.params import Parameter

R = np.random.default_rng(0)


class Model(nn.Module):
    def __init__(self, dtype="float64"):
        self.a = Parameter(np.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4))
        self.b = Parameter(np.linspace(0.5, 1, 5, dtype=dtype))
        self.c = Parameter(np.linspace(2, 1, 6, dtype=dtype).reshape(2, 3))


def gradients(model, scale=1.0):
    for p in model.parameters():
        p.grad = scale * R.normal(size=p.shape)
    return [p.grad.copy() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize(("betas", "eps", "weight_decay"), [((0.9, 0.999), 1e-8, 0.1), ((0.8, 0.5), 1e-2, 0.0)])
def test_adamw_follows_the_textbook(max_norm, betas, eps, weight_decay):
    """Algorithm 2 of arXiv:1711.05101, parameter by parameter, with the global norm clipped before."""
    model = Model()
    optimizer = optim.AdamW(model, lr=0.01, betas=betas, eps=eps, weight_decay=weight_decay)
    theta = [p.data.copy() for p in model.parameters()]
    m, v = [np.zeros_like(t) for t in theta], [np.zeros_like(t) for t in theta]
    for step in range(1, 12):
        optimizer.lr = lr = 0.01 * step
        grads = gradients(model)
        norm = math.sqrt(sum(np.sum(g**2) for g in grads))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for i, g in enumerate(grads):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * scale * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * (scale * g) ** 2
            m_hat, v_hat = m[i] / (1 - betas[0] ** step), v[i] / (1 - betas[1] ** step)
            decay = weight_decay if theta[i].ndim > 1 else 0.0
            theta[i] = theta[i] - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * theta[i])
        assert optimizer.step(max_norm) == pytest.approx(norm, rel=1e-13)
        for p, t, g in zip(model.parameters(), theta, grads, strict=True):
            np.testing.assert_allclose(p.data, t, rtol=1e-11)
            np.testing.assert_array_equal(p.grad, g)  # clipping leaves the gradients as they are
    assert optimizer.steps == 11


def test_float32_stays_float32():
    model = Model("float32")
    optimizer = optim.AdamW(model)
    gradients(model, 1e3)
    assert optimizer.step(1.0).dtype == np.float32
    arrays = [a for region in optimizer.arena.regions for a in (region.values, region.grads)]
    assert {a.dtype for a in [*arrays, *(m for pair in optimizer.moments for m in pair)]} == {np.dtype("float32")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_keeps_the_copies_and_does_not_wait(device, max_norm):
    plain = Model("float32")
    with strict_cupy.registered() as counters:
        model = Model("float32").to(device).hold_copies()
        optimizers = [optim.AdamW(m, lr=0.1) for m in (plain, model)]
        for _ in range(3):
            gradients(plain)
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                q.grad = p.grad
            optimizers[0].step(max_norm)
            counters.reset()
            optimizers[1].step(max_norm)
            assert (counters.syncs, counters.waits, counters.float64) == (0, 0, 0)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            data, compute = q.backend.to_host(q.data), q.backend.to_host(q.compute)
            np.testing.assert_allclose(data, p.data, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(compute, data.astype(bfloat16))


def test_the_bias_correction_has_its_digits_in_float32():
    """1 - beta2 would be wrong by 5e-5 if it were taken of float32 numbers."""
    model = Model("float32")
    with strict_cupy.registered():
        model.to("cuda")
        optimizer = optim.AdamW(model, lr=1.0, eps=1e-12, weight_decay=0.0)
        before = model.b.data.get()
        for p in model.parameters():
            p.grad = np.ones(p.shape, np.float32)
        optimizer.step()
        np.testing.assert_allclose(model.b.data.get(), before - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = Model()
    optimizer = optim.AdamW(model)
    gradients(model)
    optimizer.step()
    before = [p.data.copy() for p in model.parameters()], {k: v.copy() for k, v in optimizer.state().items()}
    model.b.grad[2] = bad
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(optimizer.step(1.0))
    for p, value in zip(model.parameters(), before[0], strict=True):
        np.testing.assert_array_equal(p.data, value)
    for name, value in optimizer.state().items():
        np.testing.assert_array_equal(value, before[1][name])


def test_zero_grad():
    model = Model()
    optimizer = optim.AdamW(model)
    gradients(model)
    assert optimizer.grad_norm() > 0
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0


def test_state_goes_around():
    first, second = Model(), Model()
    optimizers = [optim.AdamW(model, lr=0.1) for model in (first, second)]
    for _ in range(3):
        gradients(first)
        optimizers[0].step()
    state = {name: array.copy() for name, array in optimizers[0].state().items()}
    assert sorted(state) == sorted(f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in "abc")
    assert state["exp_avg.a"].shape == (3, 4)
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


def test_a_state_that_does_not_fit_is_refused():
    optimizer = optim.AdamW(Model())
    state = dict(optimizer.state())
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg\.b is missing$"):
        optimizer.load_state({name: array for name, array in state.items() if name != "exp_avg.b"}, 1)
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg\.d is not one of the model$"):
        optimizer.load_state({**state, "exp_avg.d": np.zeros(3)}, 1)
    with pytest.raises(ValueError, match=r"^optimizer state: exp_avg_sq\.a has shape \(4, 3\); expected \(3, 4\)$"):
        optimizer.load_state({**state, "exp_avg_sq.a": np.zeros((4, 3))}, 1)
    assert optimizer.steps == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1e-3), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("eps", 0.0), ("weight_decay", -1.0)],
)
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^AdamW: {name} is .* out of range$"):
        optim.AdamW(Model(), **{name: value})


def test_constant():
    assert [optim.constant(step, lr=2.0, warmup=4) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert optim.constant(0, lr=2.0) == 2.0


@pytest.mark.parametrize("schedule", [optim.linear, optim.cosine])
def test_schedules_at_their_boundaries(schedule):
    def lr(step, **options):
        return schedule(step, **{"lr": 2.0, "min_lr": 0.5, "warmup": 4, "decay_steps": 12, **options})

    assert [lr(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lr(8) == pytest.approx(1.25)
    assert lr(12) == lr(13) == lr(10**9) == 0.5
    rates = [lr(step) for step in range(4, 13)]
    assert rates == sorted(rates, reverse=True)
    assert lr(0, warmup=0) == 2.0
    assert lr(0, warmup=0, decay_steps=0) == 0.5  # nothing to decay over
    assert lr(4, decay_steps=4) == 0.5
    assert lr(3, decay_steps=2) == 2.0  # the warm-up is finished first


def test_linear_is_a_line_and_cosine_a_cosine():
    options = {"lr": 1.0, "min_lr": 0.0, "warmup": 0, "decay_steps": 100}
    for step in range(101):
        assert optim.linear(step, **options) == pytest.approx(1 - step / 100)
        assert optim.cosine(step, **options) == pytest.approx(math.cos(math.pi * step / 200) ** 2)
