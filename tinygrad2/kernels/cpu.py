"""Fused kernels for NumPy arrays, compiled by Numba: the functions of reference.py by name and signature, only faster.

What is gained is passes over memory: GELU in NumPy goes over its array a dozen times, here once. The formulas are those
of reference.py; a comment stands where the arithmetic differs. Each function cuts its rows into parts, one a thread
(see threads.py). Sums over rows are taken in chunks of fixed size, added in order, so that they do not depend on the
number of threads. A matrix product is BLAS's, cut into parts that BLAS computes on one thread each.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic, overload

from tinygrad2 import random, threads
from tinygrad2.reference import QUERY_ROWS, query_blocks, split_heads


def _compiled(function: Any) -> Any:
    """Compile at the first call for each type of arguments, and keep the result on disk where that is possible."""
    # The compiler may reorder sums (they vectorise), but not assume that there is no NaN or infinity.
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"reassoc", "contract", "arcp", "nsz"},
        "error_model": "numpy",
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder can a file be written
        return njit(**options)(function)


class _Notice(event.Listener):
    """Says once a process that compiling has begun, since it takes seconds; what is on disk already does not count."""

    said = False

    def on_start(self, compiling: event.Event) -> None:
        if not self.said and compiling.data["dispatcher"].py_func.__module__ == __name__:
            self.said = True
            print("compiling kernels for this processor (once, some 10 s) ...", file=sys.stderr, flush=True)

    def on_end(self, compiling: event.Event) -> None:
        pass


event.register("numba:compile", _Notice())

CHUNK = 64  # rows that are summed into one partial sum of a parameter's gradient
FLAT = 1 << 15  # elements of a flat buffer that are taken at a time
BLOCK_BYTES = 1 << 20  # of attention scores at a time and thread: they stay in the second-level cache
GRAIN = 1 << 18  # elements that are worth waking a thread for


# ---------------------------------------------------------------------------------------------------------------------
# exp, in a form that the compiler vectorises
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def _float_from_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _exp(x: Any) -> Any:
    raise AssertionError("only compiled functions call this")


@overload(_exp, inline="always")
def _exp_overload(x):
    """float32: e^x = 2^n e^r with n the nearest integer to x / ln 2, and e^r, |r| <= ln 2 / 2, by a polynomial (Cephes'
    expf, which is right to 1e-7); float64: the library's."""
    if x != types.float32:
        return lambda x: math.exp(x)
    f = np.float32

    def exp32(x):
        c = min(max(x, f(-87.3)), f(88.7))  # beyond, the result is 0 or infinite for what it is used for here
        n = np.floor(c * f(1.44269504) + f(0.5))
        r = c - n * f(0.693359375) + n * f(2.12194440e-4)  # ln 2 in two parts, for n ln 2 without rounding
        p = f(1.9875691500e-4) * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        y = (p * r * r + r + f(1)) * _float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
        return y if x == x else x  # NaN stays NaN

    return exp32


