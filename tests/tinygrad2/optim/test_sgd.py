"""tinygrad2/optim/sgd.py."""

import math

import numpy as np
import pytest

from tests.tinygrad2.optim.test_optimizer import Model, distance, gradients
from tinygrad2 import optim

OPTIONS = [
    {"momentum": 0.0, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.0},
    {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("options", OPTIONS)
def test_sgd_equals_the_published_algorithm(options, max_norm):
    model = Model()
    optimizer = optim.SGD(model, lr=0.01, **options)
    theta = [p.data.copy() for p in model.parameters()]
    buffers = [np.zeros_like(t) for t in theta]
    for step in range(20):
        optimizer.lr = lr = 0.01 + 0.002 * step
        grads = gradients(model)
        norm = math.sqrt(sum(np.sum(g**2) for g in grads))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for i, g in enumerate(grads):
            g = scale * g + (options["weight_decay"] if g.ndim > 1 else 0.0) * theta[i]
            buffers[i] = options["momentum"] * buffers[i] + g
            theta[i] -= lr * (g + options["momentum"] * buffers[i] if options.get("nesterov") else buffers[i])
        assert optimizer.step(max_norm) == pytest.approx(norm, rel=1e-13)
        for p, t, g in zip(model.parameters(), theta, grads, strict=True):
            np.testing.assert_allclose(p.data, t, rtol=1e-11)
            assert distance(p.data, t) < 1e-12
            np.testing.assert_array_equal(p.grad, g)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("options", OPTIONS)
def test_sgd_equals_pytorch(options):
    torch = pytest.importorskip("torch")
    model = Model()
    theirs = [torch.from_numpy(p.data.copy()).requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [p for p in theirs if p.ndim > 1]},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = optim.SGD(model, lr=0.03, **options), torch.optim.SGD(groups, lr=0.03, **options)
    for _ in range(20):
        for p, g in zip(theirs, gradients(model), strict=True):
            p.grad = torch.from_numpy(g)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(model.parameters(), theirs, strict=True):
            assert distance(p.data, q.detach().numpy()) < 1e-12


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1)])
def test_options_out_of_range_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"^SGD: {name} is .* out of range$"):
        optim.SGD(Model(), **{name: value})


def test_nesterov_requires_momentum():
    with pytest.raises(ValueError, match=r"^SGD: nesterov needs a momentum above 0$"):
        optim.SGD(Model(), momentum=0.0, nesterov=True)
