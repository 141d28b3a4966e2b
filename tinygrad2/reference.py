"""The math: the forward and the backward pass of every operation, on plain arrays.

Read this file to learn how training works: each pair stands together, in the order in which GPT-2 needs them, with its
formula. It is the textbook, the oracle that faster kernels are tested against, and what runs where there is none.

Conventions
    dx              the gradient of the loss with respect to x; dy is the gradient that comes in.
    B T C V H D     batch, time, channels, vocabulary, heads, head size (C = H * D); N = B * T rows.
    dweight, dbias  are *added to* (a parameter may be used more than once); None means not wanted.
    dx              is *returned*, as a new array. Inputs are never changed, except where a docstring says so.
    dtype           of the results is that of the inputs (float32 to train, float64 to check); indices are integers.

Every name used from the array library is one that CuPy has too, and every constructor is given its dtype.
"""

from __future__ import annotations

import math

import numpy as np

from tinygrad2.array import Array
from tinygrad2.random import draw

# ---------------------------------------------------------------------------------------------------------------------
# Elementwise and shape operations
# ---------------------------------------------------------------------------------------------------------------------


def unbroadcast(dy, shape):
    """The gradient of broadcasting `shape` up to dy's shape: dy summed over every axis that was repeated."""
    if dy.shape == tuple(shape):
        return dy
    extra = dy.ndim - len(shape)
    repeated = tuple(i + extra for i, n in enumerate(shape) if n == 1 and dy.shape[i + extra] != 1)
    return np.sum(dy, axis=tuple(range(extra)) + repeated, keepdims=True).reshape(shape)


def add_forward(a, b):
    """y = a + b."""
    return a + b


def add_backward(dy, a_shape, b_shape):
    """da = dy, db = dy."""
    return unbroadcast(dy, a_shape), unbroadcast(dy, b_shape)


def subtract_forward(a, b):
    """y = a - b."""
    return a - b


def subtract_backward(dy, a_shape, b_shape):
    """da = dy, db = -dy."""
    return unbroadcast(dy, a_shape), unbroadcast(-dy, b_shape)


def multiply_forward(a, b):
    """y = a b."""
    return a * b


def multiply_backward(dy, a, b):
    """da = dy b, db = dy a."""
    return unbroadcast(dy * b, a.shape), unbroadcast(dy * a, b.shape)


def divide_forward(a, b):
    """y = a / b."""
    return a / b


def divide_backward(dy, a, b):
    """da = dy / b, db = -dy a / b^2."""
    da = dy / b
    return unbroadcast(da, a.shape), unbroadcast(-da * a / b, b.shape)


def power_forward(x, exponent):
    """y = x^exponent, the exponent a Python number."""
    return x**exponent


def power_backward(dy, x, exponent):
    """dx = dy exponent x^(exponent - 1), and 0 for exponent 0, at x = 0 too."""
    return dy * (exponent * x ** (exponent - 1)) if exponent else np.zeros_like(dy)


def exp_forward(x):
    """y = e^x."""
    return np.exp(x)


def exp_backward(dy, y):
    """dx = dy y."""
    return dy * y


def log_forward(x):
    """y = ln x."""
    return np.log(x)


def log_backward(dy, x):
    """dx = dy / x."""
    return dy / x


def tanh_forward(x):
    """y = tanh x."""
    return np.tanh(x)


def tanh_backward(dy, y):
    """dx = dy (1 - y^2)."""
    return dy * (1 - y * y)


def sum_forward(x, axis, keepdims):
    """y = the sum of x over `axis` (a tuple of axes)."""
    return np.sum(x, axis=axis, keepdims=keepdims)


def sum_backward(dy, shape, axis):
    """dx = dy repeated along `axis`. Returns a read-only view."""
    kept = tuple(1 if i in axis else n for i, n in enumerate(shape))
    return np.broadcast_to(dy.reshape(kept), shape)


def max_forward(x, axis, keepdims):
    """y = the maximum of x over `axis` (a tuple of axes)."""
    return np.max(x, axis=axis, keepdims=keepdims)


def max_backward(dy, x, y, axis):
    """dx = dy where x is the maximum, shared equally where several elements are (as PyTorch's amax does)."""
    kept = tuple(1 if i in axis else n for i, n in enumerate(x.shape))
    largest = x == y.reshape(kept)
    return largest * (dy.reshape(kept) / np.sum(largest, axis=axis, keepdims=True, dtype=x.dtype))


