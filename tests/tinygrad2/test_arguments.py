"""Type promotion, and error messages for invalid arguments."""

import operator

import numpy as np
import pytest

from tinygrad2 import Tensor

INTEGERS, BOOLEANS = np.array([1, 2, 6]), np.array([True, True, False])


def tensor(dtype, requires_grad=False):
    return Tensor(np.array([1, 2, 3]).astype(dtype), requires_grad=requires_grad)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64"])
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (0.5, "float32"),
        (np.float32(0.5), "float32"),
        (np.float64(0.5), "float64"),
        ([0.5, 0.5, 0.5], "float32"),
        (np.array([0.5, 0.5, 0.5]), "float64"),
        (np.array([0.5, 0.5, 0.5], "float32"), "float32"),
        (Tensor([0.5, 0.5, 0.5]), "float32"),
        (Tensor(np.array([0.5, 0.5, 0.5])), "float64"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("function", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_integers_and_floats_give_floats(function, dtype, other, expected):
    x = tensor(dtype)
    right = np.asarray(other.data if isinstance(other, Tensor) else other, "float64")
    for y, want in ((function(x, other), function(x.data, right)), (function(other, x), function(right, x.data))):
        assert y.dtype == expected
        np.testing.assert_allclose(y.numpy(), want, rtol=1e-6)


def test_the_gradient_of_a_float_tensor_combined_with_integers():
    x = tensor("float32", requires_grad=True)
    (Tensor(INTEGERS) * x + Tensor(BOOLEANS)).sum().backward()
    np.testing.assert_array_equal(x.grad, INTEGERS)
    assert x.grad.dtype == "float32"


@pytest.mark.parametrize("a", ["bool", "uint8", "int8", "int32", "int64"])
@pytest.mark.parametrize("b", ["bool", "uint8", "int8", "int32", "int64"])
def test_two_integer_types_are_promoted_as_in_numpy(a, b):
    x, y = tensor(a), tensor(b)
    for got in (x + y, x + y.data, x.data + y):
        assert got.dtype == np.promote_types(a, b)
    quotient = x / y
    assert quotient.dtype == "float32"
    np.testing.assert_allclose(quotient.numpy(), x.data / y.data, rtol=1e-6)


def test_a_python_integer_takes_the_dtype_of_the_tensor():
    assert (tensor("uint8") + 2).dtype == "uint8"
    assert (2 + tensor("bool")).dtype == "int64"
    with pytest.raises(OverflowError, match=r"^\*: 300 does not fit in the other operand's dtype, uint8$"):
        tensor("uint8") * 300


def test_a_float32_tensor_keeps_its_dtype_with_a_float64_array():
    """An array is a constant (see the docstring of arguments.py). A float64 Tensor is rejected."""
    x = tensor("float32", requires_grad=True)
    y = np.array([0.1, 0.2, 0.3]) * x
    assert y.dtype == "float32"
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, np.array([0.1, 0.2, 0.3], "float32"))
    with pytest.raises(TypeError, match=r"^\*: the operands have dtypes float32 and float64; convert one: x.astype\("):
        x * Tensor(np.array([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("values", [INTEGERS, BOOLEANS, INTEGERS.astype("int8")])
def test_functions_of_integers_return_float32(values):
    x = Tensor(values)
    for got, expected in (
        (x.exp(), np.exp(values)),
        ((x + 1).log(), np.log(values + 1)),
        (x.tanh(), np.tanh(values)),
        (x.mean(), values.mean()),
        (x**0.5, values**0.5),
        (1 / (x + 1), 1 / (values + 1)),
    ):
        assert got.dtype == "float32"
        np.testing.assert_allclose(got.numpy(), np.asarray(expected, "float64"), rtol=2e-3)


def test_functions_of_integers_that_return_integers():
    x = Tensor(INTEGERS)
    for got, expected in ((-x, -INTEGERS), (x**2, INTEGERS**2), (x.sum(), 9), (x.max(), 6), (x @ INTEGERS, 41)):
        assert got.dtype == "int64"
        np.testing.assert_array_equal(got.numpy(), expected)
    assert Tensor(BOOLEANS).sum().item() == 2
    assert (-Tensor(np.array([1], "uint8"))).item() == 255


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i, b: -b, TypeError, r"^unary -: the tensor is boolean; use ~x$"),
        (lambda i, b: b - b, TypeError, r"^-: the operands are booleans; use a != b"),
        (lambda i, b: i**-1, ValueError, r"^\*\*: integers to the power -1 are not integers; use x.astype"),
        (lambda i, b: i + "a", TypeError, r"^\+: expected a Tensor, an array or numbers, got str$"),
        (lambda i, b: i * None, TypeError, r"^\*: expected a Tensor, an array or numbers, got NoneType$"),
        (lambda i, b: i * 1j, TypeError, r"^\*: expected a Tensor, an array or numbers, got complex$"),
        (lambda i, b: i / np.array(["a"]), TypeError, r"^/: an operand has dtype <U1; expected floats, integers or"),
        (
            lambda i, b: i * [[1, 2], [3]],
            ValueError,
            r"^\*: nested lists have different lengths; expected equal",
        ),
        (lambda i, b: Tensor([[1, 2], [3]]), ValueError, r"^Tensor: nested lists have different lengths"),
        (lambda i, b: Tensor("abc"), TypeError, r"^Tensor: expected a Tensor, an array or numbers, got str$"),
        (lambda i, b: Tensor(np.array([1j])), TypeError, r"^Tensor: data has dtype complex128; expected floats"),
        (lambda i, b: Tensor(None), TypeError, r"^Tensor: expected a Tensor, an array or numbers, got NoneType$"),
        (
            lambda i, b: i + Tensor(np.ones((2, 2))),
            ValueError,
            r"^\+: the operands have shapes \(3,\) and \(2, 2\)",
        ),
        (lambda i, b: i - np.ones(2), ValueError, r"^-: the operands have shapes \(3,\) and \(2,\), which do not"),
        (lambda i, b: np.ones(2) * i, ValueError, r"^\*: the operands have shapes \(3,\) and \(2,\), which do not"),
        (lambda i, b: i / np.ones(2), ValueError, r"^/: the operands have shapes \(3,\) and \(2,\), which do not"),
        (lambda i, b: i < np.ones(2), ValueError, r"^<: the operands have shapes \(3,\) and \(2,\), which do not"),
        (
            lambda i, b: i.reshape(2, 2),
            ValueError,
            r"^reshape: the tensor has shape \(3,\), which cannot",
        ),
        (lambda i, b: i.reshape(-1, -1), ValueError, r"^reshape: the tensor has shape \(3,\)"),
        (lambda i, b: i.reshape(3.0), TypeError, r"^reshape: got 3.0; expected integers, or a tuple"),
        (lambda i, b: i.transpose(0, 0), ValueError, r"^transpose: axis \(0, 0\) contains an axis twice$"),
        (lambda i, b: i.sum((0, -1)), ValueError, r"^sum: axis \(0, -1\) contains an axis twice$"),
        (lambda i, b: i.sum("x"), TypeError, r"^sum: axis is 'x'; expected an integer, a tuple of integers or None$"),
        (lambda i, b: i.mean(1.0), TypeError, r"^mean: axis is 1.0; expected an integer"),
        (lambda i, b: i[3], IndexError, r"^indexing: \[3\] is not a valid index for a tensor of shape \(3,\)$"),
        (lambda i, b: i[0, 0], IndexError, r"^indexing: \[0, 0\] is not a valid index for a tensor of shape \(3,\)$"),
        (
            lambda i, b: i[..., [0, 5]],
            IndexError,
            r"^indexing: \[\.\.\., \[array of shape \(2,\)\]\] is not a valid index",
        ),
        (lambda i, b: i[BOOLEANS[:2]], IndexError, r"^indexing: \[\[mask of shape \(2,\)\]\] is not a valid index"),
        (lambda i, b: i[::0], IndexError, r"^indexing: \[::0\] is not a valid index"),
        (lambda i, b: i[1:2, None, 5], IndexError, r"^indexing: \[1:2, None, 5\] is not a valid index"),
        (lambda i, b: i[1.0], TypeError, r"^indexing: an index has dtype float64; expected integers or booleans$"),
        (lambda i, b: i["a"], TypeError, r"^indexing: expected a Tensor, an array or numbers, got str$"),
        (
            lambda i, b: i[Tensor([0, 1])],
            TypeError,
            r"^indexing: .*float32; .*a Tensor made from a list is float32;",
        ),
        (lambda i, b: Tensor(np.ones((0, 2))).max(0), ValueError, r"^max: the tensor has shape \(0, 2\); there is no"),
        (lambda i, b: len(i[0]), TypeError, r"^len\(\): the tensor has shape \(\), which has no length$"),
    ],
)
def test_an_invalid_argument_is_described(function, error, message):
    with pytest.raises(error, match=message):
        function(Tensor(INTEGERS), Tensor(BOOLEANS))


@pytest.mark.parametrize("axis", [0, -1, (), (0,), None])
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_zero_d_tensors_accept_axes_0_and_minus_1(name, axis):
    x = Tensor(np.array(3.0), requires_grad=True)
    y = getattr(x, name)(axis)
    assert (y.item(), y.shape) == (3.0, ())
    y.backward()
    assert x.grad == 1
    with pytest.raises(ValueError, match=r"axis 1 is out of range for a 0-d tensor"):
        getattr(x, name)(1)


def test_the_mean_of_an_empty_tensor_is_nan():
    assert np.isnan(Tensor(np.ones((0, 3))).mean().item())
    np.testing.assert_array_equal(Tensor(np.ones((0, 3))).mean(0).numpy(), [np.nan] * 3)
    assert Tensor(np.ones((0, 3))).mean(1).shape == (0,)


def test_an_index_is_copied():
    """The backward pass needs the original index."""
    x, index = Tensor(np.zeros(3), requires_grad=True), np.array([0, 0])
    y = x[index]
    index[...] = 2
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 0, 0])
