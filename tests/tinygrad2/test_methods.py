"""The methods of Tensor, compared with PyTorch in float64: shapes, edge values, accuracy.

Other tests use the table in tinygrad2/gradcheck.py to test gradients against finite differences, memory layouts,
float32, and the stand-in for CuPy.
"""

import math

import numpy as np
import pytest

from tests.against_torch import compare, differences, theirs
from tinygrad2 import Tensor, functional

R = np.random.default_rng(0)


@pytest.fixture
def t():
    import torch

    return torch


# Shapes ---------------------------------------------------------------------------------------------------------------

ELEMENTWISE = """
    abs sign sqrt rsqrt square reciprocal exp exp2 expm1 log log1p log2 log10 erf floor ceil round trunc sin
    cos tan tanh sinh cosh arcsin arccos arctan arcsinh arccosh arctanh nan_to_num relu relu6 leaky_relu elu
    celu selu sigmoid logsigmoid silu mish softplus softsign hardtanh hardsigmoid hardswish quick_gelu
"""
UNARY = ELEMENTWISE.split()
BINARY = (
    "maximum",
    "minimum",
    "power",
    "logaddexp",
    "arctan2",
    "hypot",
    "remainder",
    "add",
    "subtract",
    "multiply",
    "divide",
)
SHAPES = [(), (0,), (2, 0, 3), (1,), (2, 1, 3)]


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", UNARY)
def test_unary_operations_with_any_shape(name, shape, t):
    with np.errstate(all="ignore"):
        compare(t, getattr(functional, name), theirs(t, name), [R.uniform(0.1, 0.9, shape)])


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("shapes", [((), ()), ((), (3,)), ((0, 3), (1, 3)), ((2, 1, 3), (4, 1)), ((1, 1), ())])
@pytest.mark.parametrize("name", BINARY)
def test_binary_operations_with_broadcasting(name, shapes, t):
    function = getattr(t, {"power": "pow"}.get(name, name))
    compare(
        t, getattr(functional, name), lambda t, a, b: function(a, b), [R.uniform(0.5, 2, shape) for shape in shapes]
    )


