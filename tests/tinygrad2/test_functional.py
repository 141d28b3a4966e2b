"""The operations of methods.py and functional.py beside PyTorch's, in float64: values, gradients, edge values, errors.

Their gradients against finite differences, every memory layout, float32 and the stand-in for CuPy: the table of
tinygrad2/gradcheck.py, which other tests go through.
"""

import inspect
import math

import numpy as np
import pytest

import tinygrad2
from tinygrad2 import Key, Tensor, functional, gradcheck, methods, no_grad, ops
from tinygrad2.gradcheck import COMPOSITIONS, PLACES, SELECTED, TARGETS, VISIBLE, WEIGHTS

R = np.random.default_rng(0)


@pytest.fixture
def t():
    import torch

    return torch


# What PyTorch calls each row of gradcheck's table: a function of the module torch and of the inputs.
THEIRS = {
    "arccosh": lambda t, x: t.arccosh(x + 1),
    "elu": lambda t, x: t.nn.functional.elu(x),
    "elu, alpha": lambda t, x: t.nn.functional.elu(x, 0.5),
    "celu": lambda t, x: t.nn.functional.celu(x),
    "celu, alpha": lambda t, x: t.nn.functional.celu(x, 0.5),
    "hardsigmoid": lambda t, x: t.nn.functional.relu6(x + 3) / 6,  # PyTorch's own multiplies by float32(1 / 6)
    "quick_gelu": lambda t, x: x * t.sigmoid(1.702 * x),
    "log_softmax": lambda t, x: x.log_softmax(-1),
    "log_softmax, axis": lambda t, x: x.log_softmax(0),
    "logsumexp": lambda t, x: x.reshape(-1).logsumexp(0),
    "logsumexp, axes": lambda t, x: x.logsumexp((0, 2), keepdim=True),
    "softmax, axis": lambda t, x: x.softmax(1),
    "var": lambda t, x: x.var(correction=0),
    "var, axes": lambda t, x: x.var((0, 2), correction=1),
    "std": lambda t, x: x.std(correction=0),
    "std, axis": lambda t, x: x.std(-1, correction=1, keepdim=True),
    "norm": lambda t, x: t.linalg.vector_norm(x),
    "norm, axis": lambda t, x: t.linalg.vector_norm(x, dim=1),
    "cumsum": lambda t, x: x.reshape(-1).cumsum(0),
    "cumsum, axis": lambda t, x: x.cumsum(1),
    "cumprod": lambda t, x: x.reshape(-1).cumprod(0),
    "cumprod, axis": lambda t, x: x.cumprod(0),
    "rmsnorm": lambda t, x: t.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5),
    "rmsnorm, weight": lambda t, x, w: t.nn.functional.rms_norm(x, x.shape[-1:], w, eps=1e-5),
    "layernorm, no weight": lambda t, x: t.nn.functional.layer_norm(x, x.shape[-1:]),
    "layernorm, no bias": lambda t, x, w: t.nn.functional.layer_norm(x, x.shape[-1:], w),
    "sort": lambda t, x: tuple(x.sort(-1)),
    "sort, descending": lambda t, x: x.sort(0, descending=True).values,
    "topk": lambda t, x: x.topk(2, 1).values,
    "flip": lambda t, x: x.flip((0, 1, 2)),
    "flip, axes": lambda t, x: x.flip((0, -1)),
    "trace": lambda t, x: x.diagonal().sum(-1),
    "clip": lambda t, x: x.clip(-1, 1),
    "clip, one bound": lambda t, x: x.clip(max=0),
    "maximum, a number": lambda t, x: t.maximum(x, t.zeros_like(x)),
    "power": lambda t, a, b: a**b,
    "power, broadcast": lambda t, a, b: a**b,
    "power, of a number": lambda t, x: 2.5**x,
    "remainder": lambda t, a, b: t.remainder(a, b + 9.13),
    "where": lambda t, a, b: t.where(t.as_tensor(SELECTED), a, b),
    "where, broadcast": lambda t, a, b: t.where(t.as_tensor(SELECTED), a, b),
    "masked_fill": lambda t, x: x.masked_fill(t.as_tensor(SELECTED), 2.0),
    "min": lambda t, x: x.amin((0, 1)),
    "min, axes": lambda t, x: x.amin((0, -1)),
    "prod, axes": lambda t, x: x.prod(2, keepdim=True).prod(0, keepdim=True),
    "prod, zeros": lambda t, x: (x * t.tensor([[0.0], [1.0], [1.0]], dtype=x.dtype)).prod(1),
    "squeeze, axis": lambda t, x: x.squeeze(1),
    "unsqueeze": lambda t, x: x.unsqueeze(-2),
    "expand_dims": lambda t, x: x.unsqueeze(0),
    "flatten, axes": lambda t, x: x.flatten(1, 2),
    "unflatten": lambda t, x: x.unflatten(1, (2, 3)),
    "permute": lambda t, x: x.permute(2, 0, 1),
    "swapaxes": lambda t, x: x.swapaxes(0, -1),
    "moveaxis": lambda t, x: x.moveaxis(0, 2),
    "roll": lambda t, x: x.roll(5),
    "roll, axes": lambda t, x: x.roll((1, -2), (0, 2)),
    "broadcast_to": lambda t, x: x.broadcast_to((2, 3, 4)),
    "expand": lambda t, x: x.expand(2, -1, 4),
    "repeat": lambda t, x: x.repeat_interleave(3, 1),
    "repeat, counts": lambda t, x: x.repeat_interleave(t.tensor([2, 0, 1]), 0),
    "tile": lambda t, x: x.tile(2, 1, 3),
    "split": lambda t, x: x.split(2, 1),
    "split, sizes": lambda t, x: x.split((1, 4), -1),
    "chunk": lambda t, x: x.chunk(3, 1),
    "pad": lambda t, x: t.nn.functional.pad(x, (2, 3, 1, 0), value=0.5),
    "pad, reflect": lambda t, x: t.nn.functional.pad(x[None, None], (2, 2, 2, 2), mode="reflect")[0, 0],
    "pad, edge": lambda t, x: t.nn.functional.pad(x[None, None], (1, 2, 1, 2), mode="replicate")[0, 0],
    "gather": lambda t, x: x.gather(1, t.as_tensor(PLACES)),
    "take": lambda t, x: x[:, t.as_tensor(PLACES)],
    "diagonal, offset": lambda t, x: x.diagonal(1, -2, 0),
    "diag": lambda t, x: x.diag(-1),
    "tril, diagonal": lambda t, x: x.tril(-1),
    "triu, diagonal": lambda t, x: x.triu(1),
    "dot": lambda t, a, b: t.tensordot(a, b, 1),
    "outer": lambda t, a, b: t.outer(a, b.reshape(-1)),
    "tensordot, axes": lambda t, a, b: t.tensordot(a, b, ((0, 2), (1, 0))),
    "matmul, function": lambda t, a, b: a @ b,
    "einsum, matrices": lambda t, a, b: t.einsum("ij,jk->ik", a, b),
    "einsum, batch": lambda t, a, b: t.einsum("bhid,bhjd->bhij", a, b),
    "einsum, three": lambda t, a, b, c: t.einsum("ai,bij,cj->abc", a, b, c),
    "einsum, diagonal": lambda t, a: t.einsum("iij->ji", a),
    "einsum, trace": lambda t, a, b: t.einsum("ii,jk", a, b),
    "einsum, dots": lambda t, a, b: t.einsum("...ij,j...->...i", a, b),
    "concatenate": lambda t, a, b: t.cat([a, b, a], 1),
    "concatenate, flattened": lambda t, a, b: t.cat([a.reshape(-1), b]),
    "stack, axis": lambda t, a, b: t.stack([a, b], -1),
    "vstack": lambda t, a, b: t.vstack([a, b]),
    "hstack, two": lambda t, a, b: t.hstack([a, b]),
    "meshgrid": lambda t, a, b: t.meshgrid(a, b, indexing="xy"),
    "add, function": lambda t, a, b: a + b,
    "subtract, function": lambda t, a, b: a - b,
    "multiply, function": lambda t, a, b: a * b,
    "divide, function": lambda t, a, b: a / b,
    "rotary_embedding": lambda t, x: rotated(t, x, 3, interleaved=False),
    "rotary_embedding, interleaved": lambda t, x: rotated(t, x, 0, interleaved=True),
    "scaled_dot_product_attention": lambda t, q, k, v: t.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
    ),
    "scaled_dot_product_attention, mask": lambda t, q, k, v: t.nn.functional.scaled_dot_product_attention(
        q, k, v, t.as_tensor(VISIBLE), enable_gqa=True
    ),
    "scaled_dot_product_attention, bias": lambda t, q, k, v, bias: t.nn.functional.scaled_dot_product_attention(
        q, k, v, bias, enable_gqa=True
    ),
    "scaled_dot_product_attention, causal, dropout": None,  # the random numbers differ
    "l1_loss": lambda t, a, b: t.nn.functional.l1_loss(a, b + 9, reduction="sum"),
    "nll_loss": lambda t, x: t.nn.functional.nll_loss(x.reshape(10, 11), t.as_tensor(TARGETS).reshape(10)),
    "binary_cross_entropy": lambda t, p, y: t.nn.functional.binary_cross_entropy(p / 4, y / 4),
    "binary_cross_entropy_with_logits": lambda t, x, y: t.nn.functional.binary_cross_entropy_with_logits(
        x, y, reduction="none"
    ),
    "cross_entropy, options": lambda t, x: t.nn.functional.cross_entropy(
        x.moveaxis(-1, 1), t.as_tensor(TARGETS), t.as_tensor(WEIGHTS), ignore_index=3, label_smoothing=0.1
    ),
    "cross_entropy, none": lambda t, x: t.nn.functional.cross_entropy(
        x.moveaxis(-1, 1), t.as_tensor(TARGETS), reduction="none", label_smoothing=0.1
    ),
    "cross_entropy, shares": lambda t, x, y: t.nn.functional.cross_entropy(x, y.softmax(-1)),
}


