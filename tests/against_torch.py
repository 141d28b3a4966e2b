"""PyTorch equivalents of the rows in gradcheck's table, and comparisons with them in float64.

This module does not import torch: tests pass it as an argument.
"""

import numpy as np

from tinygrad2 import Tensor
from tinygrad2.gradcheck import PLACES, SELECTED, TARGETS, VISIBLE, WEIGHTS

# The PyTorch equivalent of each row in gradcheck's table, called with the module torch and the inputs.
THEIRS = {
    "arccosh, from 1": lambda t, x: t.arccosh(x + 1),
    "elu": lambda t, x: t.nn.functional.elu(x),
    "elu, alpha": lambda t, x: t.nn.functional.elu(x, 0.5),
    "celu": lambda t, x: t.nn.functional.celu(x),
    "celu, alpha": lambda t, x: t.nn.functional.celu(x, 0.5),
    "hardsigmoid": lambda t, x: t.nn.functional.relu6(x + 3) / 6,  # PyTorch's function multiplies by float32(1 / 6)
    "quick_gelu": lambda t, x: x * t.sigmoid(1.702 * x),
    "log_softmax": lambda t, x: x.log_softmax(-1),
    "log_softmax, axis": lambda t, x: x.log_softmax(0),
    "logsumexp": lambda t, x: x.reshape(-1).logsumexp(0),
    "logsumexp, axes": lambda t, x: x.logsumexp((0, 2), keepdim=True),
    "softmax, axis": lambda t, x: x.softmax(1),
    "var": lambda t, x: x.var(correction=0),
    "var, axes": lambda t, x: x.var((0, 2), correction=1),
    "std": lambda t, x: x.std(correction=0),
    "std, axis": lambda t, x: x.std(-1, correction=1, keepdim=True),
    "norm": lambda t, x: t.linalg.vector_norm(x),
    "norm, axis": lambda t, x: t.linalg.vector_norm(x, dim=1),
    "norm, of order 3": lambda t, x: t.linalg.vector_norm(x, 3, dim=1),
    "cumsum": lambda t, x: x.reshape(-1).cumsum(0),
    "cumsum, axis": lambda t, x: x.cumsum(1),
    "cumprod": lambda t, x: x.reshape(-1).cumprod(0),
    "cumprod, axis": lambda t, x: x.cumprod(0),
    "rmsnorm": lambda t, x: t.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5),
    "rmsnorm, weight": lambda t, x, w: t.nn.functional.rms_norm(x, x.shape[-1:], w, eps=1e-5),
    "layernorm, no weight": lambda t, x: t.nn.functional.layer_norm(x, x.shape[-1:]),
    "layernorm, no bias": lambda t, x, w: t.nn.functional.layer_norm(x, x.shape[-1:], w),
    "sort": lambda t, x: tuple(x.sort(-1)),
    "sort, descending": lambda t, x: x.sort(0, descending=True).values,
    "topk": lambda t, x: x.topk(2, 1).values,
    "flip": lambda t, x: x.flip((0, 1, 2)),
    "flip, axes": lambda t, x: x.flip((0, -1)),
    "trace": lambda t, x: x.diagonal().sum(-1),
    "clip": lambda t, x: x.clip(-1, 1),
    "clip, one bound": lambda t, x: x.clip(max=0),
    "maximum, a number": lambda t, x: t.maximum(x, t.zeros_like(x)),
    "power": lambda t, a, b: a**b,
    "power, broadcast": lambda t, a, b: a**b,
    "power, of a number": lambda t, x: 2.5**x,
    "remainder": lambda t, a, b: t.remainder(a, b + 9.13),
    "where": lambda t, a, b: t.where(t.as_tensor(SELECTED), a, b),
    "where, broadcast": lambda t, a, b: t.where(t.as_tensor(SELECTED), a, b),
    "masked_fill": lambda t, x: x.masked_fill(t.as_tensor(SELECTED), 2.0),
    "min": lambda t, x: x.amin(),
    "min, axes": lambda t, x: x.amin((0, -1)),
    "prod, axes": lambda t, x: x.prod(2, keepdim=True).prod(0, keepdim=True),
    "prod, zeros": lambda t, x: (x * t.tensor([[0.0], [1.0], [1.0]], dtype=x.dtype)).prod(1),
    "squeeze, axis": lambda t, x: x.squeeze(1),
    "unsqueeze": lambda t, x: x.unsqueeze(-2),
    "expand_dims": lambda t, x: x.unsqueeze(0),
    "flatten, axes": lambda t, x: x.flatten(1, 2),
    "unflatten": lambda t, x: x.unflatten(1, (2, 3)),
    "permute": lambda t, x: x.permute(2, 0, 1),
    "swapaxes": lambda t, x: x.swapaxes(0, -1),
    "moveaxis": lambda t, x: x.moveaxis(0, 2),
    "roll": lambda t, x: x.roll(5),
    "roll, axes": lambda t, x: x.roll((1, -2), (0, 2)),
    "broadcast_to": lambda t, x: x.broadcast_to((2, 3, 4)),
    "expand": lambda t, x: x.expand(2, -1, 4),
    "repeat": lambda t, x: x.repeat_interleave(3, 1),
    "repeat, counts": lambda t, x: x.repeat_interleave(t.tensor([2, 0, 1]), 0),
    "tile": lambda t, x: x.tile(2, 1, 3),
    "split": lambda t, x: x.split(2, 1),
    "split, sizes": lambda t, x: x.split((1, 4), -1),
    "chunk": lambda t, x: x.chunk(3, 1),
    "pad": lambda t, x: t.nn.functional.pad(x, (2, 3, 1, 0), value=0.5),
    "pad, reflect": lambda t, x: t.nn.functional.pad(x[None, None], (2, 2, 2, 2), mode="reflect")[0, 0],
    "pad, edge": lambda t, x: t.nn.functional.pad(x[None, None], (1, 2, 1, 2), mode="replicate")[0, 0],
    "gather": lambda t, x: x.gather(1, t.as_tensor(PLACES)),
    "take": lambda t, x: x[:, t.as_tensor(PLACES)],
    "diagonal, offset": lambda t, x: x.diagonal(1, -2, 0),
    "diag": lambda t, x: x.diag(-1),
    "tril, diagonal": lambda t, x: x.tril(-1),
    "triu, diagonal": lambda t, x: x.triu(1),
    "dot": lambda t, a, b: t.tensordot(a, b, 1),
    "outer": lambda t, a, b: t.outer(a, b.reshape(-1)),
    "tensordot, axes": lambda t, a, b: t.tensordot(a, b, ((0, 2), (1, 0))),
    "matmul, function": lambda t, a, b: a @ b,
    "einsum, matrices": lambda t, a, b: t.einsum("ij,jk->ik", a, b),
    "einsum, batch": lambda t, a, b: t.einsum("bhid,bhjd->bhij", a, b),
    "einsum, three": lambda t, a, b, c: t.einsum("ai,bij,cj->abc", a, b, c),
    "einsum, diagonal": lambda t, a: t.einsum("iij->ji", a),
    "einsum, trace": lambda t, a, b: t.einsum("ii,jk", a, b),
    "einsum, dots": lambda t, a, b: t.einsum("...ij,j...->...i", a, b),
    "concatenate": lambda t, a, b: t.cat([a, b, a], 1),
    "concatenate, flattened": lambda t, a, b: t.cat([a.reshape(-1), b]),
    "stack, axis": lambda t, a, b: t.stack([a, b], -1),
    "dstack": lambda t, a, b: t.dstack([a, b]),
    "vdot": lambda t, a, b: t.vdot(a.reshape(-1), b),
    "degrees": lambda t, x: t.rad2deg(x),
    "radians": lambda t, x: t.deg2rad(x),
    "diff": lambda t, x: x.diff(2, 1),
    "array_split": lambda t, x: t.tensor_split(x, 3, 1),
    "vstack": lambda t, a, b: t.vstack([a, b]),
    "hstack, two": lambda t, a, b: t.hstack([a, b]),
    "meshgrid": lambda t, a, b: t.meshgrid(a, b, indexing="xy"),
    "add, function": lambda t, a, b: a + b,
    "subtract, function": lambda t, a, b: a - b,
    "multiply, function": lambda t, a, b: a * b,
    "divide, function": lambda t, a, b: a / b,
    "rotary_embedding": lambda t, x: rotated(t, x, 3, interleaved=False),
    "rotary_embedding, interleaved": lambda t, x: rotated(t, x, 0, interleaved=True),
    "scaled_dot_product_attention": lambda t, q, k, v: t.nn.functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True
    ),
    "scaled_dot_product_attention, mask": lambda t, q, k, v: t.nn.functional.scaled_dot_product_attention(
        q, k, v, t.as_tensor(VISIBLE), enable_gqa=True
    ),
    "scaled_dot_product_attention, bias": lambda t, q, k, v, bias: t.nn.functional.scaled_dot_product_attention(
        q, k, v, bias, enable_gqa=True
    ),
    "scaled_dot_product_attention, causal, dropout": None,  # PyTorch draws different random numbers
    "l1_loss": lambda t, a, b: t.nn.functional.l1_loss(a, b + 9, reduction="sum"),
    "nll_loss": lambda t, x: t.nn.functional.nll_loss(x.reshape(10, 11), t.as_tensor(TARGETS).reshape(10)),
    "binary_cross_entropy": lambda t, p, y: t.nn.functional.binary_cross_entropy(p / 4, y / 4),
    "binary_cross_entropy_with_logits": lambda t, x, y: t.nn.functional.binary_cross_entropy_with_logits(
        x, y, reduction="none"
    ),
    "cross_entropy, options": lambda t, x: t.nn.functional.cross_entropy(
        x.moveaxis(-1, 1), t.as_tensor(TARGETS), t.as_tensor(WEIGHTS), ignore_index=3, label_smoothing=0.1
    ),
    "cross_entropy, none": lambda t, x: t.nn.functional.cross_entropy(
        x.moveaxis(-1, 1), t.as_tensor(TARGETS), reduction="none", label_smoothing=0.1
    ),
    "cross_entropy, shares": lambda t, x, y: t.nn.functional.cross_entropy(x, y.softmax(-1)),
}


