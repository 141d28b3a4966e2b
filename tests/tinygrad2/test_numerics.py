"""Sums, softmax, cross-entropy, attention, GELU, LayerNorm and norms at the limits of float32.

Each is computed in float32 with reference.py on NumPy and on the stand-in for CuPy, with the CPU kernels, and with the
CUDA kernels in the simulator, and compared with reference.py in float64 on the same inputs.
"""

import contextlib
import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import strict_cupy
from tests.tinygrad2.kernels import on_device
from tinygrad2 import Tensor, nn, ops, optim, reference
from tinygrad2.backend import get_backend, kernel_table
from tinygrad2.params import Parameter

R = np.random.default_rng(0)
POWERS = range(-20, 21, 4)  # powers of 10


@pytest.fixture(autouse=True)
def same_numbers():
    """Each test uses the same random numbers, regardless of earlier tests."""
    R.bit_generator.state = np.random.default_rng(0).bit_generator.state


def on_cupy(table):
    """A kernel table for the stand-in, with functions that accept NumPy arrays."""

    def convert(value):
        return strict_cupy.ndarray(value) if isinstance(value, np.ndarray | np.generic) else value

    class Table:
        def __getattr__(self, name):
            def call(*arguments):
                if name == "embedding_backward":  # tokens stay on the host
                    dy, tokens, *rest = arguments
                    result = table.embedding_backward(convert(dy), tokens, *map(convert, rest))
                else:
                    result = getattr(table, name)(*map(convert, arguments))
                return (
                    tuple(x._a for x in result)
                    if isinstance(result, tuple)
                    else result
                    if result is None
                    else result._a
                )

            return call

    return Table()


@pytest.fixture(params=["reference", "cpu", "cupy", pytest.param("cuda", marks=pytest.mark.slow)])
def kernels(request):
    with contextlib.ExitStack() as stack:
        if request.param == "cpu":
            yield kernel_table(reference, pytest.importorskip("tinygrad2.kernels.cpu"))
        elif request.param == "cupy":
            stack.enter_context(strict_cupy.registered())
            yield on_cupy(get_backend("cuda").kernels)
        elif request.param == "cuda":
            stack.enter_context(strict_cupy.registered())
            table = on_device.make_kernels()
            table._reference = get_backend("cuda").kernels
            yield on_cupy(Overrides(table))
        else:
            yield reference


class Overrides:
    """The CUDA kernels. Functions without a kernel use reference.py on the stand-in."""

    def __init__(self, table):
        self._table = table

    def __getattr__(self, name):
        return getattr(self._table, name, None) or getattr(self._table._reference, name)


def error(result, expected):
    """The distance from the correct result, relative to its norm."""
    assert np.asarray(result).dtype == np.float32
    return np.linalg.norm(np.asarray(result, "d") - expected) / (np.linalg.norm(expected) or 1)


def wide(arguments):
    return [x.astype("d") if isinstance(x, np.ndarray) and x.dtype == "f4" else x for x in arguments]


def check(kernels, name, *arguments, bound=1e-6):
    """Call a kernel and compare all its results with reference.py in float64."""
    got, expected = getattr(kernels, name)(*arguments), getattr(reference, name)(*wide(arguments))
    for g, r in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        assert error(g, r) < bound, name
    return got


# Sums ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((200_000, 2), (0,)), ((3, 70_000, 2), (1,)), ((70_000, 1, 3), (0, 2)),
                                             ((70_001,), (0,)), ((2, 40_000), (1,)), ((40_000, 2), (0, 1)),
                                             ((3000, 2, 40), (0,)), ((1100, 1100, 1), (0, 2))])  # fmt: skip
