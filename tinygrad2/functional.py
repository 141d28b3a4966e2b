"""Operations as functions: tinygrad2.relu(x), tinygrad2.maximum(a, b), tinygrad2.concatenate([a, b]).

Each method of Tensor (see tensor.py and methods.py) has a function of the same name, which also accepts an array, a
number or nested lists instead of a Tensor. Other functions join or create tensors, or are for neural networks:

    join        concatenate (cat) stack vstack hstack dstack meshgrid
    products    einsum matmul vdot kron
    networks    rmsnorm layernorm rotary_embedding scaled_dot_product_attention one_hot
    losses      cross_entropy nll_loss mse_loss l1_loss binary_cross_entropy binary_cross_entropy_with_logits
    create      zeros ones full eye arange linspace rand randn zeros_like ones_like full_like

The operations of GPT-2 are defined in ops.py, and are also available here.
"""

from __future__ import annotations

import builtins  # abs, all, any, max, min, pow, round and sum are functions of this module
import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy
from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import arguments, methods, missing_names, ops, protocols, random
from tinygrad2.array import Array
from tinygrad2.autograd import GradientBuffers, Gradients, Saved
from tinygrad2.backend import backend_of, get_backend
from tinygrad2.methods import axis_of
from tinygrad2.ops import attention, dropout, embedding, gelu, linear
from tinygrad2.tensor import Tensor, record

# fmt: off
__all__ = [  # noqa: RUF022
    "abs", "absolute", "add", "all", "amax", "amin", "any", "arange", "arccos", "arccosh", "arcsin", "arcsinh",
    "arctan", "arctan2", "arctanh", "argmax", "argmin", "argsort", "array_split", "attention",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "broadcast_to", "cat", "ceil", "celu", "chunk",
    "clamp", "clip", "concatenate", "cos", "cosh", "cross_entropy", "cumprod", "cumsum", "degrees", "diag",
    "diagonal", "diff", "divide", "dot", "dropout", "dstack", "einsum", "elu", "embedding", "erf", "exp", "exp2",
    "expand", "expand_dims", "expm1", "eye", "flatten", "flip", "floor", "full", "full_like", "gather", "gelu",
    "hardsigmoid", "hardswish", "hardtanh", "hstack", "hypot", "inner", "isfinite", "isinf", "isnan", "kron",
    "l1_loss", "layernorm", "leaky_relu", "lerp", "linear", "linspace", "log", "log10", "log1p", "log2",
    "log_softmax", "logaddexp", "logsigmoid", "logsumexp", "masked_fill", "matmul", "max", "maximum", "mean",
    "meshgrid", "min", "minimum", "mish", "mod", "moveaxis", "mse_loss", "multiply", "nan_to_num", "negative",
    "nll_loss", "norm", "one_hot", "ones", "ones_like", "outer", "pad", "permute", "pow", "power", "prod",
    "quick_gelu", "radians", "rand", "randn", "ravel", "reciprocal", "relu", "relu6", "remainder", "repeat",
    "reshape", "rmsnorm", "roll", "rotary_embedding", "round", "rsqrt", "scaled_dot_product_attention", "selu",
    "sigmoid", "sign", "silu", "sin", "sinh", "softmax", "softplus", "softsign", "sort", "split", "sqrt", "square",
    "squeeze", "stack", "std", "subtract", "sum", "swapaxes", "swish", "take", "tan", "tanh", "tensordot", "tile",
    "topk", "trace", "transpose", "tril", "triu", "trunc", "unflatten", "unsqueeze", "var", "vdot", "vstack",
    "where", "zeros", "zeros_like",
]
# fmt: on

P = ParamSpec("P")
R = TypeVar("R")
Operand = Tensor | ArrayLike


def _missing(name: str) -> AttributeError:
    """The error for a function that does not exist, which suggests what to use instead."""
    hints = dict(missing_names.FUNCTIONS)
    if name not in hints and hasattr(Tensor, name):
        hints[name] = f"use the method: x.{name}"
    elif name not in hints and protocols.takes_tensors(getattr(numpy, name, None)):
        hints[name] = f"use np.{name}, which takes Tensors"
    return missing_names.missing("tinygrad2", name, hints)


if not TYPE_CHECKING:  # so that type checkers report misspelled names

    def __getattr__(name):
        raise _missing(name)


def _tensor(value: Operand) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)


