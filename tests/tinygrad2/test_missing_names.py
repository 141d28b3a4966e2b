"""The error for a name that exists in PyTorch or NumPy but not here says what to use instead."""

import numpy as np
import pytest

import tinygrad2
from tests.against_torch import compare
from tinygrad2 import Tensor, autograd, functional, missing_names, nn, ops, optim

TABLES = [
    ("Tensor", Tensor([1.0]), missing_names.TENSOR),
    ("tinygrad2", tinygrad2, missing_names.FUNCTIONS),
    ("tinygrad2", functional, missing_names.FUNCTIONS),
    ("tinygrad2.ops", ops, missing_names.OPS),
    ("tinygrad2.autograd", autograd, missing_names.AUTOGRAD),
    ("tinygrad2.nn", nn, missing_names.LAYERS),
    ("Linear", nn.Linear(1, 1), missing_names.MODULE),
    ("tinygrad2.optim", optim, missing_names.OPTIMIZERS),
    ("AdamW", optim.AdamW(nn.Linear(1, 1)), missing_names.OPTIMIZER),
]


@pytest.mark.parametrize(("owner", "value", "hints"), TABLES, ids=[f"{o}-{len(h)}" for o, _, h in TABLES])
def test_the_error_for_every_missing_name_contains_its_hint(owner, value, hints):
    for name, hint in hints.items():
        with pytest.raises(AttributeError) as raised:
            getattr(value, name)
        assert str(raised.value) == f"{owner} has no attribute {name!r}; {hint}"
        assert "\n" not in str(raised.value)
    with pytest.raises(AttributeError, match=rf"^{owner} has no attribute 'nonsense'$"):
        value.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("name", "hint"),
    [("mm", "use the method: x.mm"), ("numel", "use the method: x.numel"),
     ("median", "use np.median, which takes Tensors"), ("cross", "use np.cross, which takes Tensors")],
)  # fmt: skip
def test_hints_for_functions_that_are_methods_or_in_numpy(name, hint):
    with pytest.raises(AttributeError) as raised:
        getattr(tinygrad2, name)
    assert str(raised.value) == f"tinygrad2 has no attribute {name!r}; {hint}"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("add_", "use x = x.add(...), or write to x.data"),
        ("clamp_", "use x = x.clamp(...), or write to x.data"),
        ("zero_", "write to x.data"),
        ("nonsense_", "write to x.data"),
    ],
)
def test_hints_for_in_place_methods(name, use):
    with pytest.raises(AttributeError) as raised:
        getattr(Tensor([1.0]), name)
    assert str(raised.value) == f"Tensor has no attribute {name!r}; in-place methods are not supported: {use}"


@pytest.mark.parametrize("name", ["tensor", "array"])
def test_calling_a_module_named_like_a_function_raises(name):
    with pytest.raises(TypeError) as raised:
        getattr(tinygrad2, name)([1.0, 2.0])
    assert str(raised.value).startswith(f"tinygrad2.{name} is a module; use tinygrad2.Tensor(values)")


@pytest.mark.parametrize("operation", ["conv2d", "max_pool2d", "scatter_add", "linalg", "fft", "batch_norm"])
def test_unsupported_operations_raise(operation):
    for owner in (tinygrad2, Tensor([1.0])):
        with pytest.raises(AttributeError, match=r"not supported.*: "):
            getattr(owner, operation)


def test_the_hints_for_families_of_operations_are_correct():
    """The hints are: pooling with reshape, and scatter with one_hot."""
    x = np.arange(12.0).reshape(2, 6)
    pooled = Tensor(x).reshape(2, 6 // 3, 3).max(axis=-1)
    np.testing.assert_array_equal(pooled.numpy(), [[2, 5], [8, 11]])
    rows, index = np.arange(6.0).reshape(3, 2), np.array([1, 3, 1])
    expected = np.zeros((4, 2))
    np.add.at(expected, index, rows)
    added = functional.one_hot(index, 4).astype("float64").T @ Tensor(rows)
    np.testing.assert_array_equal(added.numpy(), expected)


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_the_compositions_in_the_hints_equal_pytorchs_functions():
    import torch

    r = np.random.default_rng(0)
    a, b = r.normal(size=(3, 4)), r.normal(size=(3, 4))
    f = torch.nn.functional

    def smooth(x, y):
        d = (x - y).abs()
        return functional.where(d < 1, 0.5 * d * d, d - 0.5).mean()

    def glu(x):
        u, v = x.chunk(2, -1)
        return u * v.sigmoid()

    for ours, theirs, arrays in (
        (lambda x: x / x.norm(axis=-1, keepdims=True), lambda t, x: f.normalize(x, dim=-1), [a]),
        (
            lambda x, y: (x * y).sum(-1) / (x.norm(axis=-1) * y.norm(axis=-1)),
            lambda t, x, y: f.cosine_similarity(x, y, -1),
            [a, b],
        ),
        (lambda x, y: (x[:, None] - y[None]).norm(axis=-1), lambda t, x, y: t.cdist(x, y), [a, b]),
        (smooth, lambda t, x, y: f.smooth_l1_loss(x, y), [a, b]),
        (glu, lambda t, x: f.glu(x), [a]),
        (lambda x: (-x).softmax(), lambda t, x: f.softmin(x, -1), [a]),
        (
            lambda p, q: (p.exp() * (p - q)).sum(),
            lambda t, p, q: f.kl_div(q, p.exp(), reduction="sum"),
            [a, b],
        ),
    ):
        compare(torch, ours, theirs, arrays, rtol=1e-10)
