"""Every operation in gradcheck's table, compared with PyTorch; the functions in functional.py; error messages."""

import inspect

import numpy as np
import pytest

import tinygrad2
from tests.against_torch import THEIRS, compare, theirs
from tinygrad2 import Key, Tensor, functional, gradcheck, methods, ops
from tinygrad2.gradcheck import COMPOSITIONS

R = np.random.default_rng(0)


@pytest.fixture
def t():
    import torch

    return torch


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("case", COMPOSITIONS, ids=lambda case: case.name)
def test_values_and_gradients_equal_pytorchs(case, t):
    random = np.random.default_rng(3)
    arrays = [case.draw(random, shape) for shape in case.shapes]
    if THEIRS.get(case.name, "same name") is not None:
        compare(t, case.fn, theirs(t, case.name), arrays)


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
    aliases = {"absolute", "amax", "amin", "cat", "clamp", "mod", "pow", "swish"}
    public = {
        name
        for name, value in vars(functional).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ != "functools"
    }
    assert (
        public
        - {"axis_of", "backend_of", "get_backend", "record"}
        - without_gradient
        - create
        - aliases
        - {"zeros_like"}
        <= rows
    )


def test_every_method_is_also_a_function():
    own = {name for name, value in vars(methods.Methods).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {name for name in own if not hasattr(functional, name)} == {"view", "permute"} - vars(functional).keys()
    for name in own & vars(functional).keys():
        assert getattr(functional, name).__doc__, f"{name} has no docstring"


def test_functions_accept_arrays_numbers_and_lists():
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
    (lambda: X.softmax(2), ValueError, "softmax: axis 2 is out of range for a 2-d tensor"),
    (lambda: X.var("a"), TypeError, "var: axis is 'a'; expected an integer"),
    (lambda: X.prod((0, 0)), ValueError, r"prod: .*contains an axis twice"),
    (lambda: X.maximum(np.ones(2)), ValueError, r"maximum: .*\(2, 3\).*\(2,\)"),
    (lambda: X.where(np.ones((2, 3)), 0.0), TypeError, "where: condition has dtype float64; expected booleans"),
    (lambda: X.where(np.ones(2, dtype=bool), 0.0), ValueError, r"where: shapes \(2,\)"),
    (lambda: X.clip("a"), TypeError, "clip: min has type str; expected a number"),
    (lambda: X.gather(1, [[0, 3]]), IndexError, r"gather: index 3 is out of range; expected integers in \[0, 3\)"),
    (
        lambda: X.gather(1, [0, 1]),
        ValueError,
        r"gather: index has shape \(2,\); expected at most \(2, 3\), except along axis 1",
    ),
    (lambda: X.gather(1, [[-1]]), IndexError, "gather: index -1 is out of range"),
    (lambda: functional.one_hot([-1], 3), IndexError, "one_hot: index -1 is out of range"),
    (lambda: functional.nll_loss(X, [0, -1]), IndexError, "gather: index -1 is out of range"),
    (lambda: X.gather(1, [[0.5]]), TypeError, "gather: the indices have dtype float64; expected integers"),
    (lambda: X.take([7], 0), IndexError, r"take: index 7 is out of range; expected integers in \[-2, 2\)"),
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
    (lambda: X.unflatten(1, (2, 2)), ValueError, "reshape: .*cannot be reshaped to"),
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
    (lambda: functional.cross_entropy(X, [0, 9], ignore_index=1), ValueError, "cross_entropy: targets are 0 to 9"),
    (
        lambda: functional.cross_entropy(X, [0, 1], [1.0]),
        ValueError,
        r"cross_entropy: weight has shape \(1,\); expected \(3,\)",
    ),
    (lambda: functional.cross_entropy(X, [0, 1], reduction="x"), ValueError, "cross_entropy: reduction is 'x'"),
    (lambda: functional.cross_entropy(X, [0, 1], label_smoothing=2), ValueError, "cross_entropy: label_smoothing is 2"),
    (lambda: functional.zeros(2, -1), ValueError, "zeros: the shape is"),
    (lambda: functional.arange(1, 2, 0), ValueError, "arange: step is 0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors_name_the_operation_and_the_expected_value(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# Creation -------------------------------------------------------------------------------------------------------------


def test_take_accepts_negative_indices():
    assert Tensor([1.0, 2.0, 3.0]).take([-1, 0]).numpy().tolist() == [3, 1]


def test_creation_functions():
    assert functional.zeros(2, 3).numpy().tolist() == [[0] * 3] * 2
    assert functional.ones((2,), dtype="float64").dtype == np.float64
    assert functional.full((), 2.5).item() == 2.5
    assert functional.eye(2, 3).numpy().tolist() == [[1, 0, 0], [0, 1, 0]]
    assert functional.arange(3).dtype == np.int64
    assert functional.arange(1, 2, 0.5).numpy().tolist() == [1, 1.5]
    assert functional.arange(1.0, 2, 0.5).dtype == np.float32
    assert functional.linspace(0, 1, 3).numpy().tolist() == [0, 0.5, 1]
    assert functional.zeros(2, requires_grad=True).requires_grad
    x = Tensor(np.ones((2, 1)))
    for name, value in (("zeros_like", 0), ("ones_like", 1)):
        y = getattr(functional, name)(x)
        assert (y.shape, y.dtype, y.numpy().tolist()) == (x.shape, x.dtype, [[value]] * 2)
    assert functional.one_hot([2, 0], 3).numpy().tolist() == [[0, 0, 1], [1, 0, 0]]


def test_random_tensors_are_functions_of_the_key():
    x = functional.rand(1000, key=Key(1))
    assert x.dtype == np.float32
    assert ((x.numpy() >= 0) & (x.numpy() < 1)).all()
    assert x.numpy().mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(x.numpy(), functional.rand(1000, key=Key(1)).numpy())
    assert (functional.rand(1000, key=Key(1, site=1)).numpy() != x.numpy()).any()
    y = functional.randn(20, 50, key=Key(1), dtype="float64")
    assert y.shape == (20, 50)
    assert y.numpy().std() == pytest.approx(1, abs=0.1)


# Attention ------------------------------------------------------------------------------------------------------------


def test_causal_attention_equals_ops_attention():
    qkv = R.normal(size=(2, 5, 24))
    q, k, v = (Tensor(x.reshape(2, 5, 2, 4).transpose(0, 2, 1, 3)) for x in np.split(qkv, 3, axis=-1))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 2, 1, 3).reshape(2, 5, 8)
    np.testing.assert_allclose(y.numpy(), ops.attention(Tensor(qkv), 2).numpy(), rtol=1e-12)


@pytest.mark.parametrize("mask", [np.zeros((3, 5), dtype=bool), np.full((3, 5), -np.inf)])
def test_a_query_without_visible_keys_gives_zero_and_has_zero_gradient(mask):
    q, k, v = (Tensor(R.normal(size=shape), requires_grad=True) for shape in ((3, 4), (5, 4), (5, 2)))
    with np.errstate(all="raise"):
        y = functional.scaled_dot_product_attention(q, k, v, mask)
        y.sum().backward()
    assert not y.numpy().any()
    assert not any(x.grad.any() for x in (q, k, v))


def test_grouped_heads_equal_repeated_keys_and_values():
    q, k, v = (Tensor(R.normal(size=(2, heads, 3, 4))) for heads in (6, 2, 2))
    repeated = functional.scaled_dot_product_attention(q, k.repeat(3, 1), v.repeat(3, 1))
    np.testing.assert_allclose(functional.scaled_dot_product_attention(q, k, v).numpy(), repeated.numpy(), rtol=1e-12)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore", [None, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_every_option(t, reduction, ignore, smoothing, weighted):
    targets, weight = np.array([[0, 2, 2], [4, 1, 3]]), np.linspace(0.5, 2, 5) if weighted else None
    theirs_weight = None if weight is None else t.as_tensor(weight)

    def ours(x):
        return functional.cross_entropy(x, targets, weight, ignore, reduction, smoothing)

    def other(t, x):
        return t.nn.functional.cross_entropy(
            x.moveaxis(-1, 1), t.as_tensor(targets), theirs_weight,
            ignore_index=-100 if ignore is None else ignore, reduction=reduction, label_smoothing=smoothing,
        )  # fmt: skip

    compare(t, ours, other, [R.normal(size=(2, 3, 5))])


def test_cross_entropy_is_nan_if_all_targets_are_ignored_as_in_pytorch():
    with np.errstate(all="ignore"):
        loss = functional.cross_entropy(Tensor(np.zeros((2, 3))), [1, 1], ignore_index=1)
    assert np.isnan(loss.item())


def test_the_export_list_contains_every_function():
    own = {name for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"} - {
        "axis_of",
        "backend_of",
        "get_backend",
        "record",
    }
    assert own == set(functional.__all__)
    assert all(getattr(tinygrad2, name) is getattr(functional, name) for name in functional.__all__)
