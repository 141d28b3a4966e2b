import operator

import numpy as np
import pytest

from tinygrad2 import Tensor, ops
from tinygrad2.gradcheck import check
from tinygrad2.protocols import UFUNCS
from tinygrad2.tensor import record

R = np.random.default_rng(0)
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]


def leaf(*shape, dtype="float64"):
    return Tensor(R.normal(size=shape).astype(dtype), requires_grad=True)


@pytest.mark.parametrize("function", OPERATORS)
@pytest.mark.parametrize(
    "shapes", [((3, 4), (3, 4)), ((2, 3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 3)), ((1,), (0, 3))]
)
def test_operators_equal_numpys_with_broadcasting(function, shapes):
    a, b = (leaf(*shape) for shape in shapes)
    y = function(a, b)
    np.testing.assert_array_equal(y.data, function(a.data, b.data))
    y.sum().backward()
    assert a.grad.shape == a.shape
    assert b.grad.shape == b.shape


@pytest.mark.parametrize("function", OPERATORS)
@pytest.mark.parametrize("other", [2, 2.5, np.float64(2.5), np.full((3, 4), 2.0), [1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_and_arrays_take_the_dtype_of_the_tensor(function, other, dtype):
    x = leaf(3, 4, dtype=dtype)
    for y, expected in ((function(x, other), function(x.data, other)), (function(other, x), function(other, x.data))):
        assert isinstance(y, Tensor)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.data, expected, rtol=1e-6)


@pytest.mark.parametrize("function", [*OPERATORS, operator.matmul])
def test_mixed_dtypes_raise(function):
    a, b = leaf(3, 3), leaf(3, 3, dtype="float32")
    for x, y in ((a, b), (b, a)):
        with pytest.raises(TypeError, match=r"the operands have dtypes float\d\d and float\d\d; convert one"):
            function(x, y)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 4)), ((5, 2, 3), (5, 3, 4)), ((5, 2, 3), (3, 4)), ((2, 1, 2, 3), (5, 3, 1))]
)
def test_matmul_equals_numpys(shapes):
    a, b = (leaf(*shape) for shape in shapes)
    np.testing.assert_array_equal((a @ b).data, a.data @ b.data)
    np.testing.assert_array_equal((a.data @ b).data, a.data @ b.data)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (4, 3)), ((2, 2, 3), (3, 3, 4)), ((3,), (4,)), ((3,), (2, 4)), ((2, 3), (2,))]
)
def test_matmul_rejects_shapes_that_do_not_match(shapes):
    with pytest.raises(ValueError, match=r"^@: shapes \(.*\) and \(.*\); expected \(\.\.\., m, k\)"):
        leaf(*shapes[0]) @ leaf(*shapes[1])


def test_matmul_rejects_zero_d_operands():
    with pytest.raises(ValueError, match=r"^@: shapes \(\) and \(2, 3\); expected"):
        leaf() @ leaf(2, 3)
    with pytest.raises(ValueError, match=r"^@: shapes \(2, 3\) and \(\); expected"):
        leaf(2, 3) @ 2.0


@pytest.mark.parametrize(
    "shapes",
    [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((5, 2, 3), (3,)), ((3,), (5, 3, 4)), ((0,), (0,)), ((0,), (0, 2))],
)
def test_matmul_of_vectors_equals_numpys_and_has_correct_gradients(shapes):
    a, b = (leaf(*shape) for shape in shapes)
    y = a @ b
    np.testing.assert_allclose(y.data, a.data @ b.data, rtol=1e-14)
    assert y.shape == (a.data @ b.data).shape
    assert (a.data @ b).shape == (a @ b.data).shape == y.shape
    assert all(error < 1e-7 for error in check(lambda a, b: a @ b, [a, b]))


def test_methods_equal_numpys():
    x = Tensor(R.uniform(0.5, 2, size=(2, 3, 4)))
    a = x.data
    for got, expected in (
        (-x, -a),
        (x**3, a**3),
        (x**-0.5, a**-0.5),
        (x**0, a**0),
        (x.exp(), np.exp(a)),
        (x.log(), np.log(a)),
        (x.tanh(), np.tanh(a)),
        (x.reshape(6, -1), a.reshape(6, -1)),
        (x.reshape((4, 6)), a.reshape(4, 6)),
        (x.transpose(), a.T),
        (x.transpose(0, 2, 1), a.transpose(0, 2, 1)),
        (x.transpose((-1, 0, 1)), a.transpose(2, 0, 1)),
    ):
        np.testing.assert_array_equal(got.data, expected)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (-1, 1), ()])
def test_reductions_equal_numpys(axis, keepdims):
    x = leaf(2, 3, 4)
    np.testing.assert_array_equal(x.sum(axis, keepdims).data, x.data.sum(axis, keepdims=keepdims))
    np.testing.assert_array_equal(x.max(axis, keepdims).data, x.data.max(axis, keepdims=keepdims))
    np.testing.assert_allclose(x.mean(axis, keepdims).data, x.data.mean(axis, keepdims=keepdims), rtol=1e-13)


