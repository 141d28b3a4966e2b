"""Tensors in built-in and NumPy functions give correct results or are rejected. They never form object arrays."""

import copy
import operator
import pickle

import numpy as np
import pytest

from tests.stand_ins import strict_cupy
from tinygrad2 import Tensor, missing_names, nn, no_grad, optim, protocols
from tinygrad2.params import Parameter
from tinygrad2.tensor import record

A, B = np.array([1.0, 2.0, 3.0], "float32"), np.array([3.0, 2.0, 1.0], "float32")
COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


def leaf(values, dtype="float32"):
    return Tensor(np.array(values, dtype), requires_grad=True)


@pytest.mark.parametrize("function", COMPARISONS)
@pytest.mark.parametrize(
    "other", [2, 2.0, B, B.astype("float64"), [3, 2, 1], Tensor(B), Tensor(np.array([3, 2, 1])), True]
)
def test_comparisons_give_elementwise_booleans_without_gradient(function, other):
    right = other.data if isinstance(other, Tensor) else np.asarray(other)
    for got, expected in (
        (function(leaf(A), other), function(A, right)),
        (function(other, leaf(A)), function(right, A)),
    ):
        assert isinstance(got, Tensor)
        assert got.dtype == bool
        assert not got.requires_grad
        np.testing.assert_array_equal(got.numpy(), expected)


def test_comparisons_with_other_objects_follow_python():
    a = leaf(A)
    assert a != None  # noqa: E711
    assert a != "text"
    with pytest.raises(TypeError, match="not supported between"):
        a < "text"  # noqa: B015


def test_tensors_are_hashed_by_identity():
    a, b = Tensor(A), Tensor(A)
    assert {a: 1, b: 2}[a] == 1
    assert a in [a]
    assert hash(a) != hash(b)


def test_masks_and_logical_operators():
    a = leaf(A)
    (a * (a == 1.0)).sum().backward()
    np.testing.assert_array_equal(a.grad, [1, 0, 0])
    assert a[a == 1.0].shape == (1,)
    low, high = a < 2, a > 2
    np.testing.assert_array_equal((low | high).numpy(), [True, False, True])
    np.testing.assert_array_equal((low & high).numpy(), [False] * 3)
    np.testing.assert_array_equal((~low & [True, True, False]).numpy(), [False, True, False])
    np.testing.assert_array_equal((np.array([True, False, False]) | high).numpy(), [True, False, True])
    for wrong in (lambda: a & a, lambda: a | 1.0, lambda: ~a):
        with pytest.raises(TypeError, match=r"^[&|~]: the (operands|tensor) ha(ve|s) dtype float32; expected booleans"):
            wrong()