def rotated(t, x, first, interleaved):
    """The rotary embedding as complex numbers: u + iv times e^(i angle)."""
    T, D = x.shape[-2:]
    angle = (t.arange(T) + first)[:, None] * 10000.0 ** (-t.arange(0, D, 2, dtype=x.dtype) / D)
    u, v = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : D // 2], x[..., D // 2 :])
    y = t.complex(u, v) * t.polar(t.ones_like(angle), angle)
    return t.stack([y.real, y.imag], -1).reshape(x.shape) if interleaved else t.cat([y.real, y.imag], -1)


def theirs(t, name):
    """PyTorch's function for a row of the table: that of THEIRS, or the one of the same name."""
    if name in THEIRS:
        return THEIRS[name]
    plain = name.split(",")[0]
    function = next(f for f in (getattr(m, plain, None) for m in (t, t.nn.functional)) if f is not None)
    return lambda t, *inputs: function(*inputs)


def gradients_of(results, inputs, dy):
    """The gradients of the results, weighted by dy, with respect to PyTorch's inputs."""
    total = sum((y * g).sum() for y, g in zip(results, dy, strict=True))
    total.backward()
    return [np.zeros(tuple(x.shape)) if x.grad is None else x.grad.numpy() for x in inputs]


def compare(t, ours, theirs, arrays, rtol=1e-12, atol=1e-13):
    """Values and gradients of both, of the results of a floating-point type."""
    ours_in = [Tensor(array, requires_grad=True) for array in arrays]
    theirs_in = [t.tensor(array, requires_grad=True) for array in arrays]
    got, expected = ours(*ours_in), theirs(t, *theirs_in)
    got = got if isinstance(got, tuple) else (got,)
    expected = tuple(expected) if isinstance(expected, tuple | list) else (expected,)
    assert len(got) == len(expected)
    dy = []
    for a, b in zip(got, expected, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=rtol, atol=atol)
        dy.append(np.linspace(0.5, 1.5, a.size).reshape(a.shape))
    floats = [i for i, a in enumerate(got) if a.dtype.kind == "f"]
    if not any(expected[i].requires_grad for i in floats):
        return
    wanted = gradients_of([expected[i] for i in floats], theirs_in, [t.as_tensor(dy[i]) for i in floats])
    total = None
    for i in floats:
        part = (got[i] * dy[i]).sum()
        total = part if total is None else total + part
    total.backward()
    for x, g in zip(ours_in, wanted, strict=True):
        np.testing.assert_allclose(np.zeros(x.shape) if x.grad is None else x.grad, g, rtol=rtol, atol=atol)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("case", COMPOSITIONS, ids=lambda case: case.name)
