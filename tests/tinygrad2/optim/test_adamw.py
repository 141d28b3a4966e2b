"""tinygrad2/optim/adamw.py."""

import math

import numpy as np
import pytest

from tests.stand_ins import strict_cupy
from tests.tinygrad2.optim.test_optimizer import Model, distance, gradients
from tinygrad2 import optim


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize(("betas", "eps", "weight_decay"), [((0.9, 0.999), 1e-8, 0.1), ((0.8, 0.5), 1e-2, 0.0)])
def test_adamw_equals_the_published_algorithm(max_norm, betas, eps, weight_decay):
    """Algorithm 2 of arXiv:1711.05101 for each parameter, after clipping by the global norm."""
    model = Model()
    optimizer = optim.AdamW(model, lr=0.01, betas=betas, eps=eps, weight_decay=weight_decay)
    theta = [p.data.copy() for p in model.parameters()]
    m, v = [np.zeros_like(t) for t in theta], [np.zeros_like(t) for t in theta]
    for step in range(1, 21):
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
            assert distance(p.data, t) < 1e-12
            np.testing.assert_array_equal(p.grad, g)  # clipping does not change the gradients
    assert optimizer.steps == 20


def test_the_bias_correction_is_accurate_in_float32():
    """1 - beta2 would have an error of 5e-5 if it were computed in float32."""
    model = Model("float32")
    with strict_cupy.registered():
        model.to("cuda")
        optimizer = optim.AdamW(model, lr=1.0, eps=1e-12, weight_decay=0.0)
        before = model.b.data.get()
        for p in model.parameters():
            p.grad = np.ones(p.shape, np.float32)
        optimizer.step()
        np.testing.assert_allclose(model.b.data.get(), before - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1e-3), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("eps", 0.0), ("weight_decay", -1.0)],
)
def test_options_out_of_range_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"^AdamW: {name} is .* out of range$"):
        optim.AdamW(Model(), **{name: value})


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_pytorch(weight_decay):
    torch = pytest.importorskip("torch")
    model = Model()
    theirs = [torch.from_numpy(p.data.copy()).requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [p for p in theirs if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = optim.AdamW(model, weight_decay=weight_decay, **options), torch.optim.AdamW(groups, **options)
    for _ in range(20):
        for p, g in zip(theirs, gradients(model), strict=True):
            p.grad = torch.from_numpy(g)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(model.parameters(), theirs, strict=True):
            assert distance(p.data, q.detach().numpy()) < 1e-12
