"""tinygrad2/optim/muon.py."""

import math

import numpy as np
import pytest

from tests.stand_ins import strict_cupy
from tests.stand_ins.thread_comm import on_ranks
from tests.tinygrad2.optim.test_optimizer import distance
from tinygrad2 import nn, optim, params, reference, threads
from tinygrad2.backend import get_backend
from tinygrad2.params import Parameter

MATRICES = {"qkv": 3, "up": 1, "down": 1}


class Model(nn.Module):
    """An embedding, a gain, and matrices, one of which consists of three blocks."""

    def __init__(self, dtype="float64", seed=0):
        draw = np.random.default_rng(seed).normal
        self.embedding = Parameter(draw(size=(11, 8)).astype(dtype))
        self.gain = Parameter(draw(size=8).astype(dtype))
        self.qkv = Parameter(draw(size=(8, 24)).astype(dtype))
        self.up = Parameter(draw(size=(8, 20)).astype(dtype))
        self.down = Parameter(draw(size=(20, 8)).astype(dtype))


def gradients(model, seed):
    draw = np.random.default_rng([7, seed]).normal
    for p in model.parameters():
        p.grad = draw(size=p.shape).astype(p.dtype)
    return {name: p.backend.to_host(p.grad).copy() for name, p in model.named_parameters()}


