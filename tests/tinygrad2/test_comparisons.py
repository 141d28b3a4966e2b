"""Operators without a gradient, and in-place operators. (For comparisons of edge values, see test_edge_values.py.)"""

import operator

import numpy as np
import pytest

from tinygrad2 import Tensor, nn, no_grad
from tinygrad2.params import Parameter

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


@pytest.mark.parametrize("name", ["and_", "or_", "xor"])
def test_logical_operators_of_booleans_and_integers(name):
    logic = getattr(operator, name)
    for a, b in ((np.array([True, False]), np.array([True, True])), (np.array([5, 6]), np.array([3, -2]))):
        for y in (logic(Tensor(a), Tensor(b)), logic(Tensor(a), b), logic(a, Tensor(b))):
            np.testing.assert_array_equal(y.numpy(), logic(a, b))
            assert y.dtype == a.dtype
    with pytest.raises(TypeError, match=r"^[&|^]: the operands have dtype float32; expected booleans or integers$"):
        logic(Tensor([1.0]), Tensor([1.0]))


def test_inversion_floor_division_and_remainder():
    assert (~Tensor(np.array([True, False]))).tolist() == [False, True]
    assert (Tensor(np.array([7, -7])) // 2).tolist() == [3, -4]
    assert (7 // Tensor(np.array([2, -2]))).tolist() == [3, -4]
    assert (np.array([7, -7]) // Tensor(np.array([2, 2]))).tolist() == [3, -4]
    assert (7 % Tensor([2.0, 4.0])).tolist() == [1, 3]
    with pytest.raises(TypeError, match=r"^//: has no gradient; use x\.detach"):
        Tensor([1.0], requires_grad=True) // 2


def test_unary_plus_returns_the_same_values():
    x = Tensor([1.0, 2.0], requires_grad=True)
    (+x * 3).sum().backward()
    np.testing.assert_array_equal(x.grad, [3, 3])


def test_comparison_with_other_types_and_shapes():
    x = Tensor([1.0, 2.0])
    assert (x == None) is False  # noqa: E711
    assert (x != "text") is True
    with pytest.raises(TypeError):
        x < "text"  # noqa: B015
    with pytest.raises(ValueError, match=r"^==: the operands have shapes \(2,\) and \(3,\), which do not broadcast$"):
        x == Tensor([1.0, 2.0, 3.0])  # noqa: B015


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators_on_leaves_raise(name):
    p = Parameter(np.ones((2, 2), dtype="float32"))
    with pytest.raises(TypeError, match=r"^.{1,2}=: a Parameter cannot be changed in place: use x.data .{1,2}= y"):
        getattr(operator, name)(p, np.ones((2, 2)))
    x = Tensor(np.ones((2, 2)), requires_grad=True)
    with no_grad(), pytest.raises(TypeError, match="a Tensor cannot be changed in place"):
        getattr(operator, name)(x, np.ones((2, 2)))


def test_in_place_operators_on_results_and_constants_return_new_tensors():
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = total = x * 2
    y += 1
    y *= x
    assert total.tolist() == [2, 4]
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 9])
    constant = Tensor([1.0])
    with no_grad():
        constant += 1
    assert constant.tolist() == [2]


def test_a_manual_training_loop():
    """As in PyTorch's first tutorial, but the updates are made to .data."""
    layer = nn.Linear(2, 1)
    x, y = Tensor(np.array([[1.0, 2.0], [3.0, -1.0]], "float32")), Tensor(np.array([[1.0], [2.0]], "float32"))
    losses = []
    for _ in range(50):
        loss = (layer(x) - y).square().mean()
        loss.backward()
        for p in layer.parameters():
            p.data -= 0.05 * p.grad
            p.grad = None
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