OVER_AN_AXIS = {  # our function and PyTorch's, called with a tensor and an axis
    "min": (lambda x, i: x.min(i), lambda x, i: x.amin(i)),
    "var": (lambda x, i: x.var(i), lambda x, i: x.var(i, correction=0)),
    "std": (lambda x, i: x.std(i), lambda x, i: x.std(i, correction=0)),
    "prod": (lambda x, i: x.prod(i), lambda x, i: x.prod(i)),
    "logsumexp": (lambda x, i: x.logsumexp(i), lambda x, i: x.logsumexp(i)),
    "softmax": (lambda x, i: x.softmax(i), lambda x, i: x.softmax(i)),
    "log_softmax": (lambda x, i: x.log_softmax(i), lambda x, i: x.log_softmax(i)),
    "cumsum": (lambda x, i: x.cumsum(i), lambda x, i: x.cumsum(i)),
    "cumprod": (lambda x, i: x.cumprod(i), lambda x, i: x.cumprod(i)),
    "sort": (lambda x, i: x.sort(i).values, lambda x, i: x.sort(i).values),
    "argmax": (lambda x, i: x.argmax(i), lambda x, i: x.argmax(i)),
    "argmin": (lambda x, i: x.argmin(i), lambda x, i: x.argmin(i)),
    "flip": (lambda x, i: x.flip(i), lambda x, i: x.flip(i)),
    "roll": (lambda x, i: x.roll(2, i), lambda x, i: x.roll(2, i)),
    "squeeze": (lambda x, i: x.squeeze(i), lambda x, i: x.squeeze(i)),
    "unsqueeze": (lambda x, i: x.unsqueeze(i), lambda x, i: x.unsqueeze(i)),
    "all": (lambda x, i: (x > 0).all(i), lambda x, i: (x > 0).all(i)),
    "any": (lambda x, i: (x > 0).any(i), lambda x, i: (x > 0).any(i)),
}
UNDEFINED_IF_EMPTY = ("min", "argmax", "argmin")


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (4, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", OVER_AN_AXIS)
def test_operations_over_an_axis_with_any_shape(name, shape, axis, t):
    ours, other = OVER_AN_AXIS[name]
    if name == "roll" and not shape:
        return  # not supported by PyTorch
    x = R.normal(size=shape)
    if name in UNDEFINED_IF_EMPTY and shape and shape[axis] == 0:
        with pytest.raises(ValueError, match=r"shape"):
            ours(Tensor(x), axis)
        return
    with np.errstate(all="ignore"):
        compare(t, lambda x: ours(x, axis), lambda t, x: other(x, axis), [x])


@pytest.mark.parametrize("name", ["prod", "var", "std", "logsumexp", "norm", "min"])
def test_reductions_over_several_axes_with_keepdims(name):
    x = Tensor(R.normal(size=(2, 3, 4)))
    y = getattr(x, name)(axis=(0, -1), keepdims=True)
    assert y.shape == (1, 3, 1)
    rows = Tensor(x.data.transpose(1, 0, 2).reshape(3, 8))
    np.testing.assert_allclose(y.numpy().reshape(3), getattr(rows, name)(axis=1).numpy(), rtol=1e-13)


def test_argmax_and_argmin_without_an_axis():
    x = Tensor([[1.0, 5.0], [0.0, 5.0]])
    assert x.argmax().item() == 1
    assert x.argmin(keepdims=True).numpy().tolist() == [[2]]
    assert x.argmax(0, keepdims=True).numpy().tolist() == [[0, 0]]
    assert x.argmax(1).dtype == np.int64


# Edge values ----------------------------------------------------------------------------------------------------------

EDGES = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 2.5, 30.0, -30.0, 800.0, -800.0]
EDGES += [math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-310]
# Differences from PyTorch for NaN: (operation, value or gradient), and the reason. Signs of zeros are not compared.
NAN_PROPAGATES = "the value is NaN, or its slope is unknown; we return NaN, as NumPy does"
DIFFERENCES = {
    ("sign", "value"): NAN_PROPAGATES,
    ("abs", "gradient"): NAN_PROPAGATES,
    ("elu", "gradient"): NAN_PROPAGATES,
    ("celu", "gradient"): NAN_PROPAGATES,
    ("selu", "gradient"): NAN_PROPAGATES,
}


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", UNARY)
def test_edge_values_of_unary_operations(name, t):
    other = theirs(t, name)
    found = differences(t, getattr(functional, name), lambda x: other(t, x), [np.array(EDGES)])
    assert {(name, which) for which in found} == {key for key in DIFFERENCES if key[0] == name}
    assert all(math.isnan(x) for inputs in found.values() for (x,) in inputs)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", [name for name in BINARY if name != "power"] + ["pow"])