def _tensors(op: str, values: Sequence[Operand]) -> list[Tensor]:
    """The values as Tensors of a common dtype, by the promotion rules in arguments.py."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{op}: expected a list or tuple of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{op}: the list is empty; expected at least one tensor")
    like = next((value for value in values if isinstance(value, Tensor)), _tensor(values[0]))
    for value in values:  # promote `like` to the widest dtype
        like = like._operands(op, value, broadcast=False)[0]
    return [like._operands(op, value, broadcast=False)[1] for value in values]


# Join -----------------------------------------------------------------------------------------------------------------


@protocols.pytorch_names
def concatenate(tensors: Sequence[Operand], axis: int | None = 0) -> Tensor:
    """Join tensors along an axis. Their shapes must be equal except along `axis`. If axis is None, they are flattened.

    >>> concatenate([ones(2, 3), zeros(2, 1)], axis=1).shape
    (2, 4)
    """
    given = _tensors("concatenate", tensors)
    if axis is None:
        return methods.concatenate([x.ravel() for x in given], 0)
    return methods.concatenate(given, axis)


cat = concatenate


@protocols.pytorch_names
def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Join tensors of the same shape along a new axis at `axis`."""
    given = _tensors("stack", tensors)
    for i, x in enumerate(given):
        if x.shape != given[0].shape:
            raise ValueError(f"stack: tensor {i} has shape {x.shape}; expected {given[0].shape}, like tensor 0")
    at = axis_of("stack", axis, given[0].ndim + 1)
    return methods.concatenate([x.unsqueeze(at) for x in given], at)


def vstack(tensors: Sequence[Operand]) -> Tensor:
    """Join tensors along the first axis. Vectors are treated as rows."""
    given = _tensors("vstack", tensors)
    return methods.concatenate([x if x.ndim > 1 else x.reshape(1, x.size) for x in given], 0)


def hstack(tensors: Sequence[Operand]) -> Tensor:
    """Join tensors along the second axis. Vectors are joined along their only axis."""
    given = [x if x.ndim else x.reshape(1) for x in _tensors("hstack", tensors)]
    return methods.concatenate(given, builtins.min(1, given[0].ndim - 1))


def dstack(tensors: Sequence[Operand]) -> Tensor:
    """Join tensors along the third axis. Vectors are treated as (1, n, 1), and matrices as (m, n, 1)."""
    given = [x.reshape(1, x.size) if x.ndim < 2 else x for x in _tensors("dstack", tensors)]
    return methods.concatenate([x.unsqueeze(-1) if x.ndim < 3 else x for x in given], 2)


def meshgrid(*vectors: Operand, indexing: str = "xy") -> tuple[Tensor, ...]:
    """The coordinates of a grid, with the elements of each vector along its own axis. "xy" swaps the first two axes."""
    if indexing not in ("xy", "ij"):
        raise ValueError(f'meshgrid: indexing is {indexing!r}; expected "xy" or "ij"')
    given = [x.ravel() for x in map(_tensor, vectors)]
    shape = tuple(x.size for x in given)
    grids = [
        x.reshape(tuple(x.size if j == i else 1 for j in range(len(given)))).broadcast_to(shape)
        for i, x in enumerate(given)
    ]
    return tuple(grid.swapaxes(0, 1) if indexing == "xy" and len(given) > 1 else grid for grid in grids)


# Products -------------------------------------------------------------------------------------------------------------


def einsum(subscripts: str, *operands: Operand) -> Tensor:
    """The sum of products specified by the subscripts, as in NumPy's einsum: "ij,jk->ik" is a matrix product.

    Each operand has one letter per axis; "..." stands for further axes, which broadcast. Letters that are not in the
    result are summed over. Without "->", the result has the letters that appear once, in alphabetical order. Operands
    are multiplied from left to right, two at a time, as matrix products.
    """
    tensors = _tensors("einsum", operands)
    terms, result = _parse_einsum(subscripts, [x.ndim for x in tensors])
    lengths: dict[str, int] = {}
    for i, (term, x) in enumerate(zip(terms, tensors, strict=True)):
        for letter, n in zip(term, x.shape, strict=True):
            if lengths.setdefault(letter, n) == 1:
                lengths[letter] = n
            elif n not in (1, lengths[letter]):
                raise ValueError(
                    f"einsum: {subscripts!r}: operand {i} has shape {x.shape}, where {letter!r} has length {n}; "
                    f"expected {lengths[letter]}, as in an earlier operand"
                )
    term, x = _reduce(terms[0], tensors[0], {*result, *"".join(terms[1:])})
    for i in range(1, len(terms)):
        later = {*result, *"".join(terms[i + 1 :])}
        other, y = _reduce(terms[i], tensors[i], {*term, *later})
        term, x = _reduce(term, x, {*other, *later})
        term, x = _multiply(term, x, other, y, later)
    return x.transpose(tuple(term.index(letter) for letter in result))


