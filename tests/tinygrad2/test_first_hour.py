"""What users of PyTorch or NumPy write in their first hour works, or raises an error that says what to do.

Missing names are in test_missing_names.py.
"""

import copy
import math
import pickle

import numpy as np
import pytest

import tinygrad2 as tg
from tinygrad2 import Key, Tensor, nn, no_grad, ops, optim, record
from tinygrad2.params import Parameter

A = np.arange(6.0).reshape(2, 3)
X = Tensor(A, requires_grad=True)
INTEGERS, BOOLEANS = Tensor(np.array([1, 2, 3])), Tensor(np.array([True, False, True]))
CUBE = Tensor(np.ones((2, 3, 4)))


class MLP(nn.Module):
    def __init__(self, tied=False):
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.blocks, self.named = [nn.Linear(3, 3) for _ in range(2)], {"norm": nn.LayerNorm(3)}
        if tied:
            self.last.weight = self.first.weight

    def __call__(self, x):
        x = self.first(x).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.named["norm"](self.last(x))


INPUTS = Tensor(np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3))

# Calls that work: the call and its value.
WORKS = {
    "view": (lambda: X.view(-1, 2), A.reshape(-1, 2)),
    "view with size(0)": (lambda: X.view(X.size(0), -1), A),
    "size as in NumPy": (lambda: X.size, 6),
    "size as in PyTorch": (lambda: X.size(), (2, 3)),
    "size of an axis": (lambda: X.size(-1), 3),
    "numel": (lambda: X.numel(), 6),
    "negative steps": (lambda: X[::-1, ::-2], A[::-1, ::-2]),
    "a mask": (lambda: X[X > 2], A[A > 2]),
    "a mask of rows": (lambda: X[X.sum(1) > 4], A[1:]),
    "a list of booleans": (lambda: X[[True, False]], A[:1]),
    "None and Ellipsis": (lambda: X[None, ..., 1, None], A[None, ..., 1, None]),
    "a Tensor as an index": (lambda: X[Tensor(np.array([1, 0, 1]))], A[[1, 0, 1]]),
    "iteration": (lambda: [row.tolist() for row in X], A.tolist()),
    "unpacking": (lambda: (lambda a, b: b)(*X), A[1]),
    "Python's max": (lambda: max(X[0]), 2.0),
    "Python's sum": (lambda: sum(X[0]), 3.0),
    "item": (lambda: X.sum().item(), 15.0),
    "format": (lambda: f"{X.sum():.2f}", "15.00"),
    "math": (lambda: math.sqrt(X[1, 1]), 2.0),
    "an index of a list": (lambda: ["a", "b"][INTEGERS[0]], "b"),
    "a condition": (lambda: "yes" if X.sum() > 0 else "no", "yes"),
    "the operator in": (lambda: 5.0 in X, True),
    "a dict key": (lambda: {X: 1}[X], 1),
    "equality with None": (lambda: X == None, False),  # noqa: E711
    "integers times a float": (lambda: INTEGERS * 1.5, [1.5, 3, 4.5]),
    "a quotient of integers": (lambda: INTEGERS / 2, [0.5, 1, 1.5]),
    "a root of integers": (lambda: INTEGERS**0.5, np.sqrt([1, 2, 3]).astype("float32")),
    "a mean of booleans": (lambda: BOOLEANS.mean(), np.float32(2 / 3)),
    "a count of booleans": (lambda: BOOLEANS.sum(), 2),
    "booleans times floats": (lambda: BOOLEANS * X[0], [0, 0, 2]),
    "a list": (lambda: X * [1, 2, 3], A * [1, 2, 3]),
    "an array on the left": (lambda: A - X, A * 0),
    "a NumPy function": (lambda: np.exp(X), np.exp(A)),
    "NumPy's concatenate": (lambda: np.concatenate([X, X], axis=1), np.concatenate([A, A], axis=1)),
    "cat with dim": (lambda: tg.cat([X, X], dim=1), np.concatenate([A, A], axis=1)),
    "stack with dim": (lambda: tg.stack([X, X], dim=-1), np.stack([A, A], axis=-1)),
    "sum with dim and keepdim": (lambda: X.sum(dim=1, keepdim=True), A.sum(1, keepdims=True)),
    "softmax with dim": (lambda: tg.softmax(X, dim=0), np.exp(A) / np.exp(A).sum(0)),
    "norm of order 1": (lambda: X.norm(1), 15.0),
    "norm of infinite order": (lambda: X.norm(math.inf, axis=1), [2, 5]),
    "norm of an axis": (lambda: X.norm(axis=1), np.linalg.norm(A, axis=1)),
    "the sum of an empty tensor": (lambda: Tensor(np.zeros((0, 3))).sum(axis=0), np.zeros(3)),
    "the mean of an empty tensor": (lambda: tg.zeros(0).mean(), math.nan),
    "no_grad as a decorator": (lambda: no_grad()(lambda: (X * 2).requires_grad)(), False),
    "detach": (lambda: (X.detach() * 2).requires_grad, False),
    "a conversion": (lambda: X.to("float32").dtype.name, "float32"),
    "a conversion to integers": (lambda: X.long(), A),
    "zeros_like with a dtype": (lambda: tg.zeros_like(X, dtype="int64").dtype.name, "int64"),
    "deepcopy": (lambda: copy.deepcopy(X), A),
    "pickle": (lambda: pickle.loads(pickle.dumps(X)), A),
    "a function as a layer": (lambda: nn.Sequential(nn.Linear(3, 2), Tensor.tanh)(INPUTS).shape, (2, 2)),
    "a layer without inputs": (lambda: nn.Linear(0, 2)(tg.zeros(3, 0)), np.zeros((3, 2))),
    "parameters of lists and dicts": (lambda: len(list(MLP().parameters())), 10),
    "parameters of tied weights": (lambda: len(list(MLP(tied=True).parameters())), 9),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_call_gives_the_expected_value(name):
    call, expected = WORKS[name]
    with np.errstate(all="ignore"):
        y = call()
    if isinstance(y, Tensor):
        y = y.numpy()
    if isinstance(expected, str | bool | tuple | list) and not isinstance(y, np.ndarray):
        assert y == expected
    else:
        np.testing.assert_allclose(y, expected, rtol=1e-12)


def scale(x, gain, backward):
    """An operation with an incorrect backward function."""
    return record(x.data * gain.data, (x, gain), backward, saved=(x.data, gain.data))


def run_scale(returned):
    """Run scale() with a backward function that returns `returned(dy)`."""
    x, gain = Tensor(A, requires_grad=True), Tensor(np.ones(3), requires_grad=True)

    def scale_backward(saved, dy, into):
        return returned(dy)

    scale(x, gain, scale_backward).sum().backward()


# Calls that raise: the call, the type of the error, and its message.
RAISES = {
    "view with another size": (
        lambda: X.view(4),
        ValueError,
        r"reshape: the tensor has shape \(2, 3\), which cannot",
    ),
    "view with floats": (lambda: X.view(2.0, 3), TypeError, "reshape: got 2.0, 3; expected integers"),
    "item of several elements": (
        lambda: X.item(),
        ValueError,
        r"item\(\): the tensor has shape \(2, 3\); expected one element",
    ),
    "an index out of range": (
        lambda: X[5],
        IndexError,
        r"indexing: \[5\] is not a valid index for a tensor of shape \(2, 3\)",
    ),
    "too many indices": (lambda: X[0, 0, 0], IndexError, "indexing: .* is not a valid index"),
    "a mask of another shape": (lambda: X[[True, False, True]], IndexError, r"indexing: \[\[mask of shape \(3,\)\]\]"),
    "a string as an index": (lambda: X["a"], TypeError, "indexing: expected a Tensor, an array or numbers, got str"),
    "a float as an index": (lambda: X[0.5], TypeError, "indexing: an index has dtype float64; expected integers"),
    "a float in a slice": (
        lambda: X[1:2.5],
        TypeError,
        r"indexing: \[1:2.5\]: slice indices must be integers or None",
    ),
    "a step of 0": (lambda: X[::0], IndexError, r"indexing: \[::0\] is not a valid index"),
    "assignment to an element": (
        lambda: X.__setitem__(0, 1),
        TypeError,
        "a Tensor cannot be changed in place; write into",
    ),
    "iteration over a 0-d tensor": (lambda: list(X.sum()), TypeError, r"iteration: the tensor has shape \(\)"),
    "a condition on several elements": (
        lambda: bool(X > 0),
        ValueError,
        r"bool\(\): the tensor has shape \(2, 3\); .* use \(x",
    ),
    "inversion of floats": (lambda: ~X, TypeError, "~: the tensor has dtype float64; expected booleans or integers"),
    "two float types": (lambda: X[0] * tg.ones(3), TypeError, r"\*: the operands have dtypes .* x.astype\('float32'\)"),
    "shapes that do not broadcast": (
        lambda: X * [1, 2],
        ValueError,
        r"\*: the operands have shapes \(2, 3\) and \(2,\)",
    ),
    "a product with incompatible shapes": (lambda: X @ X, ValueError, r"@: shapes \(2, 3\) and \(2, 3\); expected"),
    "a string as an operand": (lambda: X * "a", TypeError, r"\*: expected a Tensor, an array or numbers, got str"),
    "None as an operand": (lambda: X + None, TypeError, r"\+: expected a Tensor, an array or numbers, got NoneType"),
    "an integer beyond 64 bits": (lambda: INTEGERS * 10**30, OverflowError, r"\*: 10+ does not fit in 64 bits"),
    "integers to a negative power": (lambda: INTEGERS**-1, ValueError, r"\*\*: integers to the power -1"),
    "a complex number": (lambda: Tensor(1j), TypeError, "Tensor: expected a Tensor, an array or numbers, got complex"),
    "rows of different lengths": (
        lambda: Tensor([[1], [2, 3]]),
        ValueError,
        "Tensor: nested lists have different lengths",
    ),
    "objects": (lambda: Tensor(np.array([None])), TypeError, "Tensor: data has dtype object"),
    "a list of Tensors": (
        lambda: Tensor([X[0, 0], 1.0]),
        TypeError,
        r"Tensor: the list contains a Tensor that requires a gradient, .* use stack\(\) or concatenate\(\)",
    ),
    "a list of Tensors as an operand": (
        lambda: X[0] * [X[0, 0], 1.0, 2.0],
        TypeError,
        r"\*: the list contains a Tensor",
    ),
    "a shape as in torch.Tensor": (
        lambda: Tensor(2, 3),
        TypeError,
        "Tensor: requires_grad is 3; expected True or False",
    ),
    "gradients of integers": (
        lambda: Tensor(np.ones(2, int), True),
        TypeError,
        "Tensor: requires_grad needs a floating",
    ),
    "requires_grad set": (
        lambda: setattr(X, "requires_grad", False),
        AttributeError,
        "requires_grad cannot be changed; use",
    ),
    "a device with a number": (
        lambda: X.to("cuda:0"),
        TypeError,
        "to: 'cuda:0' is not a dtype; expected a device, 'cpu'",
    ),
    "a dtype of PyTorch": (
        lambda: Tensor([1.0], dtype="torch.float32"),
        TypeError,
        "Tensor: 'torch.float32' is not a dtype",
    ),
    "a complex dtype": (lambda: X.astype("complex64"), TypeError, "astype: the dtype is complex64; expected floats"),
    "zeros with an invalid dtype": (
        lambda: tg.zeros(2, dtype="real"),
        TypeError,
        "full: 'real' is not a dtype; expected",
    ),
    "zeros with a float as a size": (
        lambda: tg.zeros(2.5),
        ValueError,
        r"zeros: the shape is \(2.5,\); expected integers",
    ),
    "eye with a float as a size": (lambda: tg.eye(2.5), ValueError, "eye: the shape is"),
    "arange of a string": (lambda: tg.arange("a"), TypeError, "arange: 'a' is not a finite number"),
    "linspace of -1 values": (lambda: tg.linspace(0, 1, -1), ValueError, "linspace: the shape is"),
    "a device that does not exist": (
        lambda: tg.zeros(2, device="tpu"),
        ValueError,
        "device 'tpu' is unknown; choose one",
    ),
    "a number as a key": (
        lambda: tg.randn(2, key=0),
        TypeError,
        r"random: the key has type int; expected a Key, as in",
    ),
    "a number as dropout's key": (
        lambda: tg.dropout(X, 0.5, 0),
        TypeError,
        "dropout: the key has type int; expected a",
    ),
    "a dropout rate above 1": (
        lambda: tg.dropout(X, 1.5, Key(0)),
        ValueError,
        "dropout: the dropout rate is 1.5; expected 0 <=",
    ),
    "an axis out of range": (lambda: X.sum(5), ValueError, "sum: axis 5 is out of range for a 2-d tensor"),
    "PyTorch's max": (lambda: X.max(dim=1), TypeError, "max: dim: PyTorch returns values and indices; use max"),
    "PyTorch's std": (lambda: X.std(dim=1), TypeError, r"std: dim: PyTorch divides by n - 1; use std"),
    "PyTorch's transpose of a matrix": (lambda: X.transpose(0, 1), ValueError, r"transpose: .* use swapaxes\(0, 1\)"),
    "PyTorch's transpose": (lambda: CUBE.transpose(-1, -2), ValueError, r"transpose: .* use swapaxes\(-1, -2\)"),
    "an axis as norm's order": (
        lambda: X.norm((0, 1)),
        ValueError,
        r"norm: p is \(0, 1\); expected a number of 1 or more",
    ),
    "a Tensor as a bound": (
        lambda: X.clip(X),
        TypeError,
        "clip: min has type Tensor; expected a number, or use maximum",
    ),
    "float targets": (
        lambda: tg.cross_entropy(X, Tensor([0, 1])),
        TypeError,
        "cross_entropy: targets have dtype float32; expected integers, or a probability for each class",
    ),
    "classes on the middle axis": (
        lambda: tg.cross_entropy(CUBE, np.zeros((2, 4), int), reduction="sum"),
        ValueError,
        r"cross_entropy: targets has shape \(2, 4\); expected \(2, 3\), since the classes are the last axis",
    ),
    "a target out of range": (
        lambda: tg.cross_entropy(X, [0, 3]),
        ValueError,
        r"cross_entropy: targets contain 3; expec",
    ),
    "a target of another shape": (lambda: tg.mse_loss(X, X[0]), ValueError, r"mse_loss: the target has shape \(3,\)"),
    "an embedding index out of range": (
        lambda: nn.Embedding(5, 2)([5]),
        ValueError,
        "embedding: tokens contain 5; expected",
    ),
    "an input of another width": (lambda: nn.Linear(4, 2)(INPUTS), ValueError, r"linear: x has shape \(2, 3\), weight"),
    "an input of another dtype": (
        lambda: nn.Linear(3, 2)(X),
        TypeError,
        "linear: weight is float32; expected float64, the dtype of",
    ),
    "an array as an input": (
        lambda: nn.Linear(3, 2)(A),
        TypeError,
        r"linear: expected Tensors, got ndarray; wrap it as",
    ),
    "a width of -1": (lambda: nn.Linear(-1, 2), ValueError, "Linear: n_in is -1; expected 0 or more"),
    "a float as a width": (lambda: nn.Embedding(2, 2.5), TypeError, "Embedding: width is 2.5; expected an integer"),
    "a shape as a width": (lambda: nn.LayerNorm((3,)), TypeError, r"LayerNorm: n is \(3,\); expected an integer"),
    "a list of layers": (
        lambda: nn.Sequential([nn.ReLU()]),
        TypeError,
        "Sequential: layer 0 has type list; expected",
    ),
    "a module with only a forward method": (
        lambda: type("Net", (nn.Module,), {"forward": lambda self, x: x})()(X),
        NotImplementedError,
        r"Net has no __call__; define the computation in __call__\(self, x\)",
    ),
    "a state of another shape": (
        lambda: MLP().load_state_dict(MLP().state_dict() | {"first.bias": np.ones(2)}),
        ValueError,
        r"load_state_dict: first.bias has shape \(2,\); expected \(3,\), the parameter's shape",
    ),
    "a state with another name": (
        lambda: MLP().load_state_dict(MLP().state_dict() | {"extra": np.ones(2)}),
        ValueError,
        "load_state_dict: MLP: the state has extra, which the module does not have",
    ),
    "a state with strings": (
        lambda: MLP().load_state_dict(MLP().state_dict() | {"first.bias": np.array(["1", "2", "3"])}),
        TypeError,
        "load_state_dict: first.bias has dtype <U1; expected floats, integers or booleans",
    ),
    "a state with complex numbers": (
        lambda: MLP().load_state_dict(MLP().state_dict() | {"first.bias": np.ones(3, complex)}),
        TypeError,
        "load_state_dict: first.bias has dtype complex128",
    ),
    "a state in a list": (lambda: MLP().load_state_dict([1]), TypeError, "load_state_dict: the state has type list"),
    "a folder that does not exist": (
        lambda: MLP().save("nowhere/model"),
        FileNotFoundError,
        "save: the folder nowhere",
    ),
    "a negative learning rate": (lambda: optim.SGD(MLP(), lr=-1), ValueError, "SGD: lr is -1, out of range"),
    "a string as a learning rate": (
        lambda: optim.AdamW(MLP(), lr="1"),
        TypeError,
        "AdamW: lr is '1'; expected a number",
    ),
    "a NaN learning rate, set later": (
        lambda: setattr(optim.AdamW(MLP()), "lr", math.nan),
        ValueError,
        "AdamW: lr is nan, out of range",
    ),
    "a closure": (lambda: optim.SGD(MLP()).step(min), TypeError, "SGD: max_norm is .*; expected a number"),
    "a negative max_norm": (lambda: optim.SGD(MLP()).step(-1.0), ValueError, "SGD: max_norm is -1.0, out of range"),
    "parameter groups": (
        lambda: optim.AdamW([{"params": []}]),
        TypeError,
        "optimizer: item 0 of the parameters has type dict",
    ),
    "a copy of an optimizer": (
        lambda: copy.deepcopy(optim.SGD(MLP())),
        TypeError,
        "SGD cannot be copied or pickled: create one for the copy",
    ),
    "a copy of a result": (lambda: copy.deepcopy(X * 2), TypeError, "a result on the tape cannot be copied or pickled"),
    "backward of several elements": (
        lambda: (X * 2).backward(),
        ValueError,
        r"backward: the tensor has shape \(2, 3\), not one",
    ),
    "retain_graph": (
        lambda: X.sum().backward(retain_graph=True),
        NotImplementedError,
        "backward: retain_graph: a graph is freed",
    ),
    "create_graph": (
        lambda: X.sum().backward(create_graph=True),
        NotImplementedError,
        "backward: create_graph: second-order",
    ),
    "a gradient of a constant": (lambda: INTEGERS.sum().backward(), RuntimeError, "backward: nothing is recorded here"),
    "a gradient of another shape": (
        lambda: setattr(X, "grad", np.ones(2)),
        ValueError,
        r"grad has shape \(2,\); expected",
    ),
    "gradients without a comma": (
        lambda: run_scale(lambda dy: dy),
        TypeError,
        "scale: backward returned ndarray; expected a",
    ),
    "too few gradients": (
        lambda: run_scale(lambda dy: (dy,)),
        ValueError,
        "scale: backward returned 1 gradients; expected a",
    ),
    "a gradient that is not summed": (
        lambda: run_scale(lambda dy: (dy, dy)),
        ValueError,
        r"scale: .* parent 1 a gradient of",
    ),
    "a gradient of another dtype": (
        lambda: run_scale(lambda dy: (dy.astype("float32"), None)),
        TypeError,
        "scale: .* parent 0 a gradient of dtype float32",
    ),
    "a gradient that is a Tensor": (
        lambda: run_scale(lambda dy: (Tensor(dy), None)),
        TypeError,
        "scale: .* object of type Tensor",
    ),
    "a parent instead of a tuple": (
        lambda: record(A, X, lambda saved, dy, into: (dy,)),
        TypeError,
        r"record: parents is a Tensor; expected a tuple",
    ),
    "an array as a parent": (
        lambda: record(A, (A,), lambda saved, dy, into: (dy,)),
        TypeError,
        "record: parents contains objects that are not Tensors",
    ),
    "no backward function": (
        lambda: record(A, (X,), None),
        TypeError,
        "record: backward has type NoneType; expected a",
    ),
}


@pytest.mark.parametrize("name", RAISES)
def test_a_call_raises_a_one_line_error(name):
    call, kind, message = RAISES[name]
    with pytest.raises(kind, match=f"^{message}") as raised:
        call()
    assert "\n" not in str(raised.value)


# Training -------------------------------------------------------------------------------------------------------------


def test_tied_weights_are_updated_once_and_stay_tied_in_copies():
    model = MLP(tied=True)
    dy = Tensor(np.linspace(1, 2, 6, dtype="float32").reshape(2, 3))
    (model(INPUTS) * dy).sum().backward()
    weight, gradient = model.first.weight.numpy().copy(), model.first.weight.grad.copy()
    optim.SGD(model, lr=0.1, momentum=0.0).step()
    np.testing.assert_allclose(model.last.weight.numpy(), weight - 0.1 * gradient, rtol=1e-6)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.first.weight is copied.last.weight
        assert copied.first.weight is not model.first.weight


def test_a_parameter_that_is_listed_twice_is_updated_once():
    p = Parameter(np.ones(2, dtype="float32"))
    optimizer = optim.SGD([p, p], lr=0.1, momentum=0.0)
    (p * 3).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(p.numpy(), [0.7, 0.7], rtol=1e-6)
    assert len(list(optimizer.model.named_parameters())) == 1


def test_parameters_that_the_optimizer_does_not_have_are_frozen():
    model = MLP()
    before = model.state_dict()
    optimizer = optim.AdamW(model.last.parameters(), lr=0.1)
    model(INPUTS).square().sum().backward()
    optimizer.step()
    changed = {name for name, values in model.state_dict().items() if (values != before[name]).any()}
    assert changed == {"last.weight", "last.bias"}


def test_an_optimizer_can_be_copied_through_its_state():
    models = [MLP(), MLP()]
    optimizers = [optim.AdamW(model, lr=0.1) for model in models]
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 0 and model is models[1]:
                continue
            model(INPUTS).square()[:, :2].sum().backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()
        if step == 0:
            models[1].load_state_dict(models[0].state_dict())
            optimizers[1].load_state(optimizers[0].state(), optimizers[0].steps)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_load_state_dict_without_strict_sets_the_matching_parameters():
    model, other = MLP(), MLP()
    for p in other.parameters():
        p.data = p.data + 1
    state = other.state_dict()
    part = {"first.weight": state["first.weight"], "extra": np.ones(2), "first.bias": state["first.bias"].tolist()}
    before = model.state_dict()
    assert model.load_state_dict(part, strict=False) is model
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values, (state if name in part else before)[name])


@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_the_gradient_of_a_zero_norm_is_zero(order):
    x = Tensor(np.array([[3.0, -4.0], [0.0, 0.0]]), requires_grad=True)
    with np.errstate(all="ignore"):
        x.norm(order, axis=1).sum().backward()
    assert (x.grad[1] == 0).all()
    size = np.abs(x.data[0])
    expected = {1: [1, -1], math.inf: [0, -1]}.get(order)
    if expected is None:
        expected = np.sign(x.data[0]) * size ** (order - 1) * (size**order).sum() ** (1 / order - 1)
    np.testing.assert_allclose(x.grad[0], expected, rtol=1e-12)


def test_attention_checks_its_key():
    with pytest.raises(TypeError, match=r"^attention: the key has type int"):
        ops.attention(Tensor(np.ones((1, 2, 6))), 1, 0.1, 3)