@pytest.mark.parametrize("order", ["C", "F"])
def test_sums_of_many_terms(kernels, shape, axis, order):
    x = np.asarray((1 + R.random(shape)).astype("f4"), order=order)
    for keepdims in (False, True):
        expected = np.sum(x, axis=axis, keepdims=keepdims, dtype="d")
        got = kernels.sum_forward(x, axis, keepdims)
        assert np.shape(got) == expected.shape
        assert error(got, expected) < 1e-6


@pytest.mark.slow  # 160 MB
def test_a_sum_of_20_million_ones():
    n = 20_971_520
    x = np.ones((n, 2), "f4")
    np.testing.assert_array_equal(Tensor(x).sum(axis=0).data, [n, n])
    np.testing.assert_array_equal(Tensor(x).mean(axis=0).data, [1, 1])
    np.testing.assert_array_equal(Tensor(x.T).sum(axis=1).data, [n, n])
    bias = Tensor(np.zeros(2, "f4"), requires_grad=True)
    (Tensor(x) + bias).sum().backward()
    np.testing.assert_array_equal(bias.grad, [n, n])
    tied = Tensor(np.zeros((n, 2), "f4"), requires_grad=True)
    tied.max(axis=0).sum().backward()
    np.testing.assert_allclose(tied.grad, 1 / n)


def test_gradients_that_sum_over_many_rows(kernels):
    n = 150_000
    dy, x = (1 + R.random((n, 2))).astype("f4"), R.normal(size=(n, 2)).astype("f4")
    total = dy.sum(axis=0, dtype="d")
    assert error(kernels.add_backward(dy, dy.shape, (2,))[1], total) < 1e-6
    assert error(kernels.add_backward(dy[:, None], (n, 1, 2), (1, 1, 2))[1][0, 0], total) < 1e-6
    weight, dbias, dweight = np.ones((2, 2), "f4"), np.zeros(2, "f4"), np.zeros(2, "f4")
    kernels.linear_backward(dy, x, weight, None, dbias)
    assert error(dbias, total) < 1e-6
    dbias[:] = 0
    mean, rstd = np.zeros((n, 1), "f4"), np.ones((n, 1), "f4")
    kernels.layernorm_backward(dy, np.abs(x), weight[0], mean, rstd, dweight, dbias)
    assert error(dbias, total) < 1e-6
    assert error(dweight, (dy.astype("d") * np.abs(x)).sum(axis=0)) < 1e-6
    for name in ("gelu_backward", "gelu_exact_backward"):
        dbias[:] = 0
        getattr(kernels, name)(dy, np.full_like(x, 20), np.zeros(2, "f4"), dbias)
        assert error(dbias, total) < 1e-6
    dwte, dwpe = np.zeros((3, 2), "f4"), np.zeros((1, 2), "f4")
    kernels.embedding_backward(dy[:, None], np.ones((n, 1), np.int64), 0, dwte, dwpe)
    assert error(dwte[1], total) < 1e-6
    assert error(dwpe[0], total) < 1e-6


# Softmax and cross-entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [*POWERS, 30, 37])
def test_cross_entropy_with_a_common_offset(kernels, power):
    """Equal and random logits, rounded to float32 after adding the offset. The reference uses the same values."""
    targets = R.integers(0, 7, 5)
    for logits in (
        np.full((5, 7), 10.0**power),
        3 * R.normal(size=(5, 7)) + 10.0**power,
        R.normal(size=(5, 7)) * 10.0**power,
    ):
        logits = logits.astype("f4")
        loss, log_total = kernels.cross_entropy_forward(logits, targets)
        expected, expected_total = reference.cross_entropy_forward(logits.astype("d"), targets)
        assert error(loss, expected) < 1e-6
        got = kernels.cross_entropy_backward(np.float32(0.5), logits, targets, log_total)
        assert error(got, reference.cross_entropy_backward(0.5, logits.astype("d"), targets, expected_total)) < 1e-6
        y = check(kernels, "softmax_forward", logits)
        dy = R.normal(size=y.shape).astype("f4")
        distance = kernels.softmax_backward(dy, y) - reference.softmax_backward(*wide([dy, y]))
        assert np.linalg.norm(distance) < 1e-6 * np.linalg.norm(dy * y)  # relative to the terms
        x, weight = np.eye(5, dtype="f4"), np.ascontiguousarray(logits.T)  # so that x W^T equals these logits
        loss, dlogits = kernels.lm_head_forward(x, weight, targets)
        assert error(loss, expected) < 1e-6
        assert error(dlogits, reference.lm_head_forward(*wide([x, weight]), targets)[1]) < 1e-6