def _parse_einsum(subscripts: str, axes: list[int]) -> tuple[list[str], str]:
    """The letters of the axes of each operand and of the result. "..." is replaced by unused letters."""
    text = subscripts.replace(" ", "")
    left, arrow, result = text.partition("->")
    terms, letters = left.split(","), set(text) - {",", ".", "-", ">"}
    plain = builtins.all(letter in string.ascii_letters for letter in letters)
    if (
        not plain
        or len(terms) != len(axes)
        or builtins.any("." in term.replace("...", "", 1) for term in (*terms, result))
    ):
        raise ValueError(
            f"einsum: {subscripts!r} with {len(axes)} operands; expected letters for each operand, separated by commas"
        )
    further = [n - len(term.replace("...", "")) for term, n in zip(terms, axes, strict=True)]
    for i, (term, more) in enumerate(zip(terms, further, strict=True)):
        if more < 0 or (more and "..." not in term):
            raise ValueError(f"einsum: {subscripts!r}: operand {i} has {axes[i]} axes, which do not match {term!r}")
    spare = [letter for letter in string.ascii_letters if letter not in letters]
    dots = spare[: builtins.max((n for n, term in zip(further, terms, strict=True) if "..." in term), default=0)]
    terms = [t.replace("...", "".join(dots[len(dots) - n :])) for t, n in zip(terms, further, strict=True)]
    if arrow:
        result = result.replace("...", "".join(dots))
    else:
        result = "".join(dots) + "".join(sorted(x for x in letters if "".join(terms).count(x) == 1))
    if len(set(result)) != len(result) or not set(result) <= {*"".join(terms)}:
        raise ValueError(f"einsum: {subscripts!r}: each letter of the result must be unique and occur in an operand")
    return terms, result


def _reduce(term: str, x: Tensor, keep: set[str]) -> tuple[str, Tensor]:
    """Take the diagonal for every letter that appears twice in a term, and sum over letters not in `keep`."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            first, second = term.index(letter), term.rindex(letter)
            x = x.diagonal(0, first, second)
            term = term[:first] + term[first + 1 : second] + term[second + 1 :] + letter
    summed = tuple(i for i, letter in enumerate(term) if letter not in keep)
    return "".join(letter for letter in term if letter in keep), x.sum(summed) if summed else x


def _multiply(a: str, x: Tensor, b: str, y: Tensor, keep: set[str]) -> tuple[str, Tensor]:
    """The product of two terms. Letters in both terms are batch axes if they are in `keep`; otherwise, they are summed
    over."""
    lengths = dict(zip(a, x.shape, strict=True))
    for letter, n in zip(b, y.shape, strict=True):
        lengths[letter] = n if lengths.get(letter, 1) == 1 else lengths[letter]
    batch = [letter for letter in a if letter in b and letter in keep]
    summed = [letter for letter in a if letter in b and letter not in keep]
    rows, columns = [letter for letter in a if letter not in b], [letter for letter in b if letter not in a]

    def ordered(term: str, t: Tensor, *groups: list[str]) -> Tensor:
        t = t.transpose(tuple(term.index(letter) for group in groups for letter in group))
        t = t.broadcast_to(tuple(lengths[letter] for group in groups for letter in group))
        return t.reshape(tuple(math.prod(lengths[letter] for letter in group) for group in groups))

    if summed:
        product = ordered(a, x, batch, rows, summed) @ ordered(b, y, batch, summed, columns)
    else:
        product = ordered(a, x, batch, rows, []) * ordered(b, y, batch, [], columns)
    term = "".join([*batch, *rows, *columns])
    return term, product.reshape(tuple(lengths[letter] for letter in term))


def matmul(a: Operand, b: Operand) -> Tensor:
    """a @ b: the matrix product over the last two axes, with the leading axes broadcast."""
    return _tensor(a) @ b if isinstance(a, Tensor) or not isinstance(b, Tensor) else b.__rmatmul__(a)


def vdot(a: Operand, b: Operand) -> Tensor:
    """The sum of the products of all elements of two tensors of the same size."""
    return _tensor(a).ravel().dot(b.ravel() if isinstance(b, Tensor) else numpy.ravel(b))


def kron(a: Operand, b: Operand) -> Tensor:
    """The Kronecker product: a block matrix, in which each block is an element of a times b."""
    x, y = (a if isinstance(a, Tensor) else _tensor(a))._operands("kron", b, broadcast=False)
    ndim = builtins.max(x.ndim, y.ndim)
    rows, blocks = (1,) * (ndim - x.ndim) + x.shape, (1,) * (ndim - y.ndim) + y.shape
    product = x.reshape(tuple(m for n in rows for m in (n, 1))) * y.reshape(tuple(m for n in blocks for m in (1, n)))
    return product.reshape(tuple(m * n for m, n in zip(rows, blocks, strict=True)))


# Networks -------------------------------------------------------------------------------------------------------------


def layernorm(x: Operand, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias over the last axis; weight and bias are (C,), by default 1 and 0."""
    x = _tensor(x)
    if x.ndim == 0:
        raise ValueError("layernorm: x has shape (); expected (..., C)")
    n, np = x.shape[-1], x.backend.np
    weight = Tensor(np.ones((n,), dtype=x.dtype)) if weight is None else weight
    return ops.layernorm(x, weight, Tensor(np.zeros((n,), dtype=x.dtype)) if bias is None else bias, eps)


