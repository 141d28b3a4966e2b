"""tinygrad2/recipes.py: a layer recomputes its input instead of saving it."""

import numpy as np
import pytest

from tinygrad2 import Tensor, nn, ops
from tinygrad2.backend import backend_of

CHEAP = {
    "gelu": lambda x, w, b: ops.gelu(x),
    "gelu, bias": lambda x, w, b: ops.gelu(x, b),
    "layernorm": lambda x, w, b: ops.layernorm(x, w, b),
    "add_layernorm": lambda x, w, b: ops.add_layernorm(x, x * 2, w, b)[1],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CHEAP)
def test_a_wide_layer_recomputes_its_input(name, dtype, monkeypatch):
    """The layer saves only arrays that the previous operation saves too, and the gradients are bit-identical."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(dtype) for shape in ((70, 24), (24,), (24,), (24, 800))]
    results, sizes = [], []
    for least in (800, 801):
        monkeypatch.setattr(backend_of(values[0]), "recompute_outputs", least)
        x, w, b, matrix = (Tensor(value, requires_grad=True) for value in values)
        h = CHEAP[name](x, w, b)
        y = ops.linear(h, matrix)
        sizes.append(sum(a.nbytes for a in y._edge[0].saved if isinstance(a, np.ndarray)))
        y.backward(np.ones(y.shape))
        results.append((y.data, *(t.grad for t in (x, w, b, matrix) if t.grad is not None)))
    assert sizes == [values[3].nbytes, values[3].nbytes + values[0].nbytes]
    for recomputed, saved in zip(*results, strict=True):
        np.testing.assert_array_equal(recomputed, saved)


def test_an_input_that_was_replaced_is_not_recomputed(monkeypatch):
    monkeypatch.setattr(backend_of(np.ones(1)), "recompute_outputs", 1)
    x, matrix = Tensor(np.ones((2, 3)), requires_grad=True), Tensor(np.ones((3, 4)), requires_grad=True)
    h = ops.gelu(x)
    h.data = np.full((2, 3), 7.0)
    ops.linear(h, matrix).sum().backward()
    np.testing.assert_array_equal(matrix.grad, 14)


def test_recomputing_an_input_from_changed_data_raises(monkeypatch):
    """Only the recomputation of the input needs the bias of LayerNorm."""
    monkeypatch.setattr(backend_of(np.ones(1)), "recompute_outputs", 1)
    norm, matrix = nn.LayerNorm(3), Tensor(np.ones((3, 4), np.float32), requires_grad=True)
    y = ops.linear(norm(Tensor(np.ones((2, 3), np.float32))), matrix).sum()
    norm.bias.data = np.ones(3)
    with pytest.raises(RuntimeError, match=r"linear: an input of shape .*, saved for the backward pass, was"):
        y.backward()