def test_values_and_gradients_equal_pytorchs(case, t):
    random = np.random.default_rng(3)
    arrays = [case.draw(random, shape) for shape in case.shapes]
    if THEIRS.get(case.name, "same name") is not None:
        compare(t, case.fn, theirs(t, case.name), arrays)


# Shapes ---------------------------------------------------------------------------------------------------------------

UNARY = (
    "abs sign sqrt rsqrt square reciprocal exp exp2 expm1 log log1p log2 log10 erf floor ceil round trunc sin cos tan tanh "
    "sinh cosh arcsin arccos arctan arcsinh arccosh arctanh nan_to_num relu relu6 leaky_relu elu celu selu sigmoid "
    "logsigmoid silu mish softplus softsign hardtanh hardsigmoid hardswish quick_gelu"
).split()
BINARY = "maximum minimum power logaddexp arctan2 hypot remainder add subtract multiply divide".split()
SHAPES = [(), (0,), (2, 0, 3), (1,), (2, 1, 3)]


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", UNARY)
def test_one_operand_of_any_shape(name, shape, t):
    with np.errstate(all="ignore"):
        compare(t, getattr(functional, name), theirs(t, name), [R.uniform(0.1, 0.9, shape)])


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("shapes", [((), ()), ((), (3,)), ((0, 3), (1, 3)), ((2, 1, 3), (4, 1)), ((1, 1), ())])
@pytest.mark.parametrize("name", BINARY)
def test_two_operands_that_broadcast(name, shapes, t):
    function = {"power": t.pow}.get(name) or theirs_of_two(t, name)
    compare(t, getattr(functional, name), function, [R.uniform(0.5, 2, shape) for shape in shapes])


