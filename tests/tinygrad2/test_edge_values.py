"""Zeros of both signs, subnormal and huge numbers, infinities and NaN.

This file tests comparisons, selections and losses, and cases in which PyTorch's result is less accurate than ours. The
table for elementwise operations is in test_methods.py.
"""

import decimal
import math
import operator

import numpy as np
import pytest

from tests.against_torch import differences
from tinygrad2 import Tensor, functional, ops

INF, NAN = math.inf, math.nan
EDGES = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 0.5, -0.5, 2.5, 30.0, -30.0, 800.0, -800.0, INF, -INF, NAN]
EDGES += [1e300, -1e300, 5e-324, -5e-324, 1e-310, 2.2250738585072014e-308]  # the last is the smallest normal number
PAIRS = [grid.reshape(-1).copy() for grid in np.meshgrid(EDGES, EDGES)]
PROBABILITIES = [0.0, 1.0, 0.25, 0.5]
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@pytest.fixture
def t():
    import torch

    return torch


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


# Comparisons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats_equal_numpys(name, dtype):
    compare = getattr(operator, name)
    a, b = (values.astype(dtype) for values in PAIRS)
    x = Tensor(a, requires_grad=True)
    y = compare(x, Tensor(b))
    assert y.dtype == bool
    assert not y.requires_grad
    np.testing.assert_array_equal(y.numpy(), compare(a, b))
    for number in EDGES:
        np.testing.assert_array_equal(compare(x, number).numpy(), compare(a, a.dtype.type(number)))
        np.testing.assert_array_equal(compare(number, x).numpy(), compare(a.dtype.type(number), a))


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_integers_and_booleans_equal_numpys(name):
    compare = getattr(operator, name)
    integers = np.array([0, 1, -1, 127, -128, 2**31 - 1, 2**53 + 1, 2**63 - 1, -(2**63)])
    flags = np.array([True, False])
    for number in (0, 1, -128, True, 2**53 + 1):
        np.testing.assert_array_equal(compare(Tensor(integers), number).numpy(), compare(integers, number))
        np.testing.assert_array_equal(compare(Tensor(flags), number).numpy(), compare(flags, number))
    for number in (0.5, 1.0, -0.0, INF, NAN):
        np.testing.assert_array_equal(compare(Tensor(integers), number).numpy(), compare(integers, np.float32(number)))
    np.testing.assert_array_equal(compare(Tensor(flags), Tensor(~flags)).numpy(), compare(flags, ~flags))


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_equal_pytorchs(name, dtype, t):
    compare = getattr(operator, name)
    a, b = (values.astype(dtype) for values in PAIRS)
    np.testing.assert_array_equal(compare(Tensor(a), Tensor(b)).numpy(), compare(t.tensor(a), t.tensor(b)).numpy())


# Selections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_maximum_and_minimum(name, dtype, t):
    pairs = [values.astype(dtype) for values in PAIRS]
    assert not differences(t, getattr(functional, name), getattr(t, name), pairs)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", COMPARISONS)
def test_where_of_a_comparison(name, t):
    """The operand that is not selected has gradient 0 for every value. A quotient in it gives NaN, as in PyTorch."""
    compare = getattr(operator, name)
    for ours, other in (
        (lambda a, b: functional.where(compare(a, b), a, b), lambda a, b: t.where(compare(a, b), a, b)),
        (lambda a, b: functional.where(compare(a, b), a / b, b), lambda a, b: t.where(compare(a, b), a / b, b)),
        (lambda a, b: a.masked_fill(compare(a, b), 0.0) * b, lambda a, b: a.masked_fill(compare(a, b), 0.0) * b),
    ):
        assert not differences(t, ours, other, PAIRS)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mse_and_l1_losses(dtype, t):
    pairs = [values.astype(dtype) for values in PAIRS]
    f = t.nn.functional
    assert not differences(
        t, lambda a, b: functional.mse_loss(a, b, "none"), lambda a, b: f.mse_loss(a, b, reduction="none"), pairs
    )
    found = differences(
        t, lambda a, b: functional.l1_loss(a, b, "none"), lambda a, b: f.l1_loss(a, b, reduction="none"), pairs
    )
    assert set(found) == {"gradient"}  # the gradient of |NaN| is NaN; PyTorch gives 0
    with np.errstate(all="ignore"):
        assert all(math.isnan(np.subtract(*pair)) for pair in found["gradient"])


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_binary_cross_entropy_with_logits(t):
    x, target = (grid.reshape(-1).copy() for grid in np.meshgrid(EDGES, PROBABILITIES))
    f = t.nn.functional.binary_cross_entropy_with_logits
    found = differences(
        t,
        lambda x, y: functional.binary_cross_entropy_with_logits(x, y, "none"),
        lambda x, y: f(x, y, reduction="none"),
        [x, target],
    )
    assert {x for x, _ in found["value"]} == {-30.0, -INF}  # PyTorch loses digits, and gives NaN for infinity
    assert set(found.get("gradient", [])) <= {(30.0, 1.0)}
    for x, target, expected in ((-30.0, 0.0, math.log1p(math.exp(-30))), (30.0, 1.0, math.log1p(math.exp(-30)))):
        logit = Tensor(np.array([x]), requires_grad=True)
        loss = functional.binary_cross_entropy_with_logits(logit, Tensor(np.array([target])))
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-15)
        assert logit.grad[0] == pytest.approx(math.copysign(math.exp(-30) / (1 + math.exp(-30)), -x), rel=1e-15)
    assert functional.binary_cross_entropy_with_logits(Tensor([-INF]), Tensor([1.0])).item() == INF


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_binary_cross_entropy(t):
    p, target = (
        grid.reshape(-1).copy() for grid in np.meshgrid([0.0, 1.0, 0.5, 5e-324, 1e-300, 1e-50, 0.25], PROBABILITIES)
    )
    found = differences(
        t,
        lambda p, y: functional.binary_cross_entropy(p, y, "none"),
        lambda p, y: t.nn.functional.binary_cross_entropy(p, y, reduction="none"),
        [p, target],
    )
    # PyTorch divides by max(p (1 - p), 1e-12), which loses 1 / (1 - p) for tiny p, and its derivative with respect to
    # the target does not use the bound of the logarithm, -100.
    assert set(found) == {"gradient"}
    assert {p for p, _ in found["gradient"]} <= {0.0, 1.0, 5e-324, 1e-300, 1e-50}
    for p, target, expected in (
        (0.0, 0.0, 1.0),
        (1e-50, 0.0, 1.0),
        (1.0, 1.0, -1.0),
        (1.0, 0.0, 1e12),
        (0.0, 1.0, -1e12),
    ):
        x = Tensor(np.array([p]), requires_grad=True)
        functional.binary_cross_entropy(x, Tensor(np.array([target]))).backward()
        assert x.grad[0] == expected