def test_an_axis_out_of_range_is_rejected():
    with pytest.raises(ValueError, match=r"^sum: axis 2 is out of range for a 2-d tensor$"):
        leaf(2, 3).sum(2)
    with pytest.raises(ValueError, match=r"^max: axis -3 is out of range for a 2-d tensor$"):
        leaf(2, 3).max((0, -3))


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, None),
        (slice(None), 1),
        (Ellipsis, slice(None, None, -2)),
        (None, 1, slice(None), None),
        [0, 1, 0, 0],
        ([0, 1, 0], [2, 2, 2]),
        (slice(None), np.array([2, 2, 0])),
        np.array([[0, 1], [1, 1]]),
        np.array([True, False]),
        np.int64(1),
    ],
    ids=str,
)
def test_indexing_and_its_gradient(index):
    x = leaf(2, 3, 4)
    y = x[index]
    np.testing.assert_array_equal(y.data, x.data[index])
    dy = R.normal(size=y.shape)
    y.backward(dy)
    expected = np.zeros(x.size)
    np.add.at(expected, np.arange(x.size).reshape(x.shape)[index], dy)
    np.testing.assert_allclose(x.grad.reshape(-1), expected, rtol=1e-14)


def test_a_tensor_may_be_an_index():
    x = leaf(4, 2)
    np.testing.assert_array_equal(x[Tensor(np.array([3, 3, 1]))].data, x.data[[3, 3, 1]])


@pytest.mark.parametrize("bad", ["2", None, [1, "x"], Tensor(2.0)])
def test_invalid_exponents_are_rejected(bad):
    with pytest.raises(TypeError, match=r"power: (expected a Tensor, an array|the operands have dtypes)"):
        leaf(2) ** bad


def test_exponents_may_be_arrays_lists_or_tensors():
    x = Tensor([2.0, 3.0])
    np.testing.assert_array_equal((x ** [1, 2]).data, [2, 9])
    np.testing.assert_array_equal((2**x).data, [4, 8])
    np.testing.assert_array_equal((np.array([2.0, 1.0]) ** x).data, [4, 1])
    with pytest.raises(ValueError, match="power: x is an integer and the exponent is negative"):
        Tensor(np.array([1, 2])) ** Tensor(np.array([1, -2]))


@pytest.mark.parametrize("function", [np.min, np.prod, np.var, np.std, np.cumsum, np.argmax, np.any, np.ravel])
def test_numpy_functions_return_tensors(function):
    x = np.arange(1.0, 7.0).reshape(2, 3)
    y = function(Tensor(x))
    assert isinstance(y, Tensor)
    np.testing.assert_allclose(y.data, function(x))


@pytest.mark.parametrize("name", [name for name in UFUNCS if UFUNCS[name][0][0] != "_"], ids=lambda u: u.__name__)
def test_numpy_ufuncs_return_tensors(name):
    x, y = np.array([0.25, 0.5]), np.array([0.75, 0.5])
    with np.errstate(all="ignore"):
        if name.nin == 1:
            np.testing.assert_allclose(name(Tensor(x)).data, name(x))
        else:
            np.testing.assert_allclose(name(Tensor(x), y).data, name(x, y))
        if name.nin == 2 and UFUNCS[name][1]:
            np.testing.assert_allclose(name(y, Tensor(x)).data, name(y, x))


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (2, "float32"),
        (2.5, "float32"),
        ([1, 2], "float32"),
        (((1.0, 2.0),), "float32"),
        (np.float64(2.5), "float64"),
        (np.float32(2.5), "float32"),
        (np.array([1, 2]), "int64"),
        (np.array([1.0, 2.0]), "float64"),
        (Tensor(np.array([1.0, 2.0])), "float64"),
    ],
    ids=repr,
)
def test_the_dtype_of_a_new_tensor(data, dtype):
    x = Tensor(data)
    assert isinstance(x.data, np.ndarray)
    assert x.dtype == dtype
    np.testing.assert_array_equal(x.numpy(), data.data if isinstance(data, Tensor) else data)


def test_an_array_is_not_copied():
    a = np.ones(3)
    assert Tensor(a).data is a
    assert Tensor(a).numpy() is a
    assert Tensor(a, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_to_a_scalar_keeps_its_dtype_and_precision(dtype):
    x = Tensor(np.array([1.0, 1e-7], dtype=dtype), requires_grad=True)
    y = x.sum()
    assert y.dtype == dtype
    assert isinstance(y.data, np.ndarray)
    assert y.item() == np.sum(x.data)


def test_properties_and_item():
    x = leaf(2, 3)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 3), 2, 6, 2, np.float64)
    assert Tensor([[2.5]]).item() == 2.5
    with pytest.raises(ValueError, match=r"^item\(\): the tensor has shape \(2, 3\); expected one element$"):
        x.item()


