"""Every operation on empty arrays gives the same results as PyTorch, or a one-line error."""

import numpy as np
import pytest

from tinygrad2 import Key, Tensor, ops

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.extras("torch")
F = torch.nn.functional

TOKENS = np.zeros((2, 0), int)
SHAPED = {  # (ours, PyTorch's, kinds of weights), tested with several shapes of x
    "gelu": (lambda x: ops.gelu(x), lambda x: F.gelu(x, approximate="tanh"), ()),
    "gelu, exact": (lambda x: ops.gelu(x, exact=True), F.gelu, ()),
    "gelu, bias": (lambda x, b: ops.gelu(x, b), lambda x, b: F.gelu(x + b, approximate="tanh"), (0,)),
    "softmax": (ops.softmax, lambda x: F.softmax(x, -1), ()),
    "layernorm": (ops.layernorm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), (0, 0)),
    "add_layernorm": (
        lambda x, w, b: ops.add_layernorm(x, x, w, b)[1],
        lambda x, w, b: F.layer_norm(x + x, x.shape[-1:], w, b),
        (0, 0),
    ),
    "linear": (ops.linear, lambda x, w: x @ w, (1,)),
    "linear, bias": (lambda x, w, b: ops.linear(x, w, b), lambda x, w, b: x @ w + b, (1, 2)),
    "matmul": (lambda x, w: x @ w, lambda x, w: x @ w, (1,)),
    "dropout": (lambda x: ops.dropout(x, 0.5, Key(0)), lambda x: F.dropout(x), ()),
    "exp": (lambda x: x.exp(), torch.exp, ()),
    "power": (lambda x: x**2, lambda x: x**2, ()),
    "multiply": (lambda x: x * x / (x + 1), lambda x: x * x / (x + 1), ()),
    "reshape": (lambda x: x.reshape(-1), lambda x: x.reshape(-1), ()),
    "transpose": (lambda x: x.transpose(), lambda x: x.permute(*range(x.ndim)[::-1]), ()),
    "getitem": (lambda x: x[..., None, []], lambda x: x[..., None, []], ()),
    "sum": (lambda x: x.sum(), lambda x: x.sum(), ()),
    "sum, axis": (lambda x: x.sum(-1), lambda x: x.sum(-1), ()),
    "mean": (lambda x: x.mean(), lambda x: x.mean(), ()),
    "mean, axis": (lambda x: x.mean(0), lambda x: x.mean(0), ()),
}
OTHERS = {
    "embedding": (lambda w: ops.embedding(TOKENS, w), lambda w: F.embedding(torch.tensor(TOKENS), w), [(5, 3)]),
    "embedding, positions": (
        lambda w, p: ops.embedding(TOKENS, w, p),
        lambda w, p: F.embedding(torch.tensor(TOKENS), w) + p[:0],
        [(5, 3), (4, 3)],
    ),
    "embedding, width 0": (
        lambda w: ops.embedding([[1, 2]], w),
        lambda w: F.embedding(torch.tensor([[1, 2]]), w),
        [(5, 0)],
    ),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, TOKENS[0]),
        lambda x: F.cross_entropy(x, torch.tensor(TOKENS[0])),
        [(0, 3)],
    ),
    "lm_head": (
        lambda x, w: ops.lm_head(x, w, TOKENS[0]),
        lambda x, w: F.cross_entropy(x @ w.T, torch.tensor(TOKENS[0])),
        [(0, 4), (3, 4)],
    ),
    "lm_head, width 0": (
        lambda x, w: ops.lm_head(x, w, [1, 2]),
        lambda x, w: F.cross_entropy(x @ w.T, torch.tensor([1, 2])),
        [(2, 0), (3, 0)],
    ),
    "attention, no tokens": (lambda x: ops.attention(x, 2), lambda x: x[..., :4], [(2, 0, 12)]),
    "attention, no sequences": (lambda x: ops.attention(x, 2), lambda x: x[..., :4], [(0, 3, 12)]),
    "gelu, 0-d": (ops.gelu, lambda x: F.gelu(x, approximate="tanh"), [()]),
    "softmax, 0-d": (ops.softmax, lambda x: F.softmax(x, -1), [()]),
}


def compare(ours, theirs, shapes):
    arrays = [np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape) for shape in shapes]
    inputs, others = (
        [Tensor(a, requires_grad=True) for a in arrays],
        [torch.tensor(a, requires_grad=True) for a in arrays],
    )
    y, z = ours(*inputs), theirs(*others)
    assert y.shape == tuple(z.shape)
    np.testing.assert_allclose(y.numpy(), z.detach().numpy(), rtol=1e-12)
    y.backward(np.ones(y.shape))
    z.backward(torch.ones_like(z))
    for x, t in zip(inputs, others, strict=True):
        gradient = np.zeros(x.shape) if x.grad is None else x.grad
        np.testing.assert_allclose(gradient, t.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (0, 2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("name", SHAPED)
def test_empty_arrays_give_the_same_results_as_pytorch(name, shape):
    if name == "matmul" and len(shape) == 1:
        shape = (1, 0)
    ours, theirs, weights = SHAPED[name]
    of_weight = {0: shape[-1:], 1: (shape[-1], 4), 2: (4,)}
    compare(ours, theirs, [shape, *(of_weight[kind] for kind in weights)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_empty_arguments_give_the_same_results_as_pytorch(name):
    compare(*OTHERS[name])


def test_zero_classes_are_rejected():
    with pytest.raises(ValueError, match=r"targets contain 0; expected integers in \[0, 0\)"):
        ops.cross_entropy(Tensor(np.ones((2, 0))), [0, 0])