def getitem_forward(x, index):
    """y = x[index], for anything that NumPy indexing takes."""
    return x[index]


def getitem_backward(dy, index, dx):
    """dx[index] += dy, adding up where an element was taken several times."""
    plain = index if isinstance(index, tuple) else (index,)
    if all(isinstance(i, int | slice) or i is None or i is Ellipsis for i in plain):
        dx[index] += dy
    else:
        np.add.at(dx, index, dy)


# reshape and transpose are views; their backward passes are the inverse view, in tensor.py.

# ---------------------------------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------------------------------


def matmul_forward(a, b):
    """y = a @ b over the last two axes, the leading ones broadcast: (..., m, k) (..., k, n) -> (..., m, n)."""
    return np.matmul(a, b)


def matmul_backward(dy, a, b):
    """da = dy b^T, db = a^T dy."""
    da = np.matmul(dy, b.swapaxes(-1, -2))
    db = np.matmul(a.swapaxes(-1, -2), dy)
    return unbroadcast(da, a.shape), unbroadcast(db, b.shape)


def linear_forward(x, weight, bias):
    """y = x W + b: x (..., C_in), W (C_in, C_out) as OpenAI ships it, b (C_out,) or None -> (..., C_out).

    W may be held in bfloat16, to generate: it is widened as it is read.
    """
    weight = weight.astype(x.dtype, copy=False)
    y = np.matmul(x.reshape(-1, x.shape[-1]), weight)  # one product of 2-D matrices, whatever the shape of x
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[1])


def linear_backward(dy, x, weight, dweight, dbias):
    """dx = dy W^T;  dW += x^T dy;  db += the sum of dy over its rows."""
    dy2 = dy.reshape(-1, dy.shape[-1])
    if dweight is not None:
        dweight += np.matmul(x.reshape(-1, x.shape[-1]).T, dy2)
    if dbias is not None:
        dbias += np.sum(dy2, axis=0)
    return np.matmul(dy2, weight.T).reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding
# ---------------------------------------------------------------------------------------------------------------------


def embedding_forward(tokens, wte, wpe, first_position):
    """y[b, t] = wte[tokens[b, t]] + wpe[first_position + t]: tokens (..., T), wte (V, C), wpe (P, C) or None.

    Tables held in bfloat16 give float32.
    """
    y = wte[tokens]
    y = y.astype(np.float32) if y.dtype.itemsize == 2 else y
    if wpe is not None:
        y += wpe[first_position : first_position + tokens.shape[-1]]
    return y