def test_repr_shows_values_shape_dtype_device_and_the_operation():
    x = Tensor([1.0], requires_grad=True)
    assert repr(Tensor([1.0])) == "Tensor([1.], shape=(1,), dtype=float32, device=cpu)"
    assert repr(x) == "Tensor([1.], shape=(1,), dtype=float32, device=cpu, requires_grad=True)"
    for y, operation in ((x * x, "multiply"), (x[0], "getitem"), (ops.linear(x, Tensor([[1.0]])), "linear")):
        assert repr(y).endswith(f", device=cpu, operation={operation})")
    y = (x * x).sum()
    y.backward()
    assert repr(y) == "Tensor(1., shape=(), dtype=float32, device=cpu, operation=sum)"
    assert len(repr(Tensor(np.zeros((1000, 1000))))) < 500


def test_requires_grad_needs_a_floating_point_dtype():
    with pytest.raises(TypeError, match=r"^Tensor: requires_grad needs a floating-point dtype, got int64$"):
        Tensor(np.array([1, 2]), requires_grad=True)


def test_grad_accumulates_and_can_be_assigned_on_leaves():
    x = leaf(2)
    assert x.requires_grad
    assert x.grad is None
    x.grad = np.array([1.0, 2.0])
    (x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [4, 5])
    x.grad = None
    assert x.grad is None
    with pytest.raises(ValueError, match=r"^grad has shape \(3,\); expected \(2,\), the shape of the data$"):
        x.grad = np.zeros(3)
    y = x * 2
    assert y.requires_grad
    assert y.grad is None
    for tensor in (y, Tensor([1.0])):
        with pytest.raises(AttributeError, match="grad can be set only on a leaf"):
            tensor.grad = np.zeros(2)


def test_detach_stops_the_gradient():
    x = leaf(2)
    y = (x * 2).detach()
    assert not y.requires_grad
    (x * y).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * x.data)


def test_backward_checks_its_arguments():
    x = leaf(2)
    with pytest.raises(ValueError, match=r"^backward: the tensor has shape \(2,\), not one element; pass dy"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"^backward: dy has shape \(3,\); expected \(2,\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(RuntimeError, match=r"^backward: nothing is recorded here"):
        Tensor([1.0]).backward()
    (x * 2).backward(Tensor(np.array([1.0, 2.0])))
    np.testing.assert_array_equal(x.grad, [2, 4])
    (x[:1] * 2).backward()  # one element is enough
    np.testing.assert_array_equal(x.grad, [4, 4])


def test_an_object_that_is_not_an_array_is_rejected():
    class Foreign:
        shape, dtype = (2,), np.dtype("float64")

    with pytest.raises(TypeError, match=r"^expected an array, got Foreign"):
        Tensor(Foreign()).exp()


def test_a_custom_operation_consists_of_two_functions():
    def cube(x):
        return record(x.data**3, (x,), cube_backward, saved=(x.data,))

    def cube_backward(saved, dy, into):
        (x,) = saved
        return (3 * x**2 * dy,)

    x = leaf(3)
    cube(x * 2).sum().backward()
    np.testing.assert_allclose(x.grad, 24 * x.data**2, rtol=1e-14)


def test_memory_is_shared_as_documented():
    x = leaf(2, 3)
    for view in (x.transpose(), x.reshape(6), x[:1], x.T):
        assert np.shares_memory(view.data, x.data)
    dy = np.ones((2, 3))
    x.reshape(2, 3).backward(dy)
    x.grad[0] = 9
    np.testing.assert_array_equal(dy, 1)
    (x + 0).backward([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(x.grad, [[10, 11, 12], [5, 6, 7]])
    y = (x * x).sum()
    x.data[...] = 7  # a write into the array is not detected, and changes the saved values
    x.grad = None
    y.backward()
    np.testing.assert_array_equal(x.grad, np.full((2, 3), 14.0))


@pytest.mark.extras("torch")
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, -2, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -0.5, -1.0, -2.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore")
def test_powers_of_edge_values_equal_pytorchs(exponent, dtype):
    """PyTorch computes the powers 0.5 and -0.5 with square roots, whose signs at -0 and -inf differ from IEEE 754."""
    torch = pytest.importorskip("torch")
    edges = [] if abs(exponent) == 0.5 else [-0.0, -np.inf]
    values = np.array([-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, np.inf, np.nan, *edges], dtype)
    x, t = Tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    (x**exponent).backward(np.ones(len(values), dtype))
    (t**exponent).backward(torch.ones_like(t))
    np.testing.assert_allclose((x**exponent).numpy(), (t**exponent).detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(x.grad, t.grad.numpy(), rtol=1e-6)
    infinite = np.isinf(x.grad)
    np.testing.assert_array_equal(np.sign(x.grad[infinite]), np.sign(t.grad.numpy()[infinite]))