def test_floor_division_and_remainder_have_no_gradient():
    x = Tensor(np.array([5, 7]))
    np.testing.assert_array_equal((x // 2).numpy(), [2, 3])
    np.testing.assert_array_equal((x % 2).numpy(), [1, 1])
    with pytest.raises(TypeError, match=r"^//: has no gradient; use x.detach\(\), or no_grad\(\)$"):
        leaf(A) // 2
    with no_grad():
        np.testing.assert_array_equal((leaf(A) % 2).numpy(), [1, 0, 1])


@pytest.mark.parametrize("data", [0.0, 2.5, [2.5], [[0.0]]])
def test_a_tensor_with_one_element_converts_to_a_number(data):
    t, value = Tensor(data), np.asarray(data).item()
    assert (bool(t), float(t), int(t), t.item()) == (bool(value), value, int(value), value)
    assert f"{t:.3f}" == f"{value:.3f}"
    if t.ndim == 0:
        assert f"{t}" == str(value)


@pytest.mark.parametrize("function", [bool, float, int, Tensor.item, lambda t: f"{t:.3f}"])
@pytest.mark.parametrize("shape", [(2,), (0,), (2, 3)])
def test_other_tensors_do_not_convert_to_a_number(function, shape):
    with pytest.raises((ValueError, TypeError), match=r"the tensor has shape \(.*\)"):
        function(Tensor(np.zeros(shape)))


def test_integer_tensors_can_be_indices():
    assert [10, 20, 30][Tensor(np.array(1))] == 20
    assert list(range(Tensor(np.array(2)))) == [0, 1]
    with pytest.raises(TypeError, match="a Tensor of dtype float32 is not an index"):
        [10, 20][Tensor(1.0)]


def test_iteration_and_length():
    a = leaf(A)
    assert len(a) == 3
    assert [t.item() for t in a] == [1, 2, 3]
    sum(a).backward()
    np.testing.assert_array_equal(a.grad, [1, 1, 1])
    assert max(a).item() == 3
    assert 2.0 in a
    assert 5.0 not in a
    for function in (iter, len, list):
        with pytest.raises(TypeError, match=r"the tensor has shape \(\)"):
            function(Tensor(1.0))


@pytest.mark.parametrize("ufunc", protocols.UFUNCS, ids=lambda ufunc: ufunc.__name__)
def test_ufuncs_return_tensors(ufunc):
    a, b = A, B
    if ufunc in (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.invert):
        a, b = a > 1, b > 1
    tensors = [(Tensor(a), Tensor(b)), (Tensor(a), b), (a, Tensor(b))] if ufunc.nin == 2 else [(Tensor(a),)]
    if ufunc.nin == 2 and protocols.UFUNCS[ufunc][1] is None:
        tensors.pop()
    if ufunc is np.power:
        tensors, b = [(Tensor(a), 2.0)], 2.0
    for inputs in tensors:
        with np.errstate(invalid="ignore", divide="ignore"):  # arcsin, arctanh
            y, expected = ufunc(*inputs), ufunc(a, b) if ufunc.nin == 2 else ufunc(a)
        assert type(y) is Tensor
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6)


def test_the_gradient_of_a_ufunc():
    a = leaf(A)
    np.multiply(B, np.exp(a)).sum().backward()
    np.testing.assert_allclose(a.grad, B * np.exp(A), rtol=1e-6)


ARGUMENTS = {  # in addition to the tensor of shape (2, 2); all other methods are called with 0
    "reshape": ((4,),), "transpose": (), "clip": (1.5, 3.0), "squeeze": (), "ravel": (), "swapaxes": (0, 1),
    "moveaxis": (0, 1), "broadcast_to": ((3, 2, 2),), "array_split": (2,), "tensordot": (np.ones((2, 2)), 1),
    "repeat": (2,), "tile": ((2, 1),), "pad": (1,), "roll": (1, 0), "diff": (),
    "dot": (np.ones(2),), "inner": (np.ones(2),), "outer": (np.ones(2),),
}  # fmt: skip


@pytest.mark.parametrize(("function", "method"), protocols.METHODS.items(), ids=lambda f: getattr(f, "__name__", f))
def test_numpy_functions_that_are_tensor_methods(function, method):
    a = leaf([[1.0, 2.0], [3.0, 4.0]])
    arguments = ARGUMENTS.get(method, (0,))
    y = function(a, *arguments)
    y, expected = (x if isinstance(x, tuple | list) else (x,) for x in (y, function(a.numpy(), *arguments)))
    for part, values in zip(y, expected, strict=True):
        assert isinstance(part, Tensor)
        assert part.requires_grad == (method not in ("all", "any", "argmax", "argmin", "argsort"))
        np.testing.assert_allclose(part.numpy(), values, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: np.unwrap(a), "np.unwrap does not support Tensors, since it has no"),
        (lambda a, b: np.interp(a, b, [1.0, 2.0, 3.0]), "np.interp does not support Tensors"),
        (lambda a, b: np.heaviside(a, b), "np.heaviside does not support Tensors; use an operation of Tensor"),
        (lambda a, b: np.add.reduce(a), "np.add.reduce does not support Tensors"),
        (lambda a, b: np.add(a, b, out=np.zeros(3)), "np.add with options does not support Tensors"),
    ],
)
def test_other_numpy_functions_are_rejected(function, message):
    with pytest.raises(TypeError, match=message):
        function(leaf(A), leaf(B))


def test_conversion_to_a_numpy_array_uses_the_values():
    a = leaf(A)
    for array in (np.asarray(a), np.array(a), np.asarray(a, dtype="float64"), np.array([Tensor(1.0), Tensor(2.0)])):
        assert array.dtype.kind == "f"
    assert np.asarray(a) is a.data
    assert not np.shares_memory(np.array(a), a.data)
    assert np.allclose(a, A)
    assert np.array_equal(a, Tensor(A))
    assert not np.array_equal(a, Tensor(B))
    np.testing.assert_allclose(a, A)
    np.testing.assert_array_equal(a, A)


def test_a_tensor_on_a_gpu_is_not_copied_implicitly():
    with strict_cupy.registered():
        x = leaf(A).to("cuda")
        assert x.device == "cuda"
        with pytest.raises(TypeError, match=r"use .numpy\(\)$"):
            np.asarray(x)
        np.testing.assert_array_equal(x.numpy(), A)
        assert "device=cuda" in repr(x)