def _rows(x: np.ndarray) -> np.ndarray:
    """x as a contiguous matrix of rows."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def _row_parts(n: int, width: int) -> list[tuple[int, int]]:
    """The rows 0 ... n-1 in parts for the threads, whole chunks each."""
    chunks = -(-n // CHUNK)
    return [(a * CHUNK, min(b * CHUNK, n)) for a, b in threads.parts(chunks, max(1, GRAIN // (CHUNK * width)))]


def _partial(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros for the partial sums over the rows of a matrix, one row a chunk."""
    return np.zeros((-(-shape[0] // CHUNK), shape[1]), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Linear
# ---------------------------------------------------------------------------------------------------------------------

ATTENTION_FLOPS = 1 << 24  # of q k^T that are worth waking a thread for, the softmax counted in
GEMM_FLOPS = 1 << 27  # of products that are worth waking a thread for: about a millisecond


def _matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, cut along the longer side of out."""
    m, n = out.shape
    grain = max(16, GEMM_FLOPS // (2 * a.shape[1] * min(m, n) + 1))

    def rows(start: int, stop: int) -> None:
        _product(a[start:stop], b, out[start:stop], add)

    def columns(start: int, stop: int) -> None:
        _product(a, b[:, start:stop], out[:, start:stop], add)

    threads.each(*((rows, threads.parts(m, grain)) if m >= n else (columns, threads.parts(n, grain))))


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool) -> None:
    if add:
        out += np.matmul(a, b)
    else:
        np.matmul(a, b, out=out)


@_compiled
def _add_bias(y, bias):
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] += bias[j]


@_compiled
def _sum_rows(x, partial, first):
    for i in range(x.shape[0]):
        chunk = (first + i) // CHUNK
        for j in range(x.shape[1]):
            partial[chunk, j] += x[i, j]


def _add_row_sum(x: np.ndarray, total: np.ndarray) -> None:
    """total += the sum of the rows of x."""
    partial = _partial(x.shape, x.dtype)
    threads.each(lambda a, b: _sum_rows(x[a:b], partial, a), _row_parts(*x.shape))
    total += partial.sum(axis=0)


def linear_forward(x, weight, bias):
    x2 = x.reshape(-1, x.shape[-1])
    y = np.empty((len(x2), weight.shape[1]), dtype=x.dtype)
    _matmul(x2, weight, y)
    if bias is not None:
        threads.each(lambda a, b: _add_bias(y[a:b], bias), _row_parts(*y.shape))
    return y.reshape(*x.shape[:-1], weight.shape[1])


def linear_backward(dy, x, weight, dweight, dbias):
    dy2 = dy.reshape(-1, dy.shape[-1])
    if dweight is not None:
        _matmul(x.reshape(-1, x.shape[-1]).T, dy2, dweight, add=True)
    if dbias is not None:
        _add_row_sum(_rows(dy), dbias)
    dx = np.empty((len(dy2), weight.shape[0]), dtype=dy.dtype)
    _matmul(dy2, weight.T, dx)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _sum_runs(dy, order, first, ids, dwte, start, stop):
    for run in range(start, stop):
        end = first[run + 1] if run + 1 < len(first) else len(order)
        for i in range(first[run], end):
            for j in range(dy.shape[1]):
                dwte[ids[run], j] += dy[order[i], j]


def embedding_backward(dy, runs, first_position, dwte, dwpe):
    rows = _rows(dy)
    if dwte is not None:
        threads.each(
            lambda a, b: _sum_runs(rows, runs.order, runs.first, runs.ids, dwte, a, b),
            threads.parts(len(runs.first), max(1, GRAIN // rows.shape[1])),
        )
    if dwpe is not None:
        T = dy.shape[-2]
        dwpe[first_position : first_position + T] += np.sum(dy.reshape(-1, T, dy.shape[-1]), axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------

_philox = njit(inline="always")(random.philox4x32)
_WORD, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@_compiled
def _dropout(x, y, first, seed, site, step, threshold, scale):
    """y = x m scale for the elements first ... of the global batch; a group of four shares one counter."""
    n = len(x)
    group = first >> np.uint64(2)
    i = -np.int64(first & np.uint64(3))
    while i < n:
        w = _philox(group & _WORD, group >> _SHIFT, site, step, seed & _WORD, seed >> _SHIFT)
        for j in range(4):
            if 0 <= i + j < n:
                y[i + j] = x[i + j] * (scale if w[j] >= threshold else x.dtype.type(0))
        group += np.uint64(1)
        i += 4


def dropout_forward(x, rate, key):
    flat = np.ascontiguousarray(x).reshape(-1)
    y = np.empty_like(flat)
    base = key.first_sample * (x.size // x.shape[0])
    numbers = [np.uint64(value) for value in (key.seed, key.site, key.step, round(rate * 2**32))]
    scale = x.dtype.type(1 / (1 - rate))
    threads.each(
        lambda a, b: _dropout(flat[a:b], y[a:b], np.uint64(base + a), *numbers, scale), threads.parts(x.size, GRAIN)
    )
    return y.reshape(x.shape)


def dropout_backward(dy, rate, key):
    return dropout_forward(dy, rate, key)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _layernorm(x, weight, bias, eps, y, mean, rstd):
    C = x.shape[1]
    for i in range(x.shape[0]):
        total = x.dtype.type(0)
        for j in range(C):
            total += x[i, j]
        m = total / C
        total = x.dtype.type(0)
        for j in range(C):
            total += (x[i, j] - m) * (x[i, j] - m)
        r = x.dtype.type(1) / np.sqrt(total / C + eps)
        for j in range(C):
            y[i, j] = (x[i, j] - m) * r * weight[j] + bias[j]
        mean[i] = m
        rstd[i] = r


@_compiled
def _add(x, delta, s):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            s[i, j] = x[i, j] + delta[i, j]


@_compiled
def _layernorm_backward(dy, x, weight, mean, rstd, ds, has_ds, dx, dweight, dbias, first):
    C = x.shape[1]
    for i in range(x.shape[0]):
        m, r, chunk = mean[i], rstd[i], (first + i) // CHUNK
        a = x.dtype.type(0)
        b = x.dtype.type(0)
        for j in range(C):
            xhat = (x[i, j] - m) * r
            g = dy[i, j] * weight[j]
            a += g
            b += g * xhat
            dweight[chunk, j] += dy[i, j] * xhat
            dbias[chunk, j] += dy[i, j]
        a /= C
        b /= C
        for j in range(C):
            value = r * (dy[i, j] * weight[j] - a - (x[i, j] - m) * r * b)
            dx[i, j] = ds[i, j] + value if has_ds else value


def layernorm_forward(x, weight, bias, eps):
    rows = _rows(x)
    y, mean, rstd = np.empty_like(rows), np.empty(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    eps = x.dtype.type(eps)
    threads.each(
        lambda a, b: _layernorm(rows[a:b], weight, bias, eps, y[a:b], mean[a:b], rstd[a:b]), _row_parts(*rows.shape)
    )
    kept = (*x.shape[:-1], 1)
    return y.reshape(x.shape), mean.reshape(kept), rstd.reshape(kept)


def layernorm_backward(dy, x, weight, mean, rstd, dweight, dbias):
    return _any_layernorm_backward(None, dy, x, weight, mean, rstd, dweight, dbias)


def add_layernorm_forward(x, delta, weight, bias, eps):
    rows, more = _rows(x), _rows(delta)
    s, y = np.empty_like(rows), np.empty_like(rows)
    mean, rstd = np.empty(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    eps = x.dtype.type(eps)

    def part(a: int, b: int) -> None:
        _add(rows[a:b], more[a:b], s[a:b])
        _layernorm(s[a:b], weight, bias, eps, y[a:b], mean[a:b], rstd[a:b])

    threads.each(part, _row_parts(*rows.shape))
    kept = (*x.shape[:-1], 1)
    return s.reshape(x.shape), y.reshape(x.shape), mean.reshape(kept), rstd.reshape(kept)


def add_layernorm_backward(ds, dy, s, weight, mean, rstd, dweight, dbias):
    return _any_layernorm_backward(ds, dy, s, weight, mean, rstd, dweight, dbias)


def _any_layernorm_backward(ds, dy, x, weight, mean, rstd, dweight, dbias):
    dy2, x2 = _rows(dy), _rows(x)
    ds2 = dy2 if ds is None else _rows(ds)
    m, r, dx = mean.reshape(-1), rstd.reshape(-1), np.empty_like(x2)
    partial_w, partial_b = _partial(x2.shape, x.dtype), _partial(x2.shape, x.dtype)

    def part(a: int, b: int) -> None:
        _layernorm_backward(
            dy2[a:b], x2[a:b], weight, m[a:b], r[a:b], ds2[a:b], ds is not None, dx[a:b], partial_w, partial_b, a
        )

    threads.each(part, _row_parts(*x2.shape))
    if dweight is not None:
        dweight += partial_w.sum(axis=0)
    if dbias is not None:
        dbias += partial_b.sum(axis=0)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Causal softmax attention
# ---------------------------------------------------------------------------------------------------------------------


def _each_group(task: Any, B: int, H: int, T: int, head_size: int, itemsize: int) -> None:
    """task(batch slice, head slice) for groups whose blocks of scores stay in the cache, spread over the threads."""
    fit = max(1, BLOCK_BYTES // (min(T, QUERY_ROWS) * T * itemsize))  # heads
    samples = max(1, min(fit // H, -(-B // threads.count())))
    heads = min(fit, H) if threads.count() <= B else max(1, min(fit, H * B // threads.count()))
    groups = [
        (slice(b, min(b + samples, B)), slice(h, min(h + heads, H)))
        for b in range(0, B, samples)
        for h in range(0, H, heads)
    ]

    def part(start: int, stop: int) -> None:
        for group in groups[start:stop]:
            task(*group)

    flops = 2 * B * H * T * T * head_size
    with threads.blas_on_one_thread():  # in one part too: the products are too small for BLAS's threads
        threads.each(part, threads.parts(len(groups), max(1, len(groups) * ATTENTION_FLOPS // max(1, flops))))


@_compiled
def _softmax_rows(s, lse, first, scale):
    """Rows of scores (..., R, cols) in place to weights, 0 after the diagonal; lse gets the log of each row's sum."""
    for b in range(s.shape[0]):
        for h in range(s.shape[1]):
            for i in range(s.shape[2]):
                row, seen = s[b, h, i], first + i + 1
                largest = row[0]
                for j in range(seen):
                    largest = max(largest, row[j]) if row[j] == row[j] else row[j]
                total = s.dtype.type(0)
                for j in range(seen):
                    row[j] = _exp((row[j] - largest) * scale)
                    total += row[j]
                factor = s.dtype.type(1) / total
                for j in range(seen):
                    row[j] *= factor
                for j in range(seen, s.shape[3]):
                    row[j] = 0
                lse[b, h, i] = largest * scale + np.log(total)


@_compiled
def _weights_again(s, lse, first, scale):
    """Rows of scores in place to weights exp(scale s - lse), 0 after the diagonal."""
    for b in range(s.shape[0]):
        for h in range(s.shape[1]):
            for i in range(s.shape[2]):
                row, seen, shift = s[b, h, i], first + i + 1, lse[b, h, i]
                for j in range(seen):
                    row[j] = _exp(row[j] * scale - shift)
                for j in range(seen, s.shape[3]):
                    row[j] = 0


@_compiled
def _score_gradient(dp, p, delta, scale):
    """dp in place to dS = P (dP - delta) scale."""
    for b in range(p.shape[0]):
        for h in range(p.shape[1]):
            for i in range(p.shape[2]):
                d = delta[b, h, i]
                for j in range(p.shape[3]):
                    dp[b, h, i, j] = p[b, h, i, j] * (dp[b, h, i, j] - d) * scale


def _drop_block(p, batch, heads, a, T, H, rate, key):
    """p times dropout's factors, as a new array; the element (sample, head, row, col) counts as in reference.py."""
    y = np.empty_like(p)
    numbers = [np.uint64(value) for value in (key.seed, key.site, key.step, round(rate * 2**32))]
    scale = p.dtype.type(1 / (1 - rate))
    for b in range(p.shape[0]):
        for h in range(p.shape[1]):
            row = ((key.first_sample + batch.start + b) * H + heads.start + h) * T + a
            for i in range(p.shape[2]):
                _dropout(p[b, h, i], y[b, h, i], np.uint64((row + i) * T), *numbers, scale)
    return y


def attention_forward(qkv, n_head, rate, key):
    B, T, width = qkv.shape
    q, k, v = split_heads(qkv, 3, n_head)
    out = np.empty((B, T, width // 3), dtype=qkv.dtype)
    (o,) = split_heads(out, 1, n_head)
    lse = np.empty((B, n_head, T), dtype=qkv.dtype)
    scale = qkv.dtype.type(1 / math.sqrt(q.shape[-1]))

    def group(batch: slice, heads: slice) -> None:
        for rows, cols in query_blocks(T):
            a, b = rows.start, cols.stop
            p = np.matmul(q[batch, heads, a:b], k[batch, heads, :b].swapaxes(-1, -2))
            _softmax_rows(p, lse[batch, heads, a:b], a, scale)
            if key is not None:
                p = _drop_block(p, batch, heads, a, T, n_head, rate, key)
            o[batch, heads, a:b] = np.matmul(p, v[batch, heads, :b])

    _each_group(group, B, n_head, T, q.shape[-1], qkv.itemsize)
    return out, lse


def attention_backward(dout, qkv, out, lse, n_head, rate, key):
    B, T, _ = qkv.shape
    q, k, v = split_heads(qkv, 3, n_head)
    (do,) = split_heads(dout, 1, n_head)
    (o,) = split_heads(out, 1, n_head)
    dqkv = np.empty(qkv.shape, dtype=qkv.dtype)
    dq, dk, dv = split_heads(dqkv, 3, n_head)
    scale = qkv.dtype.type(1 / math.sqrt(q.shape[-1]))

    def group(batch: slice, heads: slice) -> None:
        delta = np.sum(do[batch, heads] * o[batch, heads], axis=-1)
        for rows, cols in reversed(query_blocks(T)):  # the last touches every key: it writes, the others add
            a, b = rows.start, cols.stop
            p = np.matmul(q[batch, heads, a:b], k[batch, heads, :b].swapaxes(-1, -2))
            _weights_again(p, lse[batch, heads, a:b], a, scale)
            dp = np.matmul(do[batch, heads, a:b], v[batch, heads, :b].swapaxes(-1, -2))
            dropped = p
            if key is not None:
                dropped = _drop_block(p, batch, heads, a, T, n_head, rate, key)
                dp = _drop_block(dp, batch, heads, a, T, n_head, rate, key)
            dv_block = np.matmul(dropped.swapaxes(-1, -2), do[batch, heads, a:b])
            _score_gradient(dp, p, delta[:, :, a:b], scale)
            dk_block = np.matmul(dp.swapaxes(-1, -2), q[batch, heads, a:b])
            dq[batch, heads, a:b] = np.matmul(dp, k[batch, heads, :b])
            if b == T:
                dv[batch, heads], dk[batch, heads] = dv_block, dk_block
            else:
                dv[batch, heads, :b] += dv_block
                dk[batch, heads, :b] += dk_block

    _each_group(group, B, n_head, T, q.shape[-1], qkv.itemsize)
    return dqkv


# ---------------------------------------------------------------------------------------------------------------------
# GELU
# ---------------------------------------------------------------------------------------------------------------------

# (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)), so the tanh form is u s with s the logistic function of 2 z: one exponential,
# and no digits lost where tanh z is near -1.
_TWICE_SCALE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


@_compiled
def _gelu(x, bias, y):
    one, c, k = x.dtype.type(1), x.dtype.type(_TWICE_SCALE), x.dtype.type(_CUBIC)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            u = x[i, j] + bias[j]
            y[i, j] = u / (one + _exp(-c * u * (one + k * u * u)))


@_compiled
def _gelu_backward(dy, x, bias, dx, partial, first):
    one, c, k = x.dtype.type(1), x.dtype.type(_TWICE_SCALE), x.dtype.type(_CUBIC)
    three = x.dtype.type(3)
    for i in range(x.shape[0]):
        chunk = (first + i) // CHUNK
        for j in range(x.shape[1]):
            u = x[i, j] + bias[j]
            s = one / (one + _exp(-c * u * (one + k * u * u)))
            value = dy[i, j] * (s + u * s * (one - s) * c * (one + three * k * u * u))
            dx[i, j] = value
            partial[chunk, j] += value


def gelu_forward(x, bias):
    rows = _rows(x)
    y = np.empty_like(rows)
    b = np.zeros(x.shape[-1], dtype=x.dtype) if bias is None else bias
    threads.each(lambda start, stop: _gelu(rows[start:stop], b, y[start:stop]), _row_parts(*rows.shape))
    return y.reshape(x.shape)


def gelu_backward(dy, x, bias, dbias):
    rows, dy2 = _rows(x), _rows(dy)
    dx, partial = np.empty_like(rows), _partial(rows.shape, x.dtype)
    b = np.zeros(x.shape[-1], dtype=x.dtype) if bias is None else bias

    def part(start: int, stop: int) -> None:
        _gelu_backward(dy2[start:stop], rows[start:stop], b, dx[start:stop], partial, start)

    threads.each(part, _row_parts(*rows.shape))
    if dbias is not None:
        dbias += partial.sum(axis=0)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The language-model head
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _cross_entropy(logits, targets, loss, count):
    """Each row of logits in place to its gradient (softmax - onehot) / count; loss gets each row's loss."""
    V = logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        largest = row[0]
        for j in range(V):
            largest = max(largest, row[j]) if row[j] == row[j] else row[j]
        picked = row[targets[i]] - largest
        total = logits.dtype.type(0)
        for j in range(V):
            row[j] = _exp(row[j] - largest)
            total += row[j]
        factor = logits.dtype.type(1) / (total * count)
        for j in range(V):
            row[j] *= factor
        row[targets[i]] -= logits.dtype.type(1) / count
        loss[i] = np.log(total) - picked


def lm_head_forward(x, weight, targets):
    rows, target = x.reshape(-1, x.shape[-1]), np.ascontiguousarray(targets).reshape(-1)
    logits = np.empty((len(rows), len(weight)), dtype=x.dtype)
    _matmul(rows, weight.T, logits)
    loss, count = np.empty(len(rows), dtype=x.dtype), x.dtype.type(len(rows))
    threads.each(
        lambda a, b: _cross_entropy(logits[a:b], target[a:b], loss[a:b], count),
        threads.parts(len(rows), max(1, GRAIN // len(weight))),
    )
    return np.mean(loss), logits


def lm_head_backward(dloss, dlogits, x, weight, dweight):
    rows = x.reshape(-1, x.shape[-1])
    if dweight is not None:
        _matmul(dlogits.T, rows * dloss, dweight, add=True)
    dx = np.empty(rows.shape, dtype=x.dtype)
    _matmul(dlogits, weight, dx)
    dx *= dloss
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _square_chunks(x, sums, start, stop):
    for chunk in range(start, stop):
        total = x.dtype.type(0)
        for i in range(chunk * FLAT, min((chunk + 1) * FLAT, len(x))):
            total += x[i] * x[i]
        sums[chunk] = total  # in float64 from here on


def squared_norm(x):
    sums = np.zeros(-(-len(x) // FLAT))
    threads.each(lambda a, b: _square_chunks(x, sums, a, b), threads.parts(len(sums), 1))
    return x.dtype.type(sums.sum())


@_compiled
def _adamw(value, grad, m, v, scale, lr, keep1, keep2, eps, shrink, root2):
    one = value.dtype.type(1)
    for i in range(len(value)):
        g = grad[i] * scale
        first = m[i] * keep1 + (one - keep1) * g
        second = v[i] * keep2 + (one - keep2) * g * g
        m[i] = first
        v[i] = second
        value[i] = value[i] * shrink - lr * first / (np.sqrt(second) * root2 + eps)


def adamw_step(value, grad, m, v, go, grad_scale, lr, beta1, beta2, eps, weight_decay, step):
    if not go:
        return
    # The bias corrections go into the step size and the root, out of the loop.
    numbers = (grad_scale, lr / (1 - beta1**step), beta1, beta2, eps, 1 - lr * weight_decay, (1 - beta2**step) ** -0.5)
    scalars = [value.dtype.type(number) for number in numbers]
    threads.each(lambda a, b: _adamw(value[a:b], grad[a:b], m[a:b], v[a:b], *scalars), threads.parts(len(value), FLAT))