def embedding_backward(dy, runs, first_position, dwte, dwpe):
    """dwte[v] += the sum of dy over the places that hold token v;  dwpe[p] += the sum of dy over the batch at p.

    runs  where the same tokens stand (see ops.TokenRuns). The rows of dy are sorted by token, and each token's run is
          folded onto its first row: in every round, rows at a distance of 1, 2, 4, ... are added pairwise, so that no
          row is written twice in a round. The sum is the same every time, which adding with atomics is not, and as
          exact as pairwise summation; differences of a running sum, which CuPy's add.reduceat takes, are not.
    """
    if dwte is not None:
        rows = dy.reshape(-1, dy.shape[-1])[runs.order]
        for into, other in runs.folds:
            rows[into] += rows[other]
        dwte[runs.ids] += rows[runs.first]
    if dwpe is not None:
        T = dy.shape[-2]
        dwpe[first_position : first_position + T] += np.sum(dy.reshape(-1, T, dy.shape[-1]), axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


def dropout_scale(key, first, count, rate, dtype):
    """The factor of elements first ... first + count - 1: 0 with probability `rate`, else 1 / (1 - rate).

    first   the 64-bit index of an element in the global batch: an int, or a uint64 array of any shape S.
    Returns an array of shape S + (count,). Element e is kept if its 32 random bits are at least rate * 2^32.
    """
    first = np.asarray(first, dtype=np.uint64)[..., None]
    groups = (first >> np.uint64(2)) + np.arange((count + 6) // 4, dtype=np.uint64)  # enough for any first % 4
    bits = np.stack(draw(key, groups), axis=-1).reshape(*first.shape[:-1], -1)
    word = (first & np.uint64(3)).astype(np.int64) + np.arange(count, dtype=np.int64)
    kept = np.take_along_axis(bits, word, axis=-1) >= np.uint64(round(rate * 2**32))
    return kept.astype(dtype) * (1 / (1 - rate))


def dropout_forward(x, rate, key):
    """y = x m / (1 - rate), m Bernoulli(1 - rate), a function of `key` and the element's index (no mask is stored).

    The first axis of x counts samples; key.first_sample says where they stand in the global batch.
    Source: Srivastava et al., JMLR 15 (2014), in the inverted form.
    """
    return x * dropout_scale(key, key.first_sample * (x.size // x.shape[0]), x.size, rate, x.dtype).reshape(x.shape)


def dropout_backward(dy, rate, key):
    """dx = dy m / (1 - rate), the same factor as forward."""
    return dropout_forward(dy, rate, key)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm
# ---------------------------------------------------------------------------------------------------------------------


def layernorm_forward(x, weight, bias, eps):
    """y = w (x - mean) rstd + b over the last axis, rstd = 1 / sqrt(var + eps), var the biased variance.

    x (..., C), w and b (C,) -> y (..., C), mean (..., 1), rstd (..., 1).   Source: arXiv:1607.06450, eq. 4.
    """
    mean = np.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    rstd = 1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * rstd * weight + bias, mean, rstd


def layernorm_backward(dy, x, weight, mean, rstd, dweight, dbias):
    """With xhat = (x - mean) rstd and g = dy w:  dx = rstd (g - mean(g) - xhat mean(g xhat));
    dw += the sum of dy xhat over the rows;  db += the sum of dy over the rows.

    xhat is computed again from x and the two statistics of each row instead of being saved.
    """
    rows = tuple(range(dy.ndim - 1))
    xhat = (x - mean) * rstd
    if dweight is not None:
        dweight += np.sum(dy * xhat, axis=rows)
    if dbias is not None:
        dbias += np.sum(dy, axis=rows)
    g = dy * weight
    return rstd * (g - np.mean(g, axis=-1, keepdims=True) - xhat * np.mean(g * xhat, axis=-1, keepdims=True))


def add_layernorm_forward(x, delta, weight, bias, eps):
    """s = x + delta;  y = LayerNorm(s): a residual connection and the normalisation that reads it, in one pass.

    Returns s, y, mean, rstd.
    """
    s = x + delta
    return s, *layernorm_forward(s, weight, bias, eps)


def add_layernorm_backward(ds, dy, s, weight, mean, rstd, dweight, dbias):
    """dx = ddelta = ds + the LayerNorm's dx; ds and dy are the gradients of the two results. Returns the one array."""
    return ds + layernorm_backward(dy, s, weight, mean, rstd, dweight, dbias)


# ---------------------------------------------------------------------------------------------------------------------
# Causal softmax attention
# ---------------------------------------------------------------------------------------------------------------------

QUERY_ROWS = 128  # rows of the score matrix at a time: memory grows as T, and blocks above the diagonal are skipped


def query_blocks(T):
    """(rows, cols) for each block of queries: cols are the keys up to the last row, all that those rows can see."""
    return [(slice(i, min(i + QUERY_ROWS, T)), slice(0, min(i + QUERY_ROWS, T))) for i in range(0, T, QUERY_ROWS)]


def split_heads(packed, parts, n_head):
    """(B, T, parts * C), heads side by side in each part -> `parts` views of shape (B, H, T, D)."""
    B, T, width = packed.shape
    split = packed.reshape(B, T, parts, n_head, width // (parts * n_head)).transpose(2, 0, 3, 1, 4)
    return [split[i] for i in range(parts)]


def _scores(q, k, rows, cols):
    """q k^T / sqrt(D) for a block of queries, -inf where the key comes after the query."""
    T = np.arange(cols.stop, dtype=np.int64)
    scores = np.matmul(q[:, :, rows], k[:, :, cols].swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
    return np.where(T[None, cols] <= T[rows, None], scores, -np.inf)


def _attention_dropout(qkv, n_head, rows, cols, rate, key):
    """Dropout's factors for a block; element ((sample * H + h) * T + row) * T + col of the (B, H, T, T) attention."""
    B, T, _ = qkv.shape
    head = np.arange(B * n_head, dtype=np.uint64).reshape(B, n_head, 1) + np.uint64(key.first_sample * n_head)
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)
    return dropout_scale(key, (head * np.uint64(T) + row) * np.uint64(T), cols.stop, rate, qkv.dtype)


def attention_forward(qkv, n_head, rate, key):
    """softmax(q k^T / sqrt(D), causal) v for each head; with a key, dropout at `rate` on the attention weights.

    qkv (B, T, 3 C), queries, keys and values side by side, the heads side by side in each; key None means no dropout.
    Returns out (B, T, C) and lse (B, H, T), the log of the sum of exponentials of each row of scores: all that the
    backward pass needs to rebuild the weights, so that no T x T array is kept.
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


def attention_backward(dout, qkv, out, lse, n_head, rate, key):
    """With P = exp(scores - lse), M dropout's factors, and delta_i = sum_d dout_id out_id:

        dV = (P M)^T dO;   dP = (dO V^T) M;   dS = P (dP - delta) / sqrt(D);   dQ = dS K;   dK = dS^T Q.

    delta is the row sum of P dP, since out = (P M) V. Returns dqkv.   Source: arXiv:2205.14135, appendix B.
    """
    T = qkv.shape[1]
    q, k, v = split_heads(qkv, 3, n_head)
    (do,) = split_heads(dout, 1, n_head)
    (o,) = split_heads(out, 1, n_head)
    dqkv = np.zeros(qkv.shape, dtype=qkv.dtype)
    dq, dk, dv = split_heads(dqkv, 3, n_head)
    delta = np.sum(do * o, axis=-1, keepdims=True)
    for rows, cols in query_blocks(T):
        p = np.exp(_scores(q, k, rows, cols) - lse[:, :, rows, None])
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


def attention_cached(qkv, cache, length, n_head):
    """Attention of new tokens to themselves and to all before them, for generation: there is no backward pass.

    qkv (B, T, 3 C) of the tokens at positions length ... length + T - 1; cache (2, B, H, capacity, D) holds the keys
    and values of the positions before, and those of the new tokens are written to it. Returns out (B, T, C).
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


# ---------------------------------------------------------------------------------------------------------------------
# GELU
# ---------------------------------------------------------------------------------------------------------------------

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def gelu_forward(x, bias):
    """y = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2 with u = x + bias (bias (C,) or None).

    GPT-2's GELU, the tanh form.   Source: arXiv:1606.08415, section 2.
    """
    u = x if bias is None else x + bias
    return 0.5 * u * (1 + np.tanh(_GELU_SCALE * u * (1 + _GELU_CUBIC * (u * u))))


def gelu_backward(dy, x, bias, dbias):
    """dy/du = (1 + t) / 2 + u (1 - t^2) sqrt(2 / pi) (1 + 3 * 0.044715 u^2) / 2 with t the tanh;  dbias += its rows."""
    u = x if bias is None else x + bias
    square = u * u
    t = np.tanh(_GELU_SCALE * u * (1 + _GELU_CUBIC * square))
    slope = 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * (_GELU_SCALE * (1 + 3 * _GELU_CUBIC * square))
    dx = dy * slope
    if dbias is not None:
        dbias += np.sum(dx.reshape(-1, dx.shape[-1]), axis=0)
    return dx


def gelu_exact_forward(x, bias):
    """y = u Phi(u) = u (1 + erf(u / sqrt(2))) / 2 with u = x + bias (bias (C,) or None).   Source: arXiv:1606.08415."""
    u = x if bias is None else x + bias
    return 0.5 * u * (1 + erf(u * math.sqrt(0.5)))


def gelu_exact_backward(dy, x, bias, dbias):
    """dy/du = Phi(u) + u phi(u), phi the normal density exp(-u^2 / 2) / sqrt(2 pi);  dbias += its rows."""
    u = x if bias is None else x + bias
    density = np.exp(-0.5 * u * u) * (1 / math.sqrt(2 * math.pi))
    dx = dy * (0.5 * (1 + erf(u * math.sqrt(0.5))) + u * density)
    if dbias is not None:
        dbias += np.sum(dx.reshape(-1, dx.shape[-1]), axis=0)
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


def _ratio(coefficients, x):
    """P(x) / Q(x), both by Horner's rule, the highest power first."""
    p, q = (np.full(x.shape, c[0], dtype=x.dtype) for c in coefficients)
    for a, b in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        p = p * x + a
        q = q * x + b
    return p / q


def erf(x):
    """2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x, to the precision of x's dtype (Cody 1969).

    Three ranges of |x|: up to 0.46875 erf itself; up to 4 and beyond, 1 - erfc.
    """
    a = np.abs(x)
    small = x * _ratio(_ERF_SMALL, np.minimum(a, 0.46875) ** 2)
    clipped = np.clip(a, 0.46875, 4.0)
    middle = _ratio(_ERF_MIDDLE, clipped)
    far = np.clip(a, 4.0, 6.0)  # erf(6) is 1 in float64
    inverse = 1 / (far * far)
    large = (1 / math.sqrt(math.pi) - inverse * _ratio(_ERF_LARGE, inverse)) / far
    tail = np.exp(-a * a) * np.where(a <= 4.0, middle, large)
    return np.where(a <= 0.46875, small, np.sign(x) * (1 - tail))


# ---------------------------------------------------------------------------------------------------------------------
# Softmax, cross-entropy, and the language-model head
# ---------------------------------------------------------------------------------------------------------------------


def softmax_forward(x):
    """y_i = exp(x_i) / sum_j exp(x_j) over the last axis."""
    y = np.exp(x - np.max(x, axis=-1, keepdims=True))
    y /= np.sum(y, axis=-1, keepdims=True)
    return y


def softmax_backward(dy, y):
    """dx = y (dy - sum_j dy_j y_j)."""
    return y * (dy - np.sum(dy * y, axis=-1, keepdims=True))


def cross_entropy_forward(logits, targets):
    """loss = the mean over the rows of lse(logits) - logits[target]: logits (..., V), targets (...) integers.

    Returns the loss (0-d, in nats) and lse (..., 1), the log of each row's sum of exponentials.
    """
    largest = np.max(logits, axis=-1, keepdims=True)
    lse = largest + np.log(np.sum(np.exp(logits - largest), axis=-1, keepdims=True))
    return np.mean(lse - np.take_along_axis(logits, targets[..., None], axis=-1)), lse


def cross_entropy_backward(dloss, logits, targets, lse):
    """dlogits = dloss (softmax(logits) - onehot(target)) / rows."""
    rows = np.exp(logits - lse).reshape(-1, logits.shape[-1])
    rows[np.arange(len(rows), dtype=np.int64), targets.reshape(-1)] -= 1
    rows *= dloss / targets.size
    return rows.reshape(logits.shape)


def lm_head_forward(x, weight, targets):
    """The loss of softmax(x W^T) against targets, fused: x (..., C), W (V, C), targets (...) integers.

    The logits fill one (N, V) buffer, which is turned into their gradient (for dloss = 1) in place: the largest array
    of the whole step exists once. Returns the loss (0-d, mean over the rows, in nats) and dlogits (N, V). W may be held
    in bfloat16, to evaluate.
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


def lm_head_backward(dloss, dlogits, x, weight, dweight):
    """dx = dloss dlogits W;  dW += dloss dlogits^T x. The factor goes to x, not to the (N, V) buffer."""
    if dweight is not None:
        dweight += np.matmul(dlogits.T, x.reshape(-1, x.shape[-1]) * dloss)
    dx = np.matmul(dlogits, weight)
    dx *= dloss
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def squared_norm(x: Array) -> Array:
    """The sum of x_i^2 over a flat array, 0-d, in x's dtype."""
    return np.dot(x, x)


def adamw_step(
    value: Array,
    grad: Array,
    m: Array,
    v: Array,
    scale: Array,
    lr: Array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: Array,
) -> None:
    """One step of AdamW on flat arrays; value, m and v are changed in place.

    g = scale grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  m^ = m / (1 - b1^step);  v^ = v / (1 - b2^step)
    value = value - lr (m^ / (sqrt(v^) + eps) + weight_decay value);  step counts from 1.
    scale, lr and step, which differ from step to step, are 0-d arrays of value's dtype. scale is the clipping factor;
    where it is NaN, nothing is changed (see `_assign`).
    Source: arXiv:1711.05101, algorithm 2; eps as in PyTorch.
    """
    g = scale * grad
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    m_hat = new_m / _bias_correction(beta1, step)
    v_hat = new_v / _bias_correction(beta2, step)
    new_value = value - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * value)
    _assign(scale, (value, new_value), (m, new_m), (v, new_v))


def _bias_correction(beta: float, step: Array) -> Array:
    """1 - beta^step, as -expm1(step log(beta)): in float32 the difference itself would keep few digits."""
    return -np.expm1(step * (math.log(beta) if beta else -math.inf))


def _assign(scale: Array, *pairs: tuple[Array, Array]) -> None:
    """Store each new array in the old one, or nothing where scale is NaN: the optimizer skips a step that way whose
    gradients are not finite, without waiting for the device."""
    for old, new in pairs:
        old[...] = np.where(np.isnan(scale), old, new)