def rmsnorm(x: Operand, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times weight (C,) if given (arXiv:1910.07467, eq. 4).

    16-bit inputs are computed in float32.
    """
    x = _tensor(x)
    if x.ndim == 0 or (weight is not None and weight.shape != x.shape[-1:]):
        shape = None if weight is None else weight.shape
        raise ValueError(f"rmsnorm: x has shape {x.shape} and weight {shape}; expected (..., C) and (C,)")
    wide = x if x.dtype.itemsize > 2 else x.astype("float32")
    y = wide * (wide.square().mean(-1, keepdims=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if wide is x else y.astype(x.dtype)


def rotary_embedding(
    x: Operand, positions: ArrayLike | int = 0, base: float = 10000.0, interleaved: bool = False
) -> Tensor:
    """Rotate each pair i of elements of the last axis by the angle position base^(-2 i / D) (arXiv:2104.09864).

    x (..., T, D), queries or keys with D even -> (..., T, D). A pair (u, v) becomes (u cos - v sin, v cos + u sin).
    positions    the positions of the T tokens (T,), or the first position.
    interleaved  if true, pair i is elements 2 i and 2 i + 1, as in the paper; else i and i + D / 2, as in Llama files.
    """
    x = _tensor(x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"rotary_embedding: x has shape {x.shape}; expected (..., T, D) with D even")
    T, D = x.shape[-2:]
    at = numpy.asarray(positions)
    at = at + numpy.arange(T) if at.ndim == 0 else at
    if at.shape != (T,):
        raise ValueError(f"rotary_embedding: positions have shape {at.shape}; expected ({T},), one per token")
    angle = at[:, None] * base ** (-numpy.arange(0, D, 2) / D)
    cos, sin = (Tensor(x.backend.asarray(f(angle).astype(x.dtype))) for f in (numpy.cos, numpy.sin))
    if interleaved:
        u, v = x[..., 0::2], x[..., 1::2]
        return stack([u * cos - v * sin, v * cos + u * sin], -1).reshape(x.shape)
    u, v = x[..., : D // 2], x[..., D // 2 :]
    return methods.concatenate([u * cos - v * sin, v * cos + u * sin], -1)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_key: random.Key | None = None,
) -> Tensor:
    """softmax(query key^T scale + mask) value (arXiv:1706.03762, eq. 1).

    query (..., H, T, D), key (..., K, S, D), value (..., K, S, E) -> (..., H, T, E). H is a multiple of K: H / K
    consecutive query heads share a key and value head (arXiv:2305.13245). (H, T, D) and (T, D) are also allowed.
    attn_mask    broadcasts to (..., H, T, S): booleans, True where a query may attend to a key, or floats that are
                 added to the scores. The output is 0 for a query that may not attend to any key.
    is_causal    query t attends to keys 0 ... t.
    scale        by default 1 / sqrt(D).
    dropout_key  if given, dropout is applied to the attention weights at rate dropout_p.
    Saves (..., H, T, S) arrays; `attention` computes packed causal self-attention in memory linear in T.
    """
    B, H, K = _check_attention(query, key, value)
    T, S, D = query.shape[-2], key.shape[-2], query.shape[-1]
    q = query.reshape((*B, K, H // K, T, D)) if query.ndim > 2 else query
    k, v = (x.unsqueeze(-3) if query.ndim > 2 else x for x in (key, value))
    whole = (*query.shape[:-1], S)
    scores = ((q * (1 / math.sqrt(D) if scale is None else scale)) @ k.swapaxes(-1, -2)).reshape(whole)
    visible = None
    if attn_mask is not None:
        mask = _tensor(attn_mask)
        if not _broadcasts_to(mask.shape, whole):
            raise ValueError(f"attention: attn_mask has shape {mask.shape}; expected one that broadcasts to {whole}")
        if mask.dtype.kind == "b":
            visible = mask.data
        else:
            visible = mask.data > -math.inf
            scores = scores + mask.where(visible, 0.0)
    if is_causal:
        below = query.backend.np.tri(T, S, dtype=bool)
        visible = below if visible is None else visible & below
    if visible is not None:  # use a finite value, so that a row without visible keys does not become NaN
        scores = scores.where(visible, float(numpy.finfo(query.dtype).min) / 2)
    p = scores.softmax(-1)
    if visible is not None:
        p = p.where(visible, 0.0)
    p = dropout(p, dropout_p, dropout_key)
    if query.ndim > 2:
        p = p.reshape((*B, K, H // K, T, S))
    return (p @ v).reshape((*query.shape[:-1], value.shape[-1]))


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[int, ...], int, int]:
    """The leading axes, the number of query heads, and the number of key heads."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: {name} has type {type(x).__name__}; expected a Tensor")
        if x.ndim < 2 or x.ndim != query.ndim:
            raise ValueError(f"attention: {name} has shape {x.shape}; expected (..., heads, time, size) for all three")
    B, H, K = (query.shape[:-3], query.shape[-3], key.shape[-3]) if query.ndim > 2 else ((), 1, 1)
    expected = (*B, *((K,) if query.ndim > 2 else ()), key.shape[-2])
    if (
        key.shape[:-1] != expected
        or value.shape[:-1] != expected
        or key.shape[-1] != query.shape[-1]
        or H % builtins.max(K, 1)
    ):
        raise ValueError(
            f"attention: query has shape {query.shape}, key {key.shape}, value {value.shape}; expected (..., H, T, D), "
            f"(..., K, S, D) and (..., K, S, E) with H a multiple of K"
        )
    return B, H, K