def test_edge_values_of_binary_operations(name, t):
    a, b = (grid.reshape(-1).copy() for grid in np.meshgrid(EDGES, EDGES))
    found = differences(t, getattr(functional, name), getattr(t, name), [a, b])
    if name == "remainder":  # PyTorch's a / b overflows; NumPy's and our results are exact
        assert {b for _, b in found.pop("value")} == {1e-310}
    assert not found


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, -2, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -0.5, -1.0, -2.0])
def test_edge_values_of_powers(exponent, t):
    found = differences(t, lambda x: x**exponent, lambda x: x**exponent, [np.array(EDGES)])
    if exponent == -0.5:  # PyTorch uses rsqrt; NumPy and this project use the pow of IEEE 754
        assert {x for (x,) in found.pop("value")} - {0.0} == {-math.inf}  # PyTorch's sign at -0 differs
    assert not found


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_ties_zeros_and_bounds(t):
    x = np.array([[2.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    for ours, other in (
        (lambda x: x.min(1), lambda x: x.amin(1)),
        (lambda x: x.prod(1), lambda x: x.prod(1)),
        (lambda x: x.std(1), lambda x: x.std(1, correction=0)),
        (lambda x: x.norm(axis=0), lambda x: t.linalg.vector_norm(x, dim=0)),
        (lambda x: x.clip(2.0, 3.0), lambda x: x.clip(2, 3)),
        (lambda x: x.clip(3.0, 2.0), lambda x: x.clip(3, 2)),
        (lambda x: x.cumprod(1), lambda x: x.cumprod(1)),
    ):
        assert not differences(t, ours, other, [x])


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("row", [[-math.inf, 0.0], [math.inf, 0.0], [math.nan, 0.0], [1e300, -1e300], [800.0, 801.0]])
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_edge_values_of_softmax_functions(name, row, t):
    found = differences(
        t, lambda x: getattr(x, name)(-1), lambda x: getattr(x, name)(-1), [np.array([row, [1.0, 2.0]])]
    )
    assert not found


# Numerics -------------------------------------------------------------------------------------------------------------


def test_large_arguments_neither_overflow_nor_lose_precision():
    with np.errstate(all="raise", under="ignore"):
        x = Tensor(np.array([-800.0, -40.0, 0.0, 40.0, 800.0]), requires_grad=True)
        np.testing.assert_allclose(x.sigmoid().numpy(), [0, math.exp(-40), 0.5, 1, 1], rtol=1e-15)
        np.testing.assert_allclose(x.softplus().numpy(), [0, math.exp(-40), math.log(2), 40, 800], rtol=1e-15)
        np.testing.assert_allclose(x.logsigmoid().numpy(), [-800, -40, -math.log(2), -math.exp(-40), 0], rtol=1e-15)
        (x.sigmoid() + x.softplus() + x.silu() + x.logaddexp(1.0) + x.elu() + x.mish()).sum().backward()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7, 1e8, -1e8])
def test_log_softmax_and_cross_entropy_do_not_depend_on_an_offset(offset):
    logits = Tensor(np.float32([[offset, offset], [offset, offset + 64]]), requires_grad=True)
    y = logits.log_softmax()
    np.testing.assert_allclose(y.numpy(), [[-math.log(2)] * 2, [-64, 0]], rtol=1e-6)
    functional.cross_entropy(logits, [0, 1], reduction="sum").backward()
    np.testing.assert_allclose(logits.grad, [[-0.5, 0.5], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("name", ["var", "std"])
def test_variance_with_a_large_mean(name):
    x = np.float32(1e4) + np.arange(8, dtype=np.float32)
    expected = getattr(np, name)(x.astype(np.float64))
    assert getattr(Tensor(x), name)().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [*UNARY, "softmax", "logsumexp", "var", "std", "norm"])
def test_integers_give_the_same_float32_values_as_floats(name):
    x = np.array([1, 2, 3])
    integral = ("abs", "sign", "square", "floor", "ceil", "round", "trunc", "relu", "nan_to_num")
    with np.errstate(all="ignore"):
        y = getattr(functional, name)(Tensor(x))
        expected = getattr(functional, name)(Tensor(x.astype("float32")))
    assert name in integral or y.dtype == np.float32
    np.testing.assert_allclose(y.numpy(), expected.numpy())


def test_numpy_scalars_do_not_promote():
    x, number = Tensor([0.5, -0.5, 2.0]), np.float64(0.25)
    for y in (
        x.clip(-number, number), x.hardtanh(-number, number), x.leaky_relu(number), x.elu(number), x.celu(number),
        x.maximum(number), x.where(np.array([True, False, True]), number), x.masked_fill(x > 0, number),
        x.lerp(number, number), x.abs() ** number, x.pad(1, constant_values=number), x.var(ddof=np.int64(1)),
    ):  # fmt: skip
        assert y.dtype == np.float32


def test_methods_of_integers_and_booleans():
    booleans, small = Tensor(np.array([True, True, False])), Tensor(np.array([100, 2, -3], dtype="int8"))
    assert booleans.cumsum(0).numpy().tolist() == [1, 2, 2]
    assert booleans.prod().dtype == np.int64
    assert small.prod().item() == -600
    assert small.cumsum(0).numpy().tolist() == [100, 102, 99]
    assert small.clip(-1, 5).numpy().tolist() == [5, 2, -1]
    assert small.clip(-1, 5).dtype == np.int8
    assert small.clip(max=2.5).dtype == np.float32
    assert small.clip().numpy().tolist() == [100, 2, -3]
    assert small.maximum(booleans).dtype == np.int8
    assert functional.where(booleans, small, 0.5).dtype == np.float32
    assert functional.concatenate([small, Tensor([0.5])]).dtype == np.float32
    assert functional.stack([booleans, small]).numpy().tolist() == [[1, 1, 0], [100, 2, -3]]
