"""Tensor methods with PyTorch's names: values and gradients, compared with PyTorch in float64."""

import inspect

import numpy as np
import pytest

from tests.against_torch import compare
from tinygrad2 import Tensor
from tinygrad2.names import PyTorchNames

R = np.random.default_rng(0)
ONE = (
    "neg", "clamp", "asin", "acos", "atan", "asinh", "acosh", "atanh", "swish", "frac", "movedim", "repeat_interleave",
    "index_select", "take_along_dim", "masked_select", "unbind", "logcumsumexp", "var_mean", "std_mean", "contiguous",
    "double", "t",
)  # fmt: skip
TWO = ("add", "sub", "mul", "div", "pow", "atan2", "fmod", "matmul", "mm", "eq", "ne", "lt", "le", "gt", "ge")
SHAPED = {"bmm": ((2, 3, 4), (2, 4, 2)), "mv": ((2, 3), (3,))}
PLAIN = ("numel", "dim", "tolist")
CONVERSIONS = {"float": "float32", "half": "float16", "int": "int32", "long": "int64"}
ARGUMENTS = {
    "clamp": (0.3, 0.6),
    "movedim": (0, 1),
    "repeat_interleave": (2, 1),
    "index_select": (1, np.array([2, 0])),
    "take_along_dim": (np.array([[0, 2], [1, 1]]), 1),
    "masked_select": (np.array([[True, False, True], [False, False, True]]),),
    "unbind": (1,),
    "logcumsumexp": (1,),
    "var_mean": (1,),
    "std_mean": (0, 0, True),
}
KEYWORDS = {"var_mean": {"dim": 1}, "std_mean": {"dim": 0, "correction": 0, "keepdim": True}}


def of_torch(t, name, x, *arguments):
    given = [t.as_tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    if name in KEYWORDS:
        return getattr(t, name)(x, **KEYWORDS[name])
    if name == "take_along_dim":
        return x.take_along_dim(*given)
    return t.nn.functional.silu(x) if name == "swish" else getattr(x, name)(*given)


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", ONE)
def test_a_method_with_one_operand(name):
    import torch

    arguments = ARGUMENTS.get(name, ())
    x = R.uniform(1.1, 2, (2, 3)) if name == "acosh" else R.uniform(0.1, 0.9, (2, 3))
    compare(torch, lambda x: getattr(x, name)(*arguments), lambda t, x: of_torch(t, name, x, *arguments), [x])


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("name", [*TWO, *SHAPED])
def test_a_method_with_two_operands(name):
    import torch

    shapes = SHAPED.get(name, ((3, 3), (3, 3)))
    arrays = [R.uniform(1, 3, shape) for shape in shapes]
    compare(torch, lambda a, b: getattr(a, name)(b), lambda t, a, b: getattr(a, name)(b), arrays)


def test_other_methods():
    x = Tensor(np.array([[1.5, 0.0], [-2.0, 1.0]]))
    assert x.numel() == 4
    assert x.dim() == 2
    assert x.tolist() == [[1.5, 0.0], [-2.0, 1.0]]
    assert x.logical_not().tolist() == [[False, True], [False, False]]
    assert x.isclose(x.numpy() + np.array([[1e-9, 0.1], [0.0, 0.0]])).tolist() == [[True, False], [True, True]]
    low = Tensor(np.array([-1000.0, 0.0, 1000.0])).logcumsumexp(0)
    np.testing.assert_allclose(low.numpy(), [-1000, 0, 1000])
    assert {name: str(getattr(x, name)().dtype) for name in CONVERSIONS} == CONVERSIONS


def test_every_name_is_tested():
    names = {name for name, _ in inspect.getmembers(PyTorchNames, inspect.isfunction)}
    assert names == {*ONE, *TWO, *SHAPED, *PLAIN, *CONVERSIONS, "logical_not", "isclose"}