def test_softmax_of_masked_rows(kernels):
    x = np.array([[1, -np.inf, 2], [-np.inf, -np.inf, 5], [-np.inf] * 3, [0, np.inf, 0], [0, np.nan, 0]], "f4")
    with np.errstate(invalid="ignore"):
        y = kernels.softmax_forward(x)
    np.testing.assert_allclose(y[0], [1 / (1 + math.e), 0, math.e / (1 + math.e)], rtol=1e-6)
    np.testing.assert_array_equal(y[1], [0, 0, 1])
    assert np.isnan(y[2:]).all()


# Attention -----------------------------------------------------------------------------------------------------------


def attention_problem(offset, T=70):
    """q, k and v with exact scores in float32: the offset plus multiples of 1/4, or of its unit in the last place."""
    qkv = np.zeros((2, T, 3, 1, 16))
    qkv[:, :, :2, 0, 0] = 2.0, 2 * offset
    step = max(0.25, 2.0 ** (math.frexp(offset)[1] - 24))
    qkv[:, :, 0, 0, 1], qkv[:, :, 1, 0, 1] = R.integers(-2, 3, (2, T)), 4 * step * R.integers(-2, 3, (2, T))
    qkv[:, :, 2] = R.normal(size=(2, T, 1, 16))
    return qkv.reshape(2, T, 48), R.normal(size=(2, T, 16))


@pytest.mark.parametrize("power", range(0, 67, 6))
@pytest.mark.parametrize("sign", [1, -1])
def test_attention_with_large_scores(kernels, power, sign):
    qkv, dout = (x.astype("f4") for x in attention_problem(sign * 2.0**power))
    out, lse = reference.attention_forward(qkv.astype("d"), 1, 0.0, None)
    expected = reference.attention_backward(*wide([dout, qkv, out, lse]), 1, 0.0, None)
    got, lse = kernels.attention_forward(qkv, 1, 0.0, None)
    assert error(got, out) < 1e-6
    dqkv = kernels.attention_backward(dout, qkv, got, lse, 1, 0.0, None)
    expected[..., 0] = dqkv[..., 0] = 0  # this part of dq is the offset times a sum that is 0
    for ours, theirs in zip(np.split(dqkv, 3, -1), np.split(expected, 3, -1), strict=True):
        assert error(ours, theirs) < 5e-6  # the CPU kernels have the error of lse, which is up to 64


@pytest.mark.slow
@pytest.mark.parametrize("power", [0, 8, 13, 15])
def test_attention_in_bfloat16_with_large_scores(power):
    """attention_backward.cu computes P from the rounded lse.

    For scores up to 2^15, the rounding error of lse is smaller than that of bfloat16, 2^-9.
    """
    qkv, dout = (x.astype(bfloat16) for x in attention_problem(2.0**power))
    table = on_device.make_kernels()
    out, lse = table.attention_forward(strict_cupy.ndarray(qkv), 1, 0.0, None)
    dqkv = table.attention_backward(strict_cupy.ndarray(dout), strict_cupy.ndarray(qkv), out, lse, 1, 0.0, None)
    expected_out, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.0, None)
    expected = reference.attention_backward(dout.astype("d"), qkv.astype("d"), expected_out, expected_lse, 1, 0.0, None)
    dv, expected_dv = dqkv._a[..., 32:].astype("d"), expected[..., 32:]
    assert np.linalg.norm(dv - expected_dv) < 2.0**-8 * np.linalg.norm(expected_dv)
    assert np.linalg.norm(out._a.astype("d") - expected_out) < 2.0**-8 * np.linalg.norm(expected_out)