def newton_schulz(x):
    """The published iteration, for a matrix of any shape."""
    flipped = len(x) > len(x.T)
    x = (x.T if flipped else x) / np.linalg.norm(x)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x.T if flipped else x


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_muon_equals_the_published_algorithm(max_norm):
    model = Model()
    options = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = optim.Muon(model, MATRICES, lr=0.01, momentum=0.9, **options)
    theta = {name: p.data.copy() for name, p in model.named_parameters()}
    buffers, second = ({name: np.zeros_like(t) for name, t in theta.items()} for _ in range(2))
    for step in range(1, 21):
        optimizer.lr = lr = 0.01 + 0.001 * step
        grads = gradients(model, step)
        norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for name, g in grads.items():
            t, g = theta[name], scale * g
            if n := MATRICES.get(name):
                buffers[name] = 0.9 * buffers[name] + 0.1 * g
                direction = np.hstack([newton_schulz(x) for x in np.split(0.9 * buffers[name] + 0.1 * g, n, axis=1)])
                t *= 1 - lr * 0.1
                t -= lr * 0.2 * math.sqrt(max(len(t), t.shape[1] // n)) * direction
            else:
                buffers[name] = 0.8 * buffers[name] + 0.2 * g
                second[name] = 0.9 * second[name] + 0.1 * g * g
                t *= 1 - lr * (0.1 if t.ndim > 1 else 0.0)
                t -= lr * buffers[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-6)
        assert float(optimizer.step(max_norm)) == pytest.approx(norm, rel=1e-13)
        for name, p in model.named_parameters():
            assert distance(p.data, theta[name]) < 1e-12, name
            np.testing.assert_array_equal(p.grad, grads[name])
    state = optimizer.state()
    assert state.keys() == {
        *(f"momentum_buffer.{name}" for name in MATRICES),
        *(f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in ("embedding", "gain")),
    }
    for name in MATRICES:
        assert distance(state[f"momentum_buffer.{name}"], buffers[name]) < 1e-12


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize(("shape", "nesterov_momentum"), [((24, 40), 0.95), ((64, 16), 0.95), ((32, 32), 0.9)])
def test_one_step_agrees_with_pytorch(shape, nesterov_momentum):
    """The bound is large because PyTorch runs the iteration in bfloat16."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")

    class Matrix(nn.Module):
        def __init__(self):
            self.weight = Parameter(np.random.default_rng(0).normal(size=shape).astype("float32"))

    model = Matrix()
    before = model.weight.data.copy()
    theirs = torch.from_numpy(before.copy()).requires_grad_()
    options = {"lr": 0.1, "momentum": nesterov_momentum, "weight_decay": 0.0}
    optimizers = (
        optim.Muon(model, {"weight": 1}, **options),
        torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options),
    )
    model.weight.grad = np.random.default_rng(1).normal(size=shape).astype("float32")
    theirs.grad = torch.from_numpy(model.weight.grad.copy())
    for optimizer in optimizers:
        optimizer.step()
    assert distance(model.weight.data - before, theirs.detach().numpy() - before) < 3e-2


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (40, 40)])
def test_orthogonalize_preserves_singular_vectors(shape):
    x = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    reference.orthogonalize(x)
    result = u.T @ x @ vt.T
    np.testing.assert_allclose(result, np.diag(np.diag(result)), atol=1e-12)
    large = s > 0.02 * np.linalg.norm(s)
    assert (np.abs(np.diag(result)[large] - 1) < 0.35).all()


def test_orthogonalize_of_zeros_gives_zeros():
    for table in (reference, get_backend("cpu").kernels):
        x = np.zeros((4, 5), "float32")
        table.orthogonalize(x)
        assert not x.any()


def stepped(comm, shared, max_norm=None, dtype="float32", steps=3):
    """The parameters and the state after some steps, with the same gradients on every rank."""
    model = Model(dtype)
    optimizer = optim.Muon(model, MATRICES, lr=0.05, shared_by=comm if shared else None, ranks=comm)
    for step in range(steps):
        gradients(model, step)
        optimizer.step(max_norm)
    return {name: p.data.copy() for name, p in model.named_parameters()}, optimizer.state()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_bits(monkeypatch, size, shared, dtype):
    monkeypatch.setattr(params, "BUCKET_SIZE", 200)
    # With sharded state, the norm is summed in a different order, so its clipping would change bits.
    max_norm = None if shared else 0.5
    parameters, state = stepped(None, False, max_norm, dtype)
    for found, own_state in on_ranks(size, lambda comm: stepped(comm, shared, max_norm, dtype)):
        for name, array in parameters.items():
            np.testing.assert_array_equal(found[name], array)
        if own_state or not shared:
            assert own_state.keys() == state.keys()
            for name, array in state.items():
                np.testing.assert_array_equal(own_state[name], array)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_updates_do_not_depend_on_the_number_of_threads(monkeypatch, count):
    expected, _ = stepped(None, False)
    monkeypatch.setattr(threads, "_count", count)
    found, _ = stepped(None, False)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_each_rank_orthogonalizes_only_its_share(monkeypatch):
    kernels, counts = get_backend("cpu").kernels, []
    orthogonalize = kernels.orthogonalize
    monkeypatch.setattr(kernels, "orthogonalize", lambda *x: counts.append(len(x)) or orthogonalize(*x))
    on_ranks(2, lambda comm: stepped(comm, False, steps=1))
    assert sorted(counts) == [2, 3]


def test_a_sharded_run_resumes_bit_identically_on_another_number_of_ranks():
    expected, state = stepped(None, False, steps=4)
    begun, saved = stepped(None, False, steps=2)

    def resumed(comm):
        model = Model("float32")
        for name, p in model.named_parameters():
            p.data = begun[name]
        optimizer = optim.Muon(model, MATRICES, lr=0.05, shared_by=comm)
        optimizer.load_state(saved, 2)
        for step in (2, 3):
            gradients(model, step)
            optimizer.step()
        return {name: p.data for name, p in model.named_parameters()}, optimizer.state()

    for size in (1, 2, 3):
        results = on_ranks(size, resumed)
        for name, array in expected.items():
            np.testing.assert_array_equal(results[-1][0][name], array)
        for name, array in state.items():
            np.testing.assert_array_equal(results[0][1][name], array)


def test_the_momentum_moves_to_a_gpu_with_the_model():
    expected, _ = stepped(None, False)
    with strict_cupy.registered():
        model = Model("float32")
        optimizer = optim.Muon(model, MATRICES, lr=0.05)
        for step in range(3):
            if step == 1:
                model.to("cuda")
            gradients(model, step)
            optimizer.step()
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.numpy(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"other": 1}, r"^Muon: other is not a matrix of the model$"),
        ({"gain": 1}, r"^Muon: gain is not a matrix of the model$"),
        ({"up": 3}, r"^Muon: up cannot be divided into 3 blocks; expected a divisor of its number of columns, 20$"),
        ({"up": 0}, r"^Muon: up cannot be divided into 0 blocks; expected a divisor of its number of columns, 20$"),
    ],
)
def test_invalid_matrices_are_rejected(matrices, message):
    with pytest.raises(ValueError, match=message):
        optim.Muon(Model(), matrices)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("momentum", 1.0), ("betas", (1.0, 0.9)), ("eps", 0.0)])
def test_options_out_of_range_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"^Muon: {name} is .* out of range$"):
        optim.Muon(Model(), MATRICES, **{name: value})
