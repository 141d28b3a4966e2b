"""The math: the forward and the backward pass of every operation, on plain arrays.

Read this file to learn how training works. Operations are in the order in which GPT-2 needs them. Each forward pass is
followed by its backward pass, with its formula and the derivation of its gradient. Faster kernels are tested against
these functions, which are also the fallback where no faster kernel exists.

Conventions
    L               the loss, a scalar. dx means dL/dx and has the shape of x; dy = dL/dy is given.
    B T C V H D     batch, time, channels, vocabulary, heads, head size (C = H * D); N = B * T rows.
    dweight, dbias  are *added to* (a parameter may be used more than once); None means not needed.
    dx              is *returned*, as a new array. Inputs are never modified, unless a docstring says so.
    dtype           results have the dtype of the inputs (float32 in training, float64 in tests); indices are integers.

How a gradient is derived
    By the chain rule, dx_j = sum_i dy_i (dy_i / dx_j), where the fraction is the derivative of y_i with respect to x_j.
    So each derivation states which results y_i depend on x_j, and how. delta_ij is 1 if i = j, and otherwise 0.

Only array functions that CuPy also provides are used, and every constructor is passed a dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tinygrad2.random import draw

if TYPE_CHECKING:
    import numpy.typing

    from tinygrad2.array import Array, Index
    from tinygrad2.random import Key

    _A = TypeVar("_A", bound=Array)

# Elementwise and shape operations ------------------------------------------------------------------------------------

MAX_RUN = 1024  # maximum number of terms that are added sequentially


def row_sum(x: Array) -> Array:
    """The sum over the first axis, computed from sums of at most MAX_RUN terms.

    np.sum(x, axis=0) adds row by row. In float32, a sum of ones stops at 2^24, since 2^24 + 1 is rounded to 2^24.
    """
    if len(x) <= MAX_RUN:
        return np.sum(x, axis=0)
    whole = len(x) - len(x) % MAX_RUN
    pieces = x[:whole].reshape(MAX_RUN, whole // MAX_RUN, *x.shape[1:])
    return row_sum(np.sum(pieces, axis=0)) + np.sum(x[whole:], axis=0)


def _sum(x: Array, axis: tuple[int, ...], keepdims: bool = False) -> Array:
    """np.sum, or row_sum where NumPy does not sum pairwise (it does only over the last axes of contiguous arrays)."""
    if math.prod(x.shape[i] for i in axis) <= MAX_RUN or (x.flags.c_contiguous and min(axis) == x.ndim - len(axis)):
        return np.sum(x, axis=axis, keepdims=keepdims)
    total = x
    for i in sorted(axis, reverse=True):
        total = row_sum(total.transpose(i, *range(i), *range(i + 1, total.ndim)))
    return total.reshape([1 if i in axis else n for i, n in enumerate(x.shape)]) if keepdims else total


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of broadcasting an array of `shape` to dy's shape: dy summed over every repeated axis.

    An element x_j was copied to several y_i, each with derivative 1, so dx_j is the sum of their dy_i.
    """
    if dy.shape == tuple(shape):
        return dy
    extra = dy.ndim - len(shape)
    repeated = tuple(i + extra for i, n in enumerate(shape) if n == 1 and dy.shape[i + extra] != 1)
    return _sum(dy, tuple(range(extra)) + repeated, keepdims=True).reshape(shape)


def add_forward(a: Array, b: Array) -> Array:
    """y = a + b."""
    return a + b