# GELU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gelu", "gelu_exact"])
def test_gelu_and_its_gradient_over_all_magnitudes(kernels, form):
    size = 10.0 ** np.arange(-36, 38.5, 0.5)
    x = np.concatenate((size, -size, [0, 3.4e38, -3.4e38])).astype("f4")[None]
    ones, none = np.ones_like(x), None
    y, slope = getattr(kernels, f"{form}_forward")(x, none), getattr(kernels, f"{form}_backward")(ones, x, none, none)
    expected = getattr(reference, f"{form}_forward")(x.astype("d"), none)
    assert (np.abs(y - expected) <= 1e-6 * np.minimum(np.abs(x), np.abs(expected) + 1)).all()
    expected = getattr(reference, f"{form}_backward")(ones.astype("d"), x.astype("d"), none, none)
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    assert set(expected[0, np.abs(x[0]) > 100]) == {0, 1}


# LayerNorm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-36, -30, *POWERS, 30, 36])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_layernorm_over_all_magnitudes(kernels, power, eps):
    x, dy = (R.normal(size=(3, 40)).astype("f4") for _ in range(2))
    x *= np.float32(10.0**power)
    weight, bias = R.normal(size=40).astype("f4"), np.zeros(40, "f4")
    x += np.float32(10.0**power)  # so that the mean is not close to 0
    _, mean, rstd = check(kernels, "layernorm_forward", x, weight, bias, eps)
    check(kernels, "layernorm_backward", dy, x, weight, mean, rstd, None, None, bound=4e-6)
    check(kernels, "add_layernorm_forward", x, x, weight, bias, eps)


def test_inverse_rms_over_all_magnitudes():
    """The result is accurate even without eps, down to the smallest normal numbers."""
    for power in (-36, -20, 0, 20, 36):
        x = (R.normal(size=(3, 40)) * 10.0**power).astype("f4")
        assert error(reference.inverse_rms(x, 0.0), reference.inverse_rms(x.astype("d"), 0.0)) < 1e-6
    expected = 1 / np.sqrt(np.mean(x.astype("d") ** 2, axis=-1, keepdims=True))
    np.testing.assert_allclose(reference.inverse_rms(x.astype("d"), 0.0), expected, rtol=1e-14)


# Norms and steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-36, -30, *POWERS, 30, 36])
def test_norms_over_all_magnitudes(kernels, power):
    x = (R.normal(size=70_001) * 10.0**power).astype("f4")
    assert error(kernels.norm(kernels.squared_norm(x)), np.linalg.norm(x.astype("d"))) < 1e-6
    total = kernels.squared_norm(x) + kernels.squared_norm(np.float32([3e19, 4e19]))  # the total of two arrays
    assert error(kernels.norm(total), math.hypot(np.linalg.norm(x.astype("d")), 5e19)) < 1e-6
    assert kernels.norm(kernels.squared_norm(np.zeros(3, "f4"))) == 0
    for bad in (np.nan, np.inf):
        x[7] = bad
        assert not np.isfinite(kernels.norm(kernels.squared_norm(x)))


class Two(nn.Module):
    def __init__(self):
        self.a, self.b = (Parameter(np.zeros(shape, "f4")) for shape in ((1, 1), (1,)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e19, 1e37])