def rotated(t, x, first, interleaved):
    """The rotary embedding as a product of complex numbers, (u + iv) e^(i angle)."""
    T, D = x.shape[-2:]
    angle = (t.arange(T) + first)[:, None] * 10000.0 ** (-t.arange(0, D, 2, dtype=x.dtype) / D)
    u, v = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : D // 2], x[..., D // 2 :])
    y = t.complex(u, v) * t.polar(t.ones_like(angle), angle)
    return t.stack([y.real, y.imag], -1).reshape(x.shape) if interleaved else t.cat([y.real, y.imag], -1)


def theirs(t, name):
    """PyTorch's function for a row of the table: the entry in THEIRS, or the function of the same name."""
    if name in THEIRS:
        return THEIRS[name]
    plain = name.split(",")[0]
    function = next(f for f in (getattr(m, plain, None) for m in (t, t.nn.functional)) if f is not None)
    return lambda t, *inputs: function(*inputs)


def gradients_of(results, inputs, dy):
    """The gradients of the sum of dy * results with respect to the PyTorch inputs."""
    total = sum((y * g).sum() for y, g in zip(results, dy, strict=True))
    total.backward()
    return [np.zeros(tuple(x.shape)) if x.grad is None else x.grad.numpy() for x in inputs]


def compare(t, ours, theirs, arrays, rtol=1e-12, atol=1e-13):
    """Compare the values of all results, and the gradients of floating-point results."""
    ours_in = [Tensor(array, requires_grad=True) for array in arrays]
    theirs_in = [t.tensor(array, requires_grad=True) for array in arrays]
    got, expected = ours(*ours_in), theirs(t, *theirs_in)
    got = got if isinstance(got, tuple) else (got,)
    expected = tuple(expected) if isinstance(expected, tuple | list) else (expected,)
    assert len(got) == len(expected)
    dy = []
    for a, b in zip(got, expected, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=rtol, atol=atol)
        dy.append(np.linspace(0.5, 1.5, a.size).reshape(a.shape))
    floats = [i for i, a in enumerate(got) if a.dtype.kind == "f"]
    if not any(expected[i].requires_grad for i in floats):
        return
    wanted = gradients_of([expected[i] for i in floats], theirs_in, [t.as_tensor(dy[i]) for i in floats])
    total = None
    for i in floats:
        part = (got[i] * dy[i]).sum()
        total = part if total is None else total + part
    total.backward()
    for x, g in zip(ours_in, wanted, strict=True):
        np.testing.assert_allclose(np.zeros(x.shape) if x.grad is None else x.grad, g, rtol=rtol, atol=atol)


@np.errstate(all="ignore")
def differences(t, ours, other, arrays):
    """The inputs for which a result ("value") or a gradient differs from PyTorch's."""
    found = {}
    ours_in = [Tensor(array, requires_grad=True) for array in arrays]
    theirs_in = [t.tensor(array, requires_grad=True) for array in arrays]
    y, expected = ours(*ours_in), other(*theirs_in)
    y.backward(np.ones(y.shape))
    expected.backward(t.ones_like(expected))
    for which, a, b in (
        ("value", y.numpy(), expected.detach().numpy()),
        *(("gradient", x.grad, z.grad.numpy()) for x, z in zip(ours_in, theirs_in, strict=True)),
    ):
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= 1e-12 * np.abs(b))
        if not same.all():
            found[which] = [tuple(float(array[i]) for array in arrays) for i in np.flatnonzero(~same)]
    return found