def _broadcasts_to(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    try:
        return numpy.broadcast_shapes(shape, whole) == whole
    except ValueError:
        return False


def one_hot(indices: Any, num_classes: int) -> Tensor:
    """1 at the index and 0 elsewhere, along a new last axis of length num_classes. float32, without a gradient.

    >>> print(one_hot([0, 2], 3).numpy())
    [[1. 0. 0.]
     [0. 0. 1.]]
    """
    table = eye(num_classes)
    return table[table._indices("one_hot", indices, num_classes)]


# Losses ---------------------------------------------------------------------------------------------------------------


def _reduced(op: str, loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is {reduction!r}; expected "mean", "sum" or "none"')
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _like(x: Tensor, value: Operand) -> Tensor:
    return x._operands("cross_entropy", value, broadcast=False)[1]


def _same_shape(op: str, x: Operand, target: Operand) -> tuple[Tensor, Tensor]:
    a, b = _tensor(x)._operands(op, target)
    if a.shape != b.shape:
        raise ValueError(f"{op}: the target has shape {b.shape}; expected {a.shape}, the shape of the input")
    return a, b


def mse_loss(input: Operand, target: Operand, reduction: str = "mean") -> Tensor:
    """(input - target)^2. reduction: "mean", "sum", or "none" for all elements."""
    a, b = _same_shape("mse_loss", input, target)
    return _reduced("mse_loss", (a - b).square(), reduction)


def l1_loss(input: Operand, target: Operand, reduction: str = "mean") -> Tensor:
    """|input - target|. reduction: "mean", "sum", or "none" for all elements."""
    a, b = _same_shape("l1_loss", input, target)
    return _reduced("l1_loss", (a - b).abs(), reduction)


def cross_entropy(
    logits: Operand,
    targets: Any,
    weight: Operand | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean of -log softmax(logits)[target], in nats. logits (..., V); targets (...), or (..., V) probabilities.

    weight           the weight of each class (V,). The mean is weighted, unless the targets are probabilities.
    ignore_index     a target value that is ignored.
    reduction        "mean", "sum", or "none" for the loss of each row (...).
    label_smoothing  e: every class has the probability e / V, plus 1 - e for the target (arXiv:1512.00567, section 7).
    With integer targets and no options, this calls ops.cross_entropy, which saves less. Raises ValueError for a target
    outside [0, V).
    """
    logits = _tensor(logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits have shape (); expected (..., V)")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}; expected a number in [0, 1]")
    values = targets.data if isinstance(targets, Tensor) else numpy.asarray(targets)
    shares = values.dtype.kind == "f"
    if not shares and weight is None and (ignore_index, reduction, label_smoothing) == (None, "mean", 0.0):
        return ops.cross_entropy(logits, targets)
    V = logits.shape[-1]
    weights = ones_like(logits[(0,) * (logits.ndim - 1)]) if weight is None else _like(logits, weight)
    expected = logits.shape if shares else logits.shape[:-1]
    if shares and values.shape == logits.shape[:-1]:
        raise TypeError(
            f"cross_entropy: targets have dtype {values.dtype}; expected integers, or a probability for each class"
        )
    for name, shape, fit in (("weight", weights.shape, (V,)), ("targets", values.shape, expected)):
        if shape != fit:
            raise ValueError(
                f"cross_entropy: {name} has shape {shape}; expected {fit}, since the classes are the last axis"
            )
    terms = -logits.log_softmax() * weights
    if shares:
        share = _like(logits, targets) * (1 - label_smoothing) + label_smoothing / V
        return _reduced("cross_entropy", (terms * share).sum(-1), reduction)
    counted = values == values if ignore_index is None else values != ignore_index
    ids = _tensor(values).where(counted, 0)
    if ids.size and not (ids.min().item() >= 0 and ids.max().item() < V):
        raise ValueError(f"cross_entropy: targets are {ids.min().item()} to {ids.max().item()}; expected [0, {V})")
    rows = terms.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:  # (without it, infinity times 0 would give NaN where a logit is -inf)
        rows = rows * (1 - label_smoothing) + terms.sum(-1) * (label_smoothing / V)
    rows = rows.where(counted, 0.0)
    if reduction == "mean":
        return rows.sum() / weights.detach().take(ids, 0).where(counted, 0.0).sum()
    return _reduced("cross_entropy", rows, reduction)


def nll_loss(log_probabilities: Operand, targets: Any, reduction: str = "mean") -> Tensor:
    """-log_probabilities[target], for (..., V) and integer targets (...). reduction: "mean", "sum" or "none"."""
    x = _tensor(log_probabilities)
    at = _tensor(numpy.asarray(targets) if isinstance(targets, list | tuple | int) else targets)
    if x.ndim == 0 or at.shape != x.shape[:-1]:
        raise ValueError(f"nll_loss: shapes {x.shape} and {at.shape} of the targets; expected (..., V) and (...)")
    return _reduced("nll_loss", -x.gather(-1, at.unsqueeze(-1)).squeeze(-1), reduction)


def binary_cross_entropy(input: Operand, target: Operand, reduction: str = "mean") -> Tensor:
    """The mean of -(t log p + (1 - t) log(1 - p)) for input p. Logarithms are at least -100, as in PyTorch."""
    p, t = _same_shape("binary_cross_entropy", _tensor(input) * 1.0, target)
    np = p.backend.np
    with numpy.errstate(divide="ignore"):
        yes, no = np.maximum(np.log(p.data), -100), np.maximum(np.log1p(-p.data), -100)
    loss = record(
        -(t.data * yes + (1 - t.data) * no), (p, t), _binary_cross_entropy_backward, (p.data, t.data, yes, no)
    )
    return _reduced("binary_cross_entropy", loss, reduction)


def _binary_cross_entropy_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """dp = (1 - t) / (1 - p) - t / p, with denominators of at least 1e-12, as in PyTorch."""
    p, t, yes, no = saved
    np = backend_of(dy).np
    return dy * ((1 - t) / np.maximum(1 - p, 1e-12) - t / np.maximum(p, 1e-12)), dy * (no - yes)


def binary_cross_entropy_with_logits(input: Operand, target: Operand, reduction: str = "mean") -> Tensor:
    """binary_cross_entropy of sigmoid(x). It is computed as (1 - t) max(x, 0) + t max(-x, 0) + log(1 + e^-|x|), which
    does not overflow, and does not lose precision where the loss is small."""
    x, t = _same_shape("binary_cross_entropy_with_logits", _tensor(input) * 1.0, target)
    np = x.backend.np
    small = np.log1p(np.exp(-np.abs(x.data)))
    y = (1 - t.data) * np.maximum(x.data, 0) + t.data * np.maximum(-x.data, 0) + small
    loss = record(y, (x, t), _binary_cross_entropy_with_logits_backward, saved=(x.data, t.data))
    return _reduced("binary_cross_entropy_with_logits", loss, reduction)


def _binary_cross_entropy_with_logits_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """dx = sigmoid(x) - t, computed as (1 - t) sigmoid(x) - t sigmoid(-x)."""
    x, t = saved
    np = backend_of(dy).np
    e = np.exp(-np.abs(x))
    larger, smaller = 1 / (1 + e), e / (1 + e)  # sigmoid(|x|) and sigmoid(-|x|)
    yes, no = np.where(x > 0, larger, smaller), np.where(x > 0, smaller, larger)
    return dy * ((1 - t) * yes - t * no), -dy * x


# Create ---------------------------------------------------------------------------------------------------------------

Shape = int | Sequence[int]


def _shape(op: str, shape: tuple[Any, ...]) -> tuple[int, ...]:
    lengths = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if not builtins.all(hasattr(n, "__index__") and n >= 0 for n in lengths):
        raise ValueError(f"{op}: the shape is {lengths}; expected integers of 0 or more")
    return tuple(int(n) for n in lengths)


def full(
    shape: Shape, value: float, dtype: DTypeLike = "float32", device: str = "cpu", requires_grad: bool = False
) -> Tensor:
    """A tensor filled with one value."""
    array = get_backend(device).np.full(_shape("full", (shape,)), value, dtype=arguments.dtype_of("full", dtype))
    return Tensor(array, requires_grad)


def zeros(*shape: Shape, dtype: DTypeLike = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """A tensor of zeros."""
    return full(_shape("zeros", shape), 0, dtype, device, requires_grad)


def ones(*shape: Shape, dtype: DTypeLike = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """A tensor of ones."""
    return full(_shape("ones", shape), 1, dtype, device, requires_grad)


def full_like(x: Operand, value: float, dtype: DTypeLike | None = None) -> Tensor:
    """A tensor filled with one value, with x's shape, device and dtype (or `dtype`). It does not require a gradient."""
    x = _tensor(x)
    return full(x.shape, value, x.dtype if dtype is None else dtype, x.backend.device)


def zeros_like(x: Operand, dtype: DTypeLike | None = None) -> Tensor:
    """A tensor of zeros with x's shape, device and dtype (or `dtype`). It does not require a gradient."""
    return full_like(x, 0, dtype)


def ones_like(x: Operand, dtype: DTypeLike | None = None) -> Tensor:
    """A tensor of ones with x's shape, device and dtype (or `dtype`). It does not require a gradient."""
    return full_like(x, 1, dtype)


def eye(n: int, m: int | None = None, dtype: DTypeLike = "float32", device: str = "cpu") -> Tensor:
    """The n x m matrix with ones on the diagonal."""
    rows, columns = _shape("eye", (n, n if m is None else m))
    return Tensor(get_backend(device).np.eye(rows, columns, dtype=arguments.dtype_of("eye", dtype)))


def arange(
    start: float, stop: float | None = None, step: float = 1, dtype: DTypeLike | None = None, device: str = "cpu"
) -> Tensor:
    """start, start + step, ... up to but not including `stop`. With one argument, the values start at 0.

    The dtype is int64 if all arguments are integers, else float32.
    """
    if step == 0:
        raise ValueError("arange: step is 0; expected a nonzero number")
    first, last = (0, start) if stop is None else (start, stop)
    _check_numbers("arange", first, last, step)
    whole = builtins.all(isinstance(x, int | numpy.integer) for x in (first, last, step))
    values = numpy.arange(first, last, step).astype(
        arguments.dtype_of("arange", dtype or ("int64" if whole else "float32"))
    )
    return Tensor(get_backend(device).asarray(values))


def linspace(start: float, stop: float, num: int = 50, dtype: DTypeLike = "float32", device: str = "cpu") -> Tensor:
    """`num` evenly spaced values from `start` to `stop`, both included."""
    _check_numbers("linspace", start, stop)
    (count,) = _shape("linspace", (num,))
    return Tensor(
        get_backend(device).asarray(numpy.linspace(start, stop, count).astype(arguments.dtype_of("linspace", dtype)))
    )


def _check_numbers(op: str, *values: Any) -> None:
    for value in values:
        if not (isinstance(value, int | float | numpy.number) and math.isfinite(value)):
            raise TypeError(f"{op}: {value!r} is not a finite number")


def rand(
    *shape: Shape, key: random.Key, dtype: DTypeLike = "float32", device: str = "cpu", requires_grad: bool = False
) -> Tensor:
    """Uniform values in [0, 1). They depend only on the key, and are the same on every device."""
    lengths, dtype = _shape("rand", shape), arguments.dtype_of("rand", dtype)
    values = random.uniform(key, math.prod(lengths)).reshape(lengths)
    if dtype.itemsize < 8:  # rounding must not give 1
        values = numpy.floor(values * 2**24) * 2.0**-24
    return Tensor(get_backend(device).asarray(values.astype(dtype)), requires_grad)


def randn(
    *shape: Shape, key: random.Key, dtype: DTypeLike = "float32", device: str = "cpu", requires_grad: bool = False
) -> Tensor:
    """Normal(0, 1) values. They depend only on the key, and are the same on every device."""
    values = random.normal(key, _shape("randn", shape)).astype(arguments.dtype_of("randn", dtype))
    return Tensor(get_backend(device).asarray(values), requires_grad)


# Methods as functions -------------------------------------------------------------------------------------------------


def _function(method: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Operand, P], R]:
    """Convert a method to a function whose first argument can also be an array, a number or nested lists."""

    @functools.wraps(method)
    def call(x: Operand, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(_tensor(x), *args, **kwargs)

    return call


def _function_of_two(method: Callable[[Tensor, Any], Tensor]) -> Callable[[Operand, Operand], Tensor]:
    """Convert a method with two operands to a function. Either operand can also be an array or a number."""

    @functools.wraps(method)
    def call(a: Operand, b: Operand) -> Tensor:
        if not isinstance(a, Tensor):
            a = b._operands(method.__name__, a)[1] if isinstance(b, Tensor) else Tensor(a)
        return method(a, b)

    return call


def where(condition: Any, a: Operand, b: Operand) -> Tensor:
    """a where `condition` is true, and b elsewhere, with broadcasting."""
    if not isinstance(a, Tensor):
        a = b._operands("where", a)[1] if isinstance(b, Tensor) else Tensor(a)
    return a.where(condition, b)


abs = _function(Tensor.abs)
sign = _function(Tensor.sign)
floor = _function(Tensor.floor)
ceil = _function(Tensor.ceil)
round = _function(Tensor.round)
trunc = _function(Tensor.trunc)
exp = _function(Tensor.exp)
log = _function(Tensor.log)
tanh = _function(Tensor.tanh)
sqrt = _function(Tensor.sqrt)
rsqrt = _function(Tensor.rsqrt)
square = _function(Tensor.square)
reciprocal = _function(Tensor.reciprocal)
exp2 = _function(Tensor.exp2)
expm1 = _function(Tensor.expm1)
log1p = _function(Tensor.log1p)
log2 = _function(Tensor.log2)
log10 = _function(Tensor.log10)
erf = _function(Tensor.erf)
sin = _function(Tensor.sin)
cos = _function(Tensor.cos)
tan = _function(Tensor.tan)
sinh = _function(Tensor.sinh)
cosh = _function(Tensor.cosh)
arcsin = _function(Tensor.arcsin)
arccos = _function(Tensor.arccos)
arctan = _function(Tensor.arctan)
arcsinh = _function(Tensor.arcsinh)
arccosh = _function(Tensor.arccosh)
arctanh = _function(Tensor.arctanh)
isnan = _function(Tensor.isnan)
isinf = _function(Tensor.isinf)
isfinite = _function(Tensor.isfinite)
nan_to_num = _function(Tensor.nan_to_num)
relu = _function(Tensor.relu)
relu6 = _function(Tensor.relu6)
leaky_relu = _function(Tensor.leaky_relu)
elu = _function(Tensor.elu)
celu = _function(Tensor.celu)
selu = _function(Tensor.selu)
sigmoid = _function(Tensor.sigmoid)
logsigmoid = _function(Tensor.logsigmoid)
silu = _function(Tensor.silu)
quick_gelu = _function(Tensor.quick_gelu)
softplus = _function(Tensor.softplus)
mish = _function(Tensor.mish)
softsign = _function(Tensor.softsign)
hardtanh = _function(Tensor.hardtanh)
hardsigmoid = _function(Tensor.hardsigmoid)
hardswish = _function(Tensor.hardswish)
degrees = _function(Tensor.degrees)
radians = _function(Tensor.radians)
diff = _function(Tensor.diff)
array_split = _function(Tensor.array_split)
masked_fill = _function(Tensor.masked_fill)
clip = _function(Tensor.clip)
lerp = _function(Tensor.lerp)
sum = _function(Tensor.sum)
mean = _function(Tensor.mean)
max = _function(Tensor.max)
min = _function(Tensor.min)
prod = _function(Tensor.prod)
var = _function(Tensor.var)
std = _function(Tensor.std)
norm = _function(Tensor.norm)
all = _function(Tensor.all)
any = _function(Tensor.any)
argmax = _function(Tensor.argmax)
argmin = _function(Tensor.argmin)
logsumexp = _function(Tensor.logsumexp)
softmax = _function(Tensor.softmax)
log_softmax = _function(Tensor.log_softmax)
cumsum = _function(Tensor.cumsum)
cumprod = _function(Tensor.cumprod)
sort = _function(Tensor.sort)
argsort = _function(Tensor.argsort)
topk = _function(Tensor.topk)
reshape = _function(Tensor.reshape)
transpose = _function(Tensor.transpose)
squeeze = _function(Tensor.squeeze)
unsqueeze = _function(Tensor.unsqueeze)
expand_dims = _function(Tensor.expand_dims)
flatten = _function(Tensor.flatten)
ravel = _function(Tensor.ravel)
unflatten = _function(Tensor.unflatten)
permute = _function(Tensor.permute)
swapaxes = _function(Tensor.swapaxes)
moveaxis = _function(Tensor.moveaxis)
flip = _function(Tensor.flip)
roll = _function(Tensor.roll)
broadcast_to = _function(Tensor.broadcast_to)
expand = _function(Tensor.expand)
repeat = _function(Tensor.repeat)
tile = _function(Tensor.tile)
split = _function(Tensor.split)
chunk = _function(Tensor.chunk)
pad = _function(Tensor.pad)
gather = _function(Tensor.gather)
take = _function(Tensor.take)
diagonal = _function(Tensor.diagonal)
diag = _function(Tensor.diag)
trace = _function(Tensor.trace)
tril = _function(Tensor.tril)
triu = _function(Tensor.triu)
tensordot = _function(Tensor.tensordot)
maximum = _function_of_two(Tensor.maximum)
minimum = _function_of_two(Tensor.minimum)
power = _function_of_two(Tensor.power)
remainder = _function_of_two(Tensor.remainder)
logaddexp = _function_of_two(Tensor.logaddexp)
arctan2 = _function_of_two(Tensor.arctan2)
hypot = _function_of_two(Tensor.hypot)
dot = _function_of_two(Tensor.dot)
inner = _function_of_two(Tensor.inner)
outer = _function_of_two(Tensor.outer)
add = _function_of_two(Tensor.add)
subtract = _function_of_two(Tensor.sub)
multiply = _function_of_two(Tensor.mul)
divide = _function_of_two(Tensor.div)
negative = _function(Tensor.neg)
absolute = abs
clamp = clip
amax = max
amin = min
mod = remainder
pow = power
swish = silu