def test_to_and_astype():
    a = leaf(A)
    assert a.to("float32") is a
    assert a.to("cpu") is a
    (a.to(np.float64) * np.array([1.0, 2.0, 3.0])).sum().backward()
    assert a.grad.dtype == "float32"
    np.testing.assert_array_equal(a.grad, [1, 2, 3])
    integers = a.astype("int64")
    assert (integers.dtype, integers.requires_grad) == (np.int64, False)
    with strict_cupy.registered():
        a.grad = None
        y = a.to("cuda") * 2.0
        assert y.device == "cuda"
        y.to("cpu").sum().backward()
        np.testing.assert_array_equal(a.grad, [2, 2, 2])
    np.testing.assert_array_equal(Tensor(np.eye(2, 3)).T.numpy(), np.eye(3, 2))


def test_names_from_other_libraries_raise_with_a_hint():
    a = leaf(A)
    for name, hint in missing_names.TENSOR.items():
        assert not hasattr(Tensor, name), f"Tensor has {name}: remove it from missing_names.TENSOR"
        with pytest.raises(AttributeError) as raised:
            getattr(a, name)
        assert str(raised.value) == f"Tensor has no attribute {name!r}; {hint}"
    for name in ("view", "permute", "cuda", "unsqueeze"):
        assert hasattr(Tensor, name) or name in missing_names.TENSOR
    with pytest.raises(AttributeError, match=r"^Tensor has no attribute 'nonsense'$"):
        a.nonsense  # noqa: B018


def test_tensors_cannot_be_changed_in_place():
    a = leaf(A)
    with pytest.raises(TypeError, match="a Tensor cannot be changed in place"):
        a[0] = 1
    b = a
    b += 1
    assert b is not a
    np.testing.assert_array_equal(a.numpy(), A)


COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
class TestCopies:
    def test_a_tensor_and_its_gradient(self, copied):
        a = leaf(A)
        (a * 2).sum().backward()
        b = copied(a)
        assert b.requires_grad
        np.testing.assert_array_equal(b.grad, a.grad)
        (b * 3).sum().backward()
        np.testing.assert_array_equal(b.grad, [5, 5, 5])
        np.testing.assert_array_equal(a.grad, [2, 2, 2])
        assert not np.shares_memory(a.data, b.data)
        assert not copied(Tensor(A)).requires_grad
        assert copied(Tensor(np.array(1))).dtype == "int64"

    def test_a_result_on_the_tape_is_rejected(self, copied):
        with pytest.raises(TypeError, match=r"use x.detach\(\)"):
            copied(leaf(A) * 2)
        np.testing.assert_array_equal(copied((leaf(A) * 2).detach()).numpy(), 2 * A)

    @pytest.mark.parametrize("trained", [False, True])
    def test_a_copied_model_trains_independently(self, copied, trained):
        def step(model, optimizer):
            optimizer.zero_grad()
            (model(Tensor(np.ones((1, 3), "float32"))) ** 2).sum().backward()
            optimizer.step()

        model = nn.Linear(3, 2)
        optimizer = optim.AdamW(model)
        if trained:
            step(model, optimizer)
        twin = copied(model)
        before = model.weight.numpy().copy()
        np.testing.assert_array_equal(twin.weight.numpy(), before)
        step(twin, optim.AdamW(twin))
        np.testing.assert_array_equal(model.weight.numpy(), before)
        assert np.abs(twin.weight.numpy() - before).max() > 1e-4
        assert twin.arena() is not model.arena()
        step(model, optimizer)
        assert np.abs(model.weight.numpy() - before).max() > 1e-4

    def test_tied_parameters_stay_tied(self, copied):
        model = nn.Module()
        model.a = model.b = Parameter(A.copy())
        twin = copied(model)
        assert twin.a is twin.b
        assert twin.a is not model.a

    def test_a_parameter_with_a_bfloat16_copy(self, copied):
        twin = copied(Parameter(A.copy(), copy="bfloat16"))
        assert isinstance(twin, Parameter)
        assert twin.copy_dtype == "bfloat16"


def test_an_operation_is_named_after_its_backward_function():
    def my_square_backward(saved, dy, into):
        return (2 * saved[0] * dy,)

    a = leaf(A)
    y = record(a.data**2, (a,), my_square_backward, saved=(a.data,))
    assert repr(y).endswith("operation=my_square)")