def test_a_gradient_whose_squared_norm_overflows_is_clipped(device, size):
    with strict_cupy.registered():
        model = Two().to(device)
        optimizer = optim.SGD(model, lr=1.0, momentum=0.0)
        model.a.grad, model.b.grad = np.full((1, 1), 3 * size, "f4"), np.full(1, 4 * size, "f4")
        norm = model.a.backend.to_host(optimizer.step(max_norm=1.0))
        assert norm == pytest.approx(5 * size, rel=1e-6)
        factor = min(1, 1 / (5 * size + 1e-6))
        np.testing.assert_allclose(model.a.numpy()[0], -3 * size * factor, rtol=1e-6)
        np.testing.assert_allclose(model.b.numpy(), -4 * size * factor, rtol=1e-6)
        assert optimizer.steps == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_changes_nothing(device, bad):
    with strict_cupy.registered():
        models = [Two().to(device) for _ in range(2)]
        optimizers = [optim.AdamW(model, lr=0.1) for model in models]
        for step in range(4):
            for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                for gradient in [bad, 0.5 + step] if i else [0.5 + step]:  # the second model also gets bad gradients
                    model.a.grad, model.b.grad = np.full((1, 1), gradient, "f4"), np.full(1, 1.0, "f4")
                    with np.errstate(invalid="ignore"):
                        optimizer.step(1.0)
        assert [optimizer.steps for optimizer in optimizers] == [4, 4]
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            np.testing.assert_array_equal(p.numpy(), q.numpy())


# Comparison with PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("power", POWERS)
def test_errors_are_comparable_to_pytorchs(power):
    """Each error is at most four times PyTorch's, or a few units in the last place."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    R = np.random.default_rng(power + 100)
    size = np.float32(10.0**power)
    logits, targets = (R.normal(size=(4, 9)) + size).astype("f4"), R.integers(0, 9, 4)
    x, weight = R.normal(size=(4, 9)).astype("f4") * size, R.normal(size=9).astype("f4")
    many = (1 + R.random((30_000, 2))).astype("f4") * size
    cases = {
        "cross_entropy": (lambda t: ops.cross_entropy(t, targets),
                          lambda t: F.cross_entropy(t, torch.tensor(targets)), logits),
        "softmax": (lambda t: (ops.softmax(t) * Tensor(weight.astype(t.dtype))).sum(),
                    lambda t: (F.softmax(t, -1) * torch.tensor(weight, dtype=t.dtype)).sum(), logits),
        "gelu": (lambda t: ops.gelu(t).sum(), lambda t: F.gelu(t, approximate="tanh").sum(), x),
        "gelu, exact": (lambda t: ops.gelu(t, exact=True).sum(), lambda t: F.gelu(t).sum(), x),
        "sum": (lambda t: t.sum(axis=0)[0], lambda t: t.sum(0)[0], many),
        "mean": (lambda t: t.mean(axis=0)[1], lambda t: t.mean(0)[1], many),
        "layernorm": (lambda t: (ops.layernorm(t, Tensor(weight.astype(t.dtype)), Tensor(0 * t.data[0])) ** 2).sum(),
                      lambda t: (F.layer_norm(t, (9,), torch.tensor(weight, dtype=t.dtype)) ** 2).sum(), x),
    }  # fmt: skip

    def ours(function, values):
        t = Tensor(values, requires_grad=True)
        y = function(t)
        y.backward()
        return float(y.numpy()), t.grad

    def theirs(function, values):
        t = torch.tensor(values, requires_grad=True)
        y = function(t)
        y.backward()
        return float(y), t.grad.numpy()

    for name, (function, other, values) in cases.items():
        expected = theirs(other, values.astype("d"))
        for got, peer, correct in zip(ours(function, values), theirs(other, values), expected, strict=True):
            if not np.isfinite(correct).all():
                continue  # PyTorch's gradient of GELU overflows in float64
            unit = np.linalg.norm(correct) or 1e-30
            distance, allowed = (np.linalg.norm(np.asarray(z, "d") - correct) / unit for z in (got, peer))
            allowed = 4 * allowed if np.isfinite(allowed) else 0
            assert distance <= max(allowed, 2e-6), f"{name} at 1e{power}: {distance:.1e}"