def theirs_of_two(t, name):
    function = getattr(t, name)
    return lambda t, a, b: function(a, b)


OVER_AN_AXIS = {  # ours, PyTorch's: of a tensor and an axis
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
NO_ELEMENT = ("min", "argmax", "argmin")


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (4, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", OVER_AN_AXIS)
def test_over_an_axis_of_any_shape(name, shape, axis, t):
    ours, other = OVER_AN_AXIS[name]
    x = R.normal(size=shape)
    if name in NO_ELEMENT and shape and shape[axis] == 0:
        with pytest.raises(ValueError, match=r"shape"):
            ours(Tensor(x), axis)
        return
    with np.errstate(all="ignore"):
        compare(t, lambda x: ours(x, axis), lambda t, x: other(x, axis), [x])


@pytest.mark.parametrize("name", ["prod", "var", "std", "logsumexp", "norm", "min"])
def test_over_several_axes_and_kept(name):
    x = Tensor(R.normal(size=(2, 3, 4)))
    y = getattr(x, name)((0, -1), keepdims=True)
    assert y.shape == (1, 3, 1)
    rows = Tensor(x.data.transpose(1, 0, 2).reshape(3, 8))
    np.testing.assert_allclose(y.numpy().reshape(3), getattr(rows, name)(1).numpy(), rtol=1e-13)


def test_argmax_and_argmin_without_an_axis():
    x = Tensor([[1.0, 5.0], [0.0, 5.0]])
    assert x.argmax().item() == 1
    assert x.argmin(keepdims=True).numpy().tolist() == [[2]]
    assert x.argmax(0, keepdims=True).numpy().tolist() == [[0, 0]]
    assert x.argmax(1).dtype == np.int64


# Edge values ----------------------------------------------------------------------------------------------------------

EDGES = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 2.5, 30.0, -30.0, 800.0, -800.0]
EDGES += [math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-310]
# Where we differ from PyTorch, and why: (operation, which, of NaN). Signs of zeros are not compared.
NAN_STAYS = "the value is NaN, or its slope is unknown: we answer NaN as NumPy does"
DIFFERENCES = {
    ("sign", "value"): NAN_STAYS,
    ("abs", "gradient"): NAN_STAYS,
    ("elu", "gradient"): NAN_STAYS,
    ("celu", "gradient"): NAN_STAYS,
    ("selu", "gradient"): NAN_STAYS,
}


@np.errstate(all="ignore")
def differences(t, ours, other, arrays):
    """(which, places) of the results and gradients that are not PyTorch's."""
    ours_in = [Tensor(array, requires_grad=True) for array in arrays]
    theirs_in = [t.tensor(array, requires_grad=True) for array in arrays]
    y, expected = ours(*ours_in), other(*theirs_in)
    y.backward(np.ones(y.shape))
    expected.backward(t.ones_like(expected))
    for which, a, b in (
        ("value", y.numpy(), expected.detach().numpy()),
        *(("gradient", x.grad, z.grad.numpy()) for x, z in zip(ours_in, theirs_in, strict=True)),
    ):
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= 1e-12 * np.abs(b))
        if not same.all():
            yield which, [tuple(float(array[i]) for array in arrays) for i in np.flatnonzero(~same)]


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", UNARY)
def test_edge_values_of_one_operand(name, t):
    other = theirs(t, name)
    found = dict(differences(t, getattr(functional, name), lambda x: other(t, x), [np.array(EDGES)]))
    assert {(name, which) for which in found} == {key for key in DIFFERENCES if key[0] == name}
    assert all(math.isnan(x) for places in found.values() for (x,) in places)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", [name for name in BINARY if name != "power"] + ["pow"])