def add_backward(dy: Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Both derivatives are 1: da = dy, db = dy."""
    return unbroadcast(dy, a_shape), unbroadcast(dy, b_shape)


def subtract_forward(a: Array, b: Array) -> Array:
    """y = a - b."""
    return a - b


def subtract_backward(dy: Array, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The derivatives are 1 and -1: da = dy, db = -dy."""
    return unbroadcast(dy, a_shape), unbroadcast(-dy, b_shape)


def multiply_forward(a: Array, b: Array) -> Array:
    """y = a b."""
    return a * b


def multiply_backward(dy: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """The derivative with respect to a is b, and with respect to b it is a: da = dy b, db = dy a."""
    return unbroadcast(dy * b, a.shape), unbroadcast(dy * a, b.shape)


def divide_forward(a: Array, b: Array) -> Array:
    """y = a / b."""
    return a / b


def divide_backward(dy: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """The derivatives of a / b are 1 / b for a, and -a / b^2 for b (the power rule for b^-1). So

    da = dy / b,    db = -dy (a / b) / b. (There are two divisions, since b^2 could underflow or overflow.)
    """
    return unbroadcast(dy / b, a.shape), unbroadcast(-dy * (a / b / b), b.shape)


def power_forward(x: Array, exponent: float) -> Array:
    """y = x^exponent; the exponent is a Python number."""
    return x**exponent


def power_backward(dy: Array, x: Array, exponent: float) -> Array:
    """The power rule: dx = dy exponent x^(exponent - 1). For exponent 0, y is constant, so dx = 0, even at x = 0, where
    the formula gives 0 times infinity. For exponent 0.5, y is the square root; at x = -inf, dx is NaN, like y.
    """
    if exponent == 0.5:
        return dy * (0.5 / np.sqrt(x))
    return dy * (exponent * x ** (exponent - 1)) if exponent else np.zeros_like(dy)


def exp_forward(x: Array) -> Array:
    """y = e^x."""
    return np.exp(x)


def exp_backward(dy: Array, y: Array) -> Array:
    """e^x is its own derivative: dx = dy y."""
    return dy * y


def log_forward(x: Array) -> Array:
    """y = ln x."""
    return np.log(x)


def log_backward(dy: Array, x: Array) -> Array:
    """The derivative of ln x is 1 / x: dx = dy / x."""
    return dy / x


def tanh_forward(x: Array) -> Array:
    """y = tanh x."""
    return np.tanh(x)


def tanh_backward(dy: Array, y: Array) -> Array:
    """tanh = sinh / cosh, so its derivative is (cosh^2 - sinh^2) / cosh^2 = 1 - tanh^2: dx = dy (1 - y^2)."""
    return dy * (1 - y * y)


def sum_forward(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """y = the sum of x over `axis` (a tuple of axes)."""
    return _sum(x, axis, keepdims)


def sum_backward(dy: Array, shape: tuple[int, ...], axis: tuple[int, ...]) -> Array:
    """Each x_j is a term of one sum, with derivative 1: dx = dy repeated along `axis`. Returns a read-only view."""
    kept = tuple(1 if i in axis else n for i, n in enumerate(shape))
    return np.broadcast_to(dy.reshape(kept), shape)


def max_forward(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """y = the maximum of x over `axis` (a tuple of axes)."""
    return np.max(x, axis=axis, keepdims=keepdims)


def max_backward(dy: Array, x: Array, y: Array, axis: tuple[int, ...]) -> Array:
    """y depends only on the largest element: dx = dy there and 0 elsewhere.

    If n elements tie for the maximum, there is no derivative; each gets dy / n (as in PyTorch's amax).
    """
    kept = tuple(1 if i in axis else n for i, n in enumerate(x.shape))
    largest = x == y.reshape(kept)
    count = np.sum(largest, axis=axis, keepdims=True).astype(x.dtype)  # counted in integers
    return largest * (dy.reshape(kept) / count)


def getitem_forward(x: Array, index: Index) -> Array:
    """y = x[index], for any index that NumPy accepts."""
    return x[index]


def getitem_backward(dy: Array, index: Index, dx: Array) -> None:
    """Each y_i is a copy of one x_j, so dx_j is the sum of dy_i over its copies: dx[index] += dy.

    If the index selects an element several times, dx[index] += dy would add only one of the dy_i; np.add.at adds all.
    """
    plain = index if isinstance(index, tuple) else (index,)
    if all(isinstance(i, int | slice) or i is None or i is Ellipsis for i in plain):
        dx[index] += dy
    else:
        np.add.at(dx, index, dy)  # type: ignore[arg-type]  # (NumPy's type hints accept only NumPy arrays)


# reshape and transpose are views; their backward passes are the inverse view, in tensor.py.

# Matrix products -----------------------------------------------------------------------------------------------------


def matmul_forward(a: Array, b: Array) -> Array:
    """y = a @ b over the last two axes, with the others broadcast: (..., m, k) (..., k, n) -> (..., m, n)."""
    return np.matmul(a, b)


def matmul_backward(dy: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """y_ij = sum_k a_ik b_kj: a_ik affects row i of y (dy_ij / da_ik = b_kj), b_kj column j (dy_ij / db_kj = a_ik). So

    da_ik = sum_j dy_ij b_kj = (dy b^T)_ik,    db_kj = sum_i a_ik dy_ij = (a^T dy)_kj.
    """
    da = np.matmul(dy, b.swapaxes(-1, -2))
    db = np.matmul(a.swapaxes(-1, -2), dy)
    return unbroadcast(da, a.shape), unbroadcast(db, b.shape)


def linear_forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """y = x W + b: x (..., C_in), W (C_in, C_out) as in OpenAI's files, b (C_out,) or None -> (..., C_out).

    W may be bfloat16, for generation. It is converted to x's dtype. (A kernel may round x to bfloat16 instead.)
    """
    weight = weight.astype(x.dtype, copy=False)
    y = np.matmul(x.reshape(-1, x.shape[-1]), weight)  # one 2-D product, regardless of the shape of x
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[1])


def linear_backward(dy: Array, x: Array, weight: Array, dweight: Array | None, dbias: Array | None) -> Array:
    """As for matmul, with y_nj = sum_k x_nk W_kj + b_j. Every row n uses W and b, so their gradients are sums over n:

    dx = dy W^T,    dW_kj += sum_n x_nk dy_nj = (x^T dy)_kj,    db_j += sum_n dy_nj.
    """
    dy2 = dy.reshape(-1, dy.shape[-1])
    if dweight is not None:
        dweight += np.matmul(x.reshape(-1, x.shape[-1]).T, dy2)
    if dbias is not None:
        dbias += row_sum(dy2)
    return np.matmul(dy2, weight.T).reshape(x.shape)


# Embedding -----------------------------------------------------------------------------------------------------------


def embedding_forward(tokens: Array, wte: Array, wpe: Array | None, first_position: int) -> Array:
    """y[b, t] = wte[tokens[b, t]] + wpe[first_position + t]: tokens (..., T), wte (V, C), wpe (P, C) or None.

    The result of bfloat16 tables is float32.
    """
    y = wte[tokens]
    y = y.astype(np.float32) if y.dtype.itemsize == 2 else y
    if wpe is not None:
        y += wpe[first_position : first_position + tokens.shape[-1]]
    return y


def embedding_backward(
    dy: Array, tokens: numpy.ndarray, first_position: int, dwte: Array | None, dwpe: Array | None
) -> None:
    """Row v of wte is a term of every y[b, t] with tokens[b, t] = v, and row p of wpe of y[b, p - first_position] for
    every b. Both derivatives are 1:

    dwte[v] += sum of dy[b, t] over b, t with tokens[b, t] = v,    dwpe[first_position + t] += sum of dy[b, t] over b.

    tokens  a NumPy array, even if dy is not: equal tokens are grouped on the host, without waiting for the device.
            (np.add.at(dwte, tokens, dy) computes the same sums, but on a GPU their order varies between runs.)
    """
    if dwte is not None:
        rows, flat = dy.reshape(-1, dy.shape[-1]), tokens.reshape(-1)
        for token in set(flat.tolist()):
            (places,) = (flat == token).nonzero()
            dwte[token] += row_sum(rows[np.asarray(places)])
    if dwpe is not None:
        T = dy.shape[-2]
        dwpe[first_position : first_position + T] += row_sum(dy.reshape(-1, T, dy.shape[-1]))


# Dropout -------------------------------------------------------------------------------------------------------------


def dropout_scale(key: Key, first: int | Array, count: int, rate: float, dtype: numpy.typing.DTypeLike) -> Array:
    """The factors of elements first ... first + count - 1: 0 with probability `rate`, otherwise 1 / (1 - rate).

    first   the 64-bit index of an element in the global batch: an int, or a uint64 array of any shape S.
    Returns an array of shape S + (count,). Element e is kept if its 32 random bits are at least rate * 2^32.
    """
    first = np.asarray(first, dtype=np.uint64)[..., None]
    groups = (first >> np.uint64(2)) + np.arange((count + 6) // 4, dtype=np.uint64)  # enough for any first % 4
    bits = np.stack(draw(key, groups), axis=-1).reshape(*first.shape[:-1], -1)
    word = (first & np.uint64(3)).astype(np.int64) + np.arange(count, dtype=np.int64)
    kept = np.take_along_axis(bits, word, axis=-1) >= np.uint64(round(rate * 2**32))
    return kept.astype(dtype) * (1 / (1 - rate))


def dropout_forward(x: Array, rate: float, key: Key) -> Array:
    """y = x m / (1 - rate), where m ~ Bernoulli(1 - rate) depends on `key` and the element's index; no mask is stored.

    The first axis of x is the sample axis; key.first_sample is the position of the first sample in the global batch.
    Source: Srivastava et al., JMLR 15 (2014), in its inverted form.
    """
    return x * dropout_scale(key, key.first_sample * (x.size // x.shape[0]), x.size, rate, x.dtype).reshape(x.shape)


def dropout_backward(dy: Array, rate: float, key: Key) -> Array:
    """y = f x, where the factor f = m / (1 - rate) does not depend on x: dx = f dy.

    The key reproduces f, so the backward pass is the forward pass applied to dy.
    """
    return dropout_forward(dy, rate, key)


# LayerNorm -----------------------------------------------------------------------------------------------------------


def layernorm_forward(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """y = w (x - mean) rstd + b over the last axis, with rstd = 1 / sqrt(var + eps), where var is the biased variance.

    x (..., C), w and b (C,) -> y (..., C), mean (..., 1), rstd (..., 1).   Source: arXiv:1607.06450, eq. 4.
    """
    mean = np.mean(x, axis=-1, keepdims=True)
    centered = x - mean
    rstd = inverse_rms(centered, eps)
    return centered * rstd * weight + bias, mean, rstd


def inverse_rms(x: Array, eps: float) -> Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which is kept. Each row is first scaled by a power of two, which is
    exact, so that squares do not overflow or underflow."""
    largest = np.max(np.abs(x), axis=-1, keepdims=True)
    exponent = np.frexp(np.maximum(largest, math.sqrt(eps) or 2.0**-120))[1]
    scale = np.ldexp(np.ones(largest.shape, dtype=x.dtype), -exponent)  # about 1 / largest
    scaled = x * scale
    return scale / np.sqrt(np.mean(scaled * scaled, axis=-1, keepdims=True) + eps * scale * scale)


def layernorm_backward(
    dy: Array, x: Array, weight: Array, mean: Array, rstd: Array, dweight: Array | None, dbias: Array | None
) -> Array:
    """With xhat = (x - mean) rstd, y = w xhat + b, and g = dy w is the gradient of xhat. x_j affects every xhat_i in
    its row: directly, through mean (by 1 / C), and through rstd (by -rstd^2 xhat_j / C):

    dxhat_i / dx_j = rstd (delta_ij - 1 / C - xhat_i xhat_j / C), so
    dx_j = sum_i g_i (dxhat_i / dx_j) = rstd (g_j - mean(g) - xhat_j mean(g xhat));
    dw += sum of dy xhat over the rows,    db += sum of dy over the rows.

    xhat is not saved; it is recomputed from x and the two statistics of each row.
    """
    rows = tuple(range(dy.ndim - 1))
    xhat = (x - mean) * rstd
    if dweight is not None:
        dweight += _sum(dy * xhat, rows)
    if dbias is not None:
        dbias += _sum(dy, rows)
    g = dy * weight
    return rstd * (g - np.mean(g, axis=-1, keepdims=True) - xhat * np.mean(g * xhat, axis=-1, keepdims=True))


def add_layernorm_forward(
    x: Array, delta: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array, Array]:
    """s = x + delta;  y = LayerNorm(s): a residual connection and the following normalization, in one pass.

    Returns s, y, mean, rstd.
    """
    s = x + delta
    return s, *layernorm_forward(s, weight, bias, eps)


def add_layernorm_backward(
    ds: Array, dy: Array, s: Array, weight: Array, mean: Array, rstd: Array, dweight: Array | None, dbias: Array | None
) -> Array:
    """s is used twice: it is a result, with gradient ds, and the input of the LayerNorm, which adds its own gradient.

    x and delta affect s equally: dx = ddelta = ds + LayerNorm's dx. Returns one array for both.
    """
    return ds + layernorm_backward(dy, s, weight, mean, rstd, dweight, dbias)


# Causal softmax attention --------------------------------------------------------------------------------------------

QUERY_ROWS = 128  # rows of scores per block, so that memory is linear in T and blocks above the diagonal are skipped


def query_blocks(T: int) -> list[tuple[slice, slice]]:
    """Return (rows, cols) for each block of queries. cols are the keys up to its last row; it attends to no others."""
    return [(slice(i, min(i + QUERY_ROWS, T)), slice(0, min(i + QUERY_ROWS, T))) for i in range(0, T, QUERY_ROWS)]


def split_heads(packed: _A, parts: int, n_head: int) -> list[_A]:
    """(B, T, parts * C), with the heads concatenated in each part -> `parts` views of shape (B, H, T, D)."""
    B, T, width = packed.shape
    split = packed.reshape(B, T, parts, n_head, width // (parts * n_head)).transpose(2, 0, 3, 1, 4)
    return [split[i] for i in range(parts)]


def _scores(q: Array, k: Array, rows: slice, cols: slice) -> Array:
    """q k^T / sqrt(D) for a block of queries, with -inf where the key comes after the query."""
    T = np.arange(cols.stop, dtype=np.int64)
    scores = np.matmul(q[:, :, rows], k[:, :, cols].swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
    return np.where(T[None, cols] <= T[rows, None], scores, -np.inf)


def _attention_dropout(qkv: Array, n_head: int, rows: slice, cols: slice, rate: float, key: Key) -> Array:
    """The dropout factors of a block, whose elements have the index ((sample * H + h) * T + row) * T + col."""
    B, T, _ = qkv.shape
    head = np.arange(B * n_head, dtype=np.uint64).reshape(B, n_head, 1) + np.uint64(key.first_sample * n_head)
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)
    return dropout_scale(key, (head * np.uint64(T) + row) * np.uint64(T), cols.stop, rate, qkv.dtype)


def attention_forward(qkv: Array, n_head: int, rate: float, key: Key | None) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(D), causal) v for each head. With a key, dropout at `rate` is applied to the weights.

    qkv (B, T, 3 C): queries, keys and values, each with its heads concatenated. Without a key, there is no dropout.
    Returns out (B, T, C) and lse (B, H, T), the logarithm of the sum of exponentials of each row of scores. A tiled
    backward pass can recompute the weights from lse, so no T x T array is stored.
    Source: arXiv:1706.03762, eq. 1; arXiv:2205.14135 for the memory.
    """
    B, T, width = qkv.shape
    q, k, v = split_heads(qkv, 3, n_head)
    out = np.empty((B, T, width // 3), dtype=qkv.dtype)
    (o,) = split_heads(out, 1, n_head)
    lse = np.empty((B, n_head, T), dtype=qkv.dtype)
    for rows, cols in query_blocks(T):
        p = _scores(q, k, rows, cols)
        largest = np.max(p, axis=-1, keepdims=True)
        p = np.exp(p - largest)
        total = np.sum(p, axis=-1, keepdims=True)
        lse[:, :, rows] = (largest + np.log(total))[..., 0]
        p /= total
        if key is not None:
            p *= _attention_dropout(qkv, n_head, rows, cols, rate, key)
        o[:, :, rows] = np.matmul(p, v[:, :, cols])
    return out, lse


def attention_backward(
    dout: Array, qkv: Array, out: Array, lse: Array, n_head: int, rate: float, key: Key | None
) -> Array:
    """For one head, S = Q K^T / sqrt(D), P = softmax(S) = exp(S - lse) by rows, M are the dropout factors, O = (P M) V.
    O and S are matrix products, and P M is an elementwise product, so their gradients are those of matmul and multiply:

    dV = (P M)^T dO,    dP = (dO V^T) M,    dQ = dS K / sqrt(D),    dK = dS^T Q / sqrt(D);
    By softmax, dS_ij = P_ij (dP_ij - delta_i), delta_i = sum_j dP_ij P_ij, which needs no second pass over j:
    sum_j (dO V^T)_ij M_ij P_ij = sum_d dO_id sum_j P_ij M_ij V_jd, so delta_i = sum_d dO_id O_id.

    P is recomputed as in the forward pass. lse is for kernels that process part of a row at a time; exp(S - lse) has
    the rounding error of lse, 5e-4 for scores of 10^4 in float32. Returns dqkv.   Source: arXiv:2205.14135, app. B.
    """
    T = qkv.shape[1]
    q, k, v = split_heads(qkv, 3, n_head)
    (do,) = split_heads(dout, 1, n_head)
    (o,) = split_heads(out, 1, n_head)
    dqkv = np.zeros(qkv.shape, dtype=qkv.dtype)
    dq, dk, dv = split_heads(dqkv, 3, n_head)
    delta = np.sum(do * o, axis=-1, keepdims=True)
    for rows, cols in query_blocks(T):
        p = softmax_forward(_scores(q, k, rows, cols))
        dp = np.matmul(do[:, :, rows], v[:, :, cols].swapaxes(-1, -2))
        if key is None:
            dv[:, :, cols] += np.matmul(p.swapaxes(-1, -2), do[:, :, rows])
        else:
            factor = _attention_dropout(qkv, n_head, rows, cols, rate, key)
            dv[:, :, cols] += np.matmul((p * factor).swapaxes(-1, -2), do[:, :, rows])
            dp *= factor
        dp -= delta[:, :, rows]
        dp *= p
        dp *= 1 / math.sqrt(q.shape[-1])
        dq[:, :, rows] = np.matmul(dp, k[:, :, cols])
        dk[:, :, cols] += np.matmul(dp.swapaxes(-1, -2), q[:, :, rows])
    return dqkv


def attention_cached(qkv: Array, cache: Array, length: int, n_head: int) -> Array:
    """Causal attention of new tokens to themselves and to all earlier tokens, for generation; without a backward pass.

    qkv (B, T, 3 C): the new tokens, at positions length ... length + T - 1. cache (2, B, H, capacity, D): the keys and
    values of earlier positions; those of the new tokens are written to it. Returns out (B, T, C).
    """
    B, T, width = qkv.shape
    q, k, v = split_heads(qkv, 3, n_head)
    end = length + T
    cache[0, :, :, length:end] = k
    cache[1, :, :, length:end] = v
    out = np.empty((B, T, width // 3), dtype=qkv.dtype)
    (o,) = split_heads(out, 1, n_head)
    for rows, _ in query_blocks(T):
        seen = length + rows.stop
        scores = np.matmul(q[:, :, rows], cache[0, :, :, :seen].swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
        position = np.arange(seen, dtype=np.int64)
        visible = position <= position[length + rows.start :, None]
        p = softmax_forward(np.where(visible, scores, -np.inf))
        o[:, :, rows] = np.matmul(p, cache[1, :, :, :seen])
    return out


# GELU ----------------------------------------------------------------------------------------------------------------

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
_GELU_LIMIT = 100.0  # beyond this, GELU is u or 0, and its derivative 1 or 0; the powers of a larger u could overflow


def gelu_forward(x: Array, bias: Array | None) -> Array:
    """y = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2 with u = x + bias (bias (C,) or None).

    GPT-2's GELU, the tanh form.   Source: arXiv:1606.08415, section 2.
    """
    u = x if bias is None else x + bias
    v = np.clip(u, -_GELU_LIMIT, _GELU_LIMIT)
    return 0.5 * u * (1 + np.tanh(_GELU_SCALE * v * (1 + _GELU_CUBIC * (v * v))))


def gelu_backward(dy: Array, x: Array, bias: Array | None, dbias: Array | None) -> Array:
    """With z = a (u + c u^3), a = sqrt(2 / pi), c = 0.044715, and t = tanh z, y = u (1 + t) / 2. u affects y
    directly and through t, whose derivative is (1 - t^2) dz/du = (1 - t^2) a (1 + 3 c u^2). By the product rule,

    dy/du = (1 + t) / 2 + u (1 - t^2) a (1 + 3 c u^2) / 2,    dx = dy (dy/du).

    u = x + bias in every row, so dbias += sum of dx over the rows.
    """
    u = np.clip(x if bias is None else x + bias, -_GELU_LIMIT, _GELU_LIMIT)
    square = u * u
    t = np.tanh(_GELU_SCALE * u * (1 + _GELU_CUBIC * square))
    slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * (_GELU_SCALE * (1 + 3 * _GELU_CUBIC * square))
    dx = dy * slope
    if dbias is not None:
        dbias += row_sum(dx.reshape(-1, dx.shape[-1]))
    return dx


def gelu_exact_forward(x: Array, bias: Array | None) -> Array:
    """y = u Phi(u) = u (1 + erf(u / sqrt(2))) / 2 with u = x + bias (bias (C,) or None).   Source: arXiv:1606.08415."""
    u = x if bias is None else x + bias
    return 0.5 * u * (1 + erf(u * math.sqrt(0.5)))


def gelu_exact_backward(dy: Array, x: Array, bias: Array | None, dbias: Array | None) -> Array:
    """The derivative of Phi, the cumulative distribution function of the standard normal distribution, is its density
    phi(u) = exp(-u^2 / 2) / sqrt(2 pi). By the product rule, with y = u Phi(u),

    dy/du = Phi(u) + u phi(u),    dx = dy (dy/du),    dbias += sum of dx over the rows.
    """
    u = np.clip(x if bias is None else x + bias, -_GELU_LIMIT, _GELU_LIMIT)
    density = np.exp(-0.5 * u * u) * (1 / math.sqrt(2 * math.pi))
    dx = dy * (0.5 * (1 + erf(u * math.sqrt(0.5))) + u * density)
    if dbias is not None:
        dbias += row_sum(dx.reshape(-1, dx.shape[-1]))
    return dx


# Coefficients of the rational approximations of erf and erfc: Cody, Math. Comp. 23 (1969), tables I to III.
_ERF_SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
_ERF_MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
     3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip
_ERF_LARGE = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
     1.60837851487422766e-2, 6.58749161529837803e-4),
    (1.0, 2.56852019228982242, 1.87295284992346047, 5.27905102951428412e-1, 6.05183413124413191e-2,
     2.33520497626869185e-3),
)  # fmt: skip


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    """P(x) / Q(x), both by Horner's rule. The coefficient of the highest power comes first."""
    p, q = (np.full(x.shape, c[0], dtype=x.dtype) for c in coefficients)
    for a, b in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        p = p * x + a
        q = q * x + b
    return p / q


def erf(x: Array) -> Array:
    """2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x, to the precision of x's dtype (Cody 1969).

    There are three ranges of |x|: up to 0.46875, erf is approximated directly; up to 4 and above 4, as 1 - erfc.
    """
    a = np.minimum(np.abs(x), 30.0)  # erf(6) is 1 in float64; a larger square could overflow
    small = x * _ratio(_ERF_SMALL, np.minimum(a, 0.46875) ** 2)
    clipped = np.clip(a, 0.46875, 4.0)
    middle = _ratio(_ERF_MIDDLE, clipped)
    far = np.clip(a, 4.0, 6.0)
    inverse = 1 / (far * far)
    large = (1 / math.sqrt(math.pi) - inverse * _ratio(_ERF_LARGE, inverse)) / far
    tail = np.exp(-a * a) * np.where(a <= 4.0, middle, large)
    return np.where(a <= 0.46875, small, np.sign(x) * (1 - tail))


# Softmax, cross-entropy, and the language-model head -----------------------------------------------------------------


def softmax_forward(x: Array) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j) over the last axis. The largest x_j is subtracted first; it cancels.

    -inf gives 0. A row that contains inf or NaN, or only -inf, gives NaN, as in PyTorch.
    """
    y = np.exp(x - np.max(x, axis=-1, keepdims=True))
    y /= _sum(y, (y.ndim - 1,), keepdims=True)
    return y


def softmax_backward(dy: Array, y: Array) -> Array:
    """x_j affects the numerator of y_j, and the denominator of every y_i (through exp(x_j)):

    dy_i / dx_j = y_i (delta_ij - y_j), so
    dx_j = sum_i dy_i y_i (delta_ij - y_j) = y_j (dy_j - sum_i dy_i y_i).
    """
    return y * (dy - np.sum(dy * y, axis=-1, keepdims=True))


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, Array]:
    """loss = mean over the rows of log sum_j exp(z_j) - z[target], for logits z (..., V) and integer targets (...).

    Returns the loss (0-d, in nats) and log_total (..., 1), log sum_j exp(z_j - largest) of each row. It is relative to
    the largest logit, so that an offset common to all logits costs no precision.
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    log_total = np.log(_sum(np.exp(shifted), (shifted.ndim - 1,), keepdims=True))
    picked: Array = np.take_along_axis(shifted, targets[..., None], axis=-1)
    return np.mean(log_total - picked), log_total


def cross_entropy_backward(dloss: Array, logits: Array, targets: Array, log_total: Array) -> Array:
    """The derivative of log sum_i exp(z_i) with respect to z_j is exp(z_j) / sum_i exp(z_i) = softmax(z)_j, and that of
    -z[target] is -1 at the target. Each row has weight 1 / rows in the mean:

    dlogits = dloss (softmax(logits) - onehot(target)) / rows,    softmax(z) = exp((z - largest) - log_total).
    """
    rows = np.exp((logits - np.max(logits, axis=-1, keepdims=True)) - log_total).reshape(-1, logits.shape[-1])
    rows[np.arange(len(rows), dtype=np.int64), targets.reshape(-1)] -= 1
    rows *= dloss / targets.size
    return rows.reshape(logits.shape)


def lm_head_forward(x: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    """The cross-entropy of the logits x W^T and targets, fused: x (..., C), W (V, C), targets (...) integers.

    The (N, V) logits are replaced in place by their gradient (for dloss = 1; see cross_entropy_backward), so there is
    only one array of this size, the largest of the step. Returns the loss (0-d, the mean over the rows, in nats) and
    dlogits (N, V). W may be bfloat16, for evaluation.
    """
    logits = np.matmul(x.reshape(-1, x.shape[-1]), weight.astype(x.dtype, copy=False).T)
    row, target = np.arange(len(logits), dtype=np.int64), targets.reshape(-1)
    logits -= np.max(logits, axis=-1, keepdims=True)
    picked = logits[row, target]
    np.exp(logits, out=logits)
    total = np.sum(logits, axis=-1)
    loss = np.mean(np.log(total) - picked)
    logits *= (1 / (total * targets.size))[:, None]
    logits[row, target] -= 1 / targets.size
    return loss, logits


def lm_head_backward(dloss: Array, dlogits: Array, x: Array, weight: Array, dweight: Array | None) -> Array:
    """logits = x W^T, so by the rule for matmul, dx = (dloss dlogits) W and dW += (dloss dlogits)^T x, where dlogits is
    the gradient for dloss = 1. The scalar dloss can multiply any factor of a product. Here it multiplies arrays that
    are smaller than the (N, V) buffer:

    dx = dloss (dlogits W),    dW += dlogits^T (dloss x).
    """
    if dweight is not None:
        dweight += np.matmul(dlogits.T, x.reshape(-1, x.shape[-1]) * dloss)
    dx = np.matmul(dlogits, weight)
    dx *= dloss
    return dx.reshape(x.shape)


# Optimizer -----------------------------------------------------------------------------------------------------------


def squared_norm(x: Array) -> Array:
    """The sums of x_i^2, (x_i / 2^64)^2 and (2^64 x_i)^2 over a flat array, as an array (3,). `norm` uses one that has
    not overflowed or underflowed. Sums of several arrays can be added.   Source: Blue, ACM TOMS 4 (1978)."""
    return np.stack([np.dot(scaled, scaled) for scaled in (x, x * 2.0**-64, np.clip(x, -1, 1) * 2.0**64)])


def norm(squares: Array) -> Array:
    """The Euclidean norm (0-d) from the sums returned by squared_norm."""
    root = np.sqrt(squares)
    small = np.where(squares[0] < 2.0**-64, root[2] * 2.0**-64, root[0])
    return np.where(squares[0] == np.inf, root[1] * 2.0**64, small)


def adamw_step(
    value: Array, grad: Array, m: Array, v: Array, scale: Array, lr: Array,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: Array,
) -> None:  # fmt: skip
    """One step of AdamW on flat arrays. value, m and v are updated in place.

    g = scale grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  m^ = m / (1 - b1^step);  v^ = v / (1 - b2^step)
    value = value - lr (m^ / (sqrt(v^) + eps) + weight_decay value);  step counts from 1.
    scale, lr and step are 0-d arrays of value's dtype. scale is the clipping factor; if it is NaN, nothing changes.
    Source: arXiv:1711.05101, algorithm 2; eps as in PyTorch.
    """
    g = scale * grad
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = new_m / _bias_correction(beta1, step), new_v / _bias_correction(beta2, step)
    new_value = value - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * value)
    _assign(scale, (value, new_value), (m, new_m), (v, new_v))


def sgd_step(
    value: Array, grad: Array, buffer: Array | None, scale: Array, lr: Array,
    momentum: float, nesterov: bool, weight_decay: float,
) -> None:  # fmt: skip
    """One step of stochastic gradient descent on flat arrays. value and buffer are updated in place.

    g = scale grad + weight_decay value;  buffer = momentum buffer + g
    value = value - lr buffer, or value - lr (g + momentum buffer) if nesterov, or value - lr g if buffer is None.
    scale and lr are as in adamw_step. Source: Sutskever et al. 2013, in PyTorch's form.
    """
    g = scale * grad + weight_decay * value
    new_buffer = g if buffer is None else momentum * buffer + g
    direction = g + momentum * new_buffer if nesterov else new_buffer
    _assign(scale, (value, value - lr * direction), *([] if buffer is None else [(buffer, new_buffer)]))


def muon_momentum(grad: Array, buffer: Array, scale: Array, momentum: float) -> Array:
    """The direction that Muon orthogonalizes, for flat arrays. buffer is updated in place.

    g = scale grad;  buffer = momentum buffer + (1 - momentum) g;  direction = momentum buffer + (1 - momentum) g
    direction uses the new buffer (Nesterov). scale is as in adamw_step; the source is that of orthogonalize.
    """
    g = (1 - momentum) * scale * grad
    _assign(scale, (buffer, momentum * buffer + g))
    return momentum * buffer + g


def orthogonalize(*matrices: Array) -> None:
    """Replace each matrix X = U S V^T (its singular value decomposition) by an approximation of U V^T, in place.

    X is divided by ||X||, so that no singular value exceeds 1. Then five Newton-Schulz iterations, with A = X X^T:
    X <- a X + (b A + c A^2) X = U (a S + b S^3 + c S^5) V^T. The singular vectors are unchanged; a, b and c bring all
    but tiny singular values into [0.7, 1.2]. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    for matrix in matrices:
        x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # A is the smaller of X X^T and X^T X
        x = x / np.maximum(np.sqrt(np.sum(x * x)), 1e-7)
        for _ in range(5):
            A = np.matmul(x, x.T)
            x = a * x + np.matmul(b * A + c * np.matmul(A, A), x)
        matrix[...] = x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_step(value: Array, direction: Array, scale: Array, lr: Array, weight_decay: float) -> None:
    """value = value - lr (0.2 sqrt(max(rows, columns)) direction + weight_decay value) for a matrix, in place.

    The factor gives the update a root mean square of 0.2, as in AdamW (arXiv:2502.16982, eq. 4). scale: see adamw_step.
    """
    _assign(scale, (value, value - lr * (0.2 * math.sqrt(max(value.shape)) * direction + weight_decay * value)))


def _bias_correction(beta: float, step: Array) -> Array:
    """1 - beta^step, computed as -expm1(step log(beta)), since in float32 the subtraction would lose precision."""
    return -np.expm1(step * (math.log(beta) if beta else -math.inf))


def _assign(scale: Array, *pairs: tuple[Array, Array]) -> None:
    """Copy each new array to the old one, unless scale is NaN. This is how the optimizer skips a step whose gradients
    are not finite, without waiting for the device."""
    for old, new in pairs:
        old[...] = np.where(np.isnan(scale), old, new)