LOGITS = np.array(
    [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1000.0, -1000.0, 0.0], [-INF, 0.0, 1.0], [INF, 0.0, 1.0], [NAN, 0.0, 1.0],
     [-INF, -INF, -INF], [1e300, -1e300, 0.0], [5e-324, 0.0, -0.0], [INF, INF, 0.0], [-INF, -INF, 1.0]]
)  # fmt: skip
OPTIONS = [
    {"reduction": "none"}, {"reduction": "none", "ignore_index": 1}, {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "none", "weight": [0.5, 1.0, 0.0]}, {},
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_cross_entropy(target, options, t):
    theirs = dict(options)
    if "weight" in options:
        theirs["weight"] = t.tensor(options["weight"], dtype=t.float64)
    for rows in LOGITS[:, None] if not options else (LOGITS,):
        targets = np.full(len(rows), target)

        def other(x, targets=targets):
            return t.nn.functional.cross_entropy(x, t.tensor(targets), **theirs)

        def ours(x, targets=targets):
            return functional.cross_entropy(x, targets, **options)

        with np.errstate(all="ignore"):
            x, z = Tensor(rows, requires_grad=True), t.tensor(rows, requires_grad=True)
            y, expected = ours(x), other(z)
            y.sum().backward()
            expected.sum().backward()
        np.testing.assert_allclose(y.numpy(), expected.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(x.grad, z.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"ignore_index": 0}, {"weight": [1.0, 1.0, 1.0]}], ids=str)
def test_a_class_masked_by_minus_infinity_does_not_change_the_loss(options):
    logits = Tensor(np.array([[-INF, 0.0, 1.0]]), requires_grad=True)
    loss = functional.cross_entropy(logits, [2], **options)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    assert logits.grad[0, 0] == 0
    assert np.isfinite(logits.grad).all()


# Cases in which PyTorch's results are less accurate -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_power_minus_one_half_follows_ieee_754(dtype):
    values = [0.0, -0.0, INF, -INF, 4.0]  # PyTorch's rsqrt gives -inf at -0, and NaN at -inf
    y = Tensor(np.array(values, dtype)) ** -0.5
    assert y.numpy().tolist() == [INF, INF, 0.0, 0.0, 0.5]
    assert not np.signbit(y.numpy()).any()
    assert [math.pow(x, -0.5) for x in (INF, -INF, 4.0)] == [0.0, 0.0, 0.5]


def test_layernorm_of_a_large_mean_in_float64():
    """dx, about 1e-5, is a difference of numbers close to 1. PyTorch's result has 8 correct digits, ours has 10."""
    row, dy, weight = [10000.0, 10001.0, 10002.0, 10003.0], [1.0, 2.0, 3.0, 4.0], 1.5
    x = Tensor(np.array([row]), requires_grad=True)
    y = ops.layernorm(x, Tensor(np.full(4, weight)), Tensor(np.full(4, 0.1)))
    y.backward(np.array([dy]))
    with decimal.localcontext() as context:
        context.prec = 50
        mean = sum(map(decimal.Decimal, row)) / 4
        centered = [decimal.Decimal(value) - mean for value in row]
        variance = sum(c * c for c in centered) / 4
        rstd = 1 / (variance + decimal.Decimal(10) ** -5).sqrt()
        xhat, g = [c * rstd for c in centered], [decimal.Decimal(value) * decimal.Decimal(weight) for value in dy]
        mean_g, mean_gx = sum(g) / 4, sum(a * b for a, b in zip(g, xhat, strict=True)) / 4
        exact = [float(rstd * (a - mean_g - b * mean_gx)) for a, b in zip(g, xhat, strict=True)]
    np.testing.assert_allclose(x.grad[0], exact, rtol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_gelu_in_float32_agrees_with_float64(exact):
    """Values agree to 1e-7 and slopes to 2e-6 (PyTorch: 5e-7). Tails that float32 can represent do not become 0."""
    values = np.array([-100.0, -10.0, -5.0, -1e-3, -0.0, 0.0, 1e-3, 5.0, 10.0, 100.0, 1e4])
    results = []
    for dtype in ("float32", "float64"):
        x = Tensor(values.astype(dtype), requires_grad=True)
        y = ops.gelu(x, exact=exact)
        y.backward(np.ones(len(values), dtype))
        results.append((y.numpy().astype("float64"), x.grad.astype("float64")))
    for got, correct, atol in zip(*results, (1e-7, 2e-6), strict=True):
        np.testing.assert_allclose(got, correct, rtol=2e-7, atol=atol)
        assert (got[correct < -1e-40] < 0).all()