def test_edge_values_of_two_operands(name, t):
    a, b = (grid.reshape(-1).copy() for grid in np.meshgrid(EDGES, EDGES))
    found = dict(differences(t, getattr(functional, name), getattr(t, name), [a, b]))
    assert not found


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_ties_zeros_and_bounds(t):
    x = np.array([[2.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    for ours, other in (
        (lambda x: x.min(1), lambda x: x.amin(1)),
        (lambda x: x.prod(1), lambda x: x.prod(1)),
        (lambda x: x.std(1), lambda x: x.std(1, correction=0)),
        (lambda x: x.norm(0), lambda x: t.linalg.vector_norm(x, dim=0)),
        (lambda x: x.clip(2.0, 3.0), lambda x: x.clip(2, 3)),
        (lambda x: x.clip(3.0, 2.0), lambda x: x.clip(3, 2)),
        (lambda x: x.cumprod(1), lambda x: x.cumprod(1)),
    ):
        assert not dict(differences(t, ours, other, [x]))


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("row", [[-math.inf, 0.0], [math.inf, 0.0], [math.nan, 0.0], [1e300, -1e300], [800.0, 801.0]])
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_edge_values_of_a_row(name, row, t):
    found = dict(
        differences(t, lambda x: getattr(x, name)(-1), lambda x: getattr(x, name)(-1), [np.array([row, [1.0, 2.0]])])
    )
    assert not found


# Numerics -------------------------------------------------------------------------------------------------------------


def test_nothing_overflows_and_digits_are_kept():
    with np.errstate(all="raise", under="ignore"):
        x = Tensor(np.array([-800.0, -40.0, 0.0, 40.0, 800.0]), requires_grad=True)
        np.testing.assert_allclose(x.sigmoid().numpy(), [0, math.exp(-40), 0.5, 1, 1], rtol=1e-15)
        np.testing.assert_allclose(x.softplus().numpy(), [0, math.exp(-40), math.log(2), 40, 800], rtol=1e-15)
        np.testing.assert_allclose(x.logsigmoid().numpy(), [-800, -40, -math.log(2), -math.exp(-40), 0], rtol=1e-15)
        (x.sigmoid() + x.softplus() + x.silu() + x.logaddexp(1.0) + x.elu() + x.mish()).sum().backward()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7, 1e8, -1e8])
def test_log_softmax_and_its_loss_do_not_depend_on_an_offset(offset):
    logits = Tensor(np.float32([[offset, offset], [offset, offset + 64]]), requires_grad=True)
    y = logits.log_softmax()
    np.testing.assert_allclose(y.numpy(), [[-math.log(2)] * 2, [-64, 0]], rtol=1e-6)
    ops.cross_entropy(logits, [0, 1], reduction="sum").backward()
    np.testing.assert_allclose(logits.grad, [[-0.5, 0.5], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("name", ["var", "std"])
def test_variance_with_a_large_mean(name):
    x = np.float32(1e4) + np.arange(8, dtype=np.float32)
    expected = getattr(np, name)(x.astype(np.float64))
    assert getattr(Tensor(x), name)().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [*UNARY, "softmax", "logsumexp", "var", "std", "norm"])
def test_integers_become_float32_and_have_the_values_of_floats(name):
    x = np.array([1, 2, 3])
    whole = ("abs", "sign", "square", "floor", "ceil", "round", "trunc", "relu", "relu6", "nan_to_num")
    with np.errstate(all="ignore"):
        y = getattr(functional, name)(Tensor(x))
        expected = getattr(functional, name)(Tensor(x.astype("float32")))
    assert name in whole or y.dtype == np.float32
    np.testing.assert_allclose(y.numpy(), expected.numpy())


# Functions and methods ------------------------------------------------------------------------------------------------


def test_every_operation_has_a_row_in_the_table():
    rows = {case.name.split(",")[0] for case in gradcheck.CASES}
    without_gradient = {"all", "any", "argmax", "argmin", "argsort", "isnan", "isinf", "isfinite"}
    create = {
        "arange",
        "eye",
        "full",
        "full_like",
        "linspace",
        "one_hot",
        "ones",
        "ones_like",
        "rand",
        "randn",
        "zeros",
    }
    same = {"absolute", "amax", "amin", "cat", "clamp", "mod", "pow", "swish"}
    public = {
        name
        for name, value in vars(functional).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ != "functools"
    }
    assert public - {"axis_of", "get_backend"} - without_gradient - create - same - {"zeros_like"} <= rows


def test_every_method_is_a_function():
    own = {name for name, value in vars(methods.Methods).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {name for name in own if not hasattr(functional, name)} == {"view", "permute"} - vars(functional).keys()
    for name in own & vars(functional).keys():
        assert getattr(functional, name).__doc__


def test_functions_take_arrays_numbers_and_lists():
    x = Tensor([1.0, -2.0], requires_grad=True)
    assert functional.relu([1.0, -2.0]).numpy().tolist() == [1, 0]
    assert functional.maximum(0, x).numpy().tolist() == [1, 0]
    assert functional.maximum(np.array([0.5, 0.5]), x).dtype == np.float32
    assert functional.where(np.array([True, False]), 5.0, x).numpy().tolist() == [5, -2]
    assert functional.concatenate([np.zeros(1), x]).dtype == np.float32
    assert (2**x).numpy().tolist() == [2, 0.25]
    assert tinygrad2.relu is functional.relu


# Errors ---------------------------------------------------------------------------------------------------------------

X = Tensor(np.arange(6.0).reshape(2, 3))
ERRORS = [
    (lambda: X.softmax(2), ValueError, "softmax: axis 2 is out of range"),
    (lambda: X.var("a"), TypeError, "var: axis is 'a'; expected an integer"),
    (lambda: X.prod((0, 0)), ValueError, r"prod: .*twice"),
    (lambda: X.maximum(np.ones(2)), ValueError, r"maximum: .*\(2, 3\).*\(2,\)"),
    (lambda: X.where(np.ones((2, 3)), 0.0), TypeError, "where: condition is of dtype float64; expected booleans"),
    (lambda: X.where(np.ones(2, dtype=bool), 0.0), ValueError, r"where: shapes \(2,\)"),
    (lambda: X.clip("a"), TypeError, "clip: min is of type str; expected a number"),
    (lambda: X.gather(1, [[0, 3]]), IndexError, "gather: index 3 is out of range for an axis of length 3"),
    (lambda: X.gather(1, [0, 1]), ValueError, r"gather: index has shape \(2,\); expected at most \(2, 3\)"),
    (lambda: X.gather(1, [[0.5]]), TypeError, "gather: the indices are of dtype float64; expected integers"),
    (lambda: X.take([7], 0), IndexError, "take: index 7 is out of range for an axis of length 2"),
    (lambda: X.split((1, 1), 1), ValueError, r"split: the sizes \[1, 1\] sum to 2; expected 3"),
    (lambda: X.split(0), ValueError, "split: size is 0; expected 1 or more"),
    (lambda: X.chunk(0), ValueError, "chunk: chunks is 0"),
    (lambda: X.broadcast_to(3, 3), ValueError, r"broadcast_to: shape \(2, 3\) does not broadcast to \(3, 3\)"),
    (lambda: X.expand(2), ValueError, r"broadcast_to: shape \(2, 3\)"),
    (lambda: X.flatten(1, 0), ValueError, "flatten: start_dim is 1 and end_dim 0"),
    (lambda: X.repeat(-1, 0), ValueError, "repeat: repeats is -1"),
    (lambda: X.repeat((1, 2, 3), 0), ValueError, "repeat: repeats is"),
    (lambda: X.roll((1, 2), 0), ValueError, "roll: 2 shifts for 1 axes"),
    (lambda: X.pad((1, 2, 3)), ValueError, "pad: pad_width is"),
    (lambda: X.pad(1, mode="none"), ValueError, "pad: mode 'none'"),
    (lambda: X.topk(4), ValueError, "topk: k is 4; expected 0 <= k <= 3"),
    (lambda: X.diag(0).diagonal(), ValueError, r"diagonal: axes 0 and 1 of shape \(2,\)|diagonal: axis 1"),
    (lambda: X.sum(0).tril(), ValueError, r"tril: the tensor has shape \(3,\)"),
    (lambda: X.tensordot(X, 1), ValueError, r"tensordot: the axes have lengths \[3\] and \[2\]"),
    (lambda: X.hardtanh(1.0, 0.0), ValueError, "hardtanh: min_val is 1.0"),
    (lambda: X.unflatten(1, (2, 2)), ValueError, "fit"),
    (lambda: X.moveaxis(0, 5), ValueError, "moveaxis: axis 5 is out of range"),
    (
        lambda: functional.concatenate([X, X[0]]),
        ValueError,
        r"concatenate: tensor 1 has shape \(3,\); expected \(2, 3\)",
    ),
    (lambda: functional.concatenate([]), ValueError, "concatenate: the list is empty"),
    (lambda: functional.concatenate(X), TypeError, "concatenate: expected a list or tuple of tensors, got Tensor"),
    (lambda: functional.stack([X, X[0]]), ValueError, r"stack: tensor 1 has shape \(3,\); expected \(2, 3\)"),
    (
        lambda: functional.einsum("ij,jk", X, X),
        ValueError,
        "einsum: 'ij,jk': operand 1 .* 'j' has length 2; expected 3",
    ),
    (lambda: functional.einsum("ij", X, X), ValueError, "einsum: 'ij' with 2 operands"),
    (lambda: functional.einsum("ijk->i", X), ValueError, "einsum: 'ijk->i': operand 0 has 2 axes"),
    (lambda: functional.einsum("ij->x", X), ValueError, "einsum: .*letter"),
    (lambda: functional.mse_loss(X, X[0]), ValueError, r"mse_loss: the target has shape \(3,\); expected \(2, 3\)"),
    (lambda: functional.mse_loss(X, X, "total"), ValueError, "mse_loss: reduction is 'total'"),
    (lambda: functional.rmsnorm(X, Tensor([1.0])), ValueError, r"rmsnorm: x has shape \(2, 3\) and weight \(1,\)"),
    (lambda: functional.rotary_embedding(X), ValueError, r"rotary_embedding: x has shape \(2, 3\)"),
    (lambda: functional.scaled_dot_product_attention(X, X, X[0]), ValueError, r"attention: value has shape \(3,\)"),
    (lambda: functional.scaled_dot_product_attention(X, X[:, :2], X), ValueError, "attention: query has shape"),
    (lambda: functional.scaled_dot_product_attention(X, X, X, np.ones(3, bool)), ValueError, "attention: attn_mask"),
    (lambda: ops.cross_entropy(X, [0, 9], ignore_index=1), ValueError, "cross_entropy: targets hold 9"),
    (
        lambda: ops.cross_entropy(X, [0, 1], [1.0]),
        ValueError,
        r"cross_entropy: weight has shape \(1,\); expected \(3,\)",
    ),
    (lambda: ops.cross_entropy(X, [0, 1], reduction="x"), ValueError, "cross_entropy: reduction is 'x'"),
    (lambda: ops.cross_entropy(X, [0, 1], label_smoothing=2), ValueError, "cross_entropy: label_smoothing is 2"),
    (lambda: functional.zeros(2, -1), ValueError, "zeros: the shape is"),
    (lambda: functional.arange(1, 2, 0), ValueError, "arange: step is 0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors_name_the_operation_and_what_was_expected(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
