"""The operations of GPT-2, on Tensors.

Each function checks its arguments, calls the kernel of the same name (see reference.py for the math) and records its
backward pass: the name of a kernel or, if gradients of parameters are accumulated, the function defined below it.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import missing_names
from tinygrad2.array import Array
from tinygrad2.autograd import GradientBuffers, Gradients, Saved, is_recording
from tinygrad2.backend import backend_of
from tinygrad2.checks import check_rate, check_tensors, empty_result, expect_shape, host_indices, read, read_optional
from tinygrad2.precision import sum_dtype
from tinygrad2.random import Key
from tinygrad2.recipes import Recipe, attach_recipe, recipe_or_data
from tinygrad2.tensor import Tensor, record

SCALED_ROWS = 256  # rows of a gradient that are scaled at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tf32: bool = False) -> Tensor:
    """y = x W + b.

    x (..., C_in), weight (C_in, C_out), bias (C_out,) or None -> (..., C_out). Saves weight and x. If x is a result of
    gelu or layernorm and C_out is at least backend.recompute_outputs, saves a recipe to recompute x instead of x.
    tf32  compute float32 matrix products in TF32, here and in the backward pass.
    Raises ValueError if the shapes do not match, or if the device does not support TF32.
    """
    check_tensors("linear", x)
    w, b = read("linear", "weight", weight, x.dtype), read_optional("linear", "bias", bias, x.dtype)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear: x has shape {x.shape}, weight {w.shape}; expected (..., C_in), (C_in, C_out)")
    expect_shape("linear", "bias", bias, w.shape[1:])
    if x.data.size == 0 or w.size == 0:  # kernels do not support empty arrays
        return x @ weight if bias is None else x @ weight + bias
    backend = backend_of(x.data)
    k = backend.kernels_for(tf32)
    parents = (x, weight) if bias is None else (x, weight, bias)
    kept = recipe_or_data(x) if w.shape[1] >= backend.recompute_outputs else x.data
    return record(k.linear_forward(x.data, w, b), parents, _linear_backward, saved=(k, kept, w, bias is not None))


def _linear_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, kept, weight, has_bias = saved
    x = kept.compute() if isinstance(kept, Recipe) else kept
    dbias = into(2) if has_bias else None
    dx = k.linear_backward(dy, x, weight, into(1), dbias)
    return (dx, None, None) if has_bias else (dx, None)


def logits(x: Tensor, weight: Tensor, tf32: bool = False) -> Tensor:
    """y = x W^T: an output layer tied to the token embedding.

    x (..., C), weight (V, C) -> (..., V). Saves x and weight.
    tf32  compute float32 matrix products in TF32, here and in the backward pass.
    Raises ValueError if the shapes do not match, or if the device does not support TF32.
    """
    check_tensors("logits", x)
    w = read("logits", "weight", weight, x.dtype)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"logits: x has shape {x.shape}, weight {w.shape}; expected (..., C) and (V, C)")
    if x.data.size == 0 or w.size == 0:
        return x @ weight.transpose()
    k = backend_of(x.data).kernels_for(tf32)
    return record(k.linear_forward(x.data, w.T, None), (x, weight), _logits_backward, saved=(k, x.data, w))


def _logits_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, x, weight = saved
    one = backend_of(dy).np.ones((), dtype=sum_dtype(dy.dtype))
    return k.lm_head_backward(one, dy.reshape(-1, dy.shape[-1]), x, weight, into(1)), None


def embedding(
    tokens: Tensor | ArrayLike,
    wte: Tensor,
    wpe: Tensor | None = None,
    first_position: int = 0,
    dtype: DTypeLike | None = None,
) -> Tensor:
    """y[..., t] = wte[tokens[..., t]] + wpe[first_position + t].

    tokens (..., T) integers (an array, a list or a Tensor), wte (V, C), wpe (P, C) or None -> (..., T, C).
    dtype  the dtype of the result, in which the tables are read. None means wte's dtype, or float32 for bfloat16.
    Saves the tokens, on the host. Raises ValueError for a token outside [0, V) or a position beyond P.
    """
    check_tensors("embedding", wte)
    dtype = sum_dtype(wte.dtype) if dtype is None else dtype
    table, positions = read("embedding", "wte", wte, dtype), read_optional("embedding", "wpe", wpe, dtype)
    backend = backend_of(wte.data)
    host = host_indices("embedding", "tokens", tokens, wte.shape[0])
    ids = backend.upload(host)
    if wpe is not None:
        expect_shape("embedding", "wpe", wpe, (wpe.shape[0], wte.shape[1]))
        if ids.ndim == 0:
            raise ValueError("embedding: tokens have shape (); with positions, expected (..., T)")
        end = first_position + ids.shape[-1]
        if first_position < 0 or end > wpe.shape[0]:
            raise ValueError(f"embedding: positions {first_position} to {end - 1} requested; wpe has {wpe.shape[0]}")
    if ids.size == 0 or wte.shape[1] == 0:
        return empty_result((*ids.shape, wte.shape[1]), wte, wpe)
    y = backend.kernels.embedding_forward(ids, table, positions, first_position).astype(dtype, copy=False)
    parents = (wte,) if wpe is None else (wte, wpe)
    return record(y, parents, _embedding_backward, saved=(host, first_position, wpe is not None))


def _embedding_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    tokens, first_position, has_wpe = saved
    dwpe = into(1) if has_wpe else None
    backend_of(dy).kernels.embedding_backward(dy, tokens, first_position, into(0), dwpe)
    return (None, None) if has_wpe else (None,)


def dropout(x: Tensor, rate: float, key: Key | None) -> Tensor:
    """y = x m / (1 - rate) with m ~ Bernoulli(1 - rate); x itself if key is None or rate is 0.

    x (samples, ...). The mask depends only on the key and the element's index in the global batch. The backward pass
    recomputes it, so only the key is saved. Raises ValueError for a rate outside [0, 1).
    """
    rate = check_rate("dropout", rate, key)
    if key is None or rate == 0:
        return x
    check_tensors("dropout", x)
    if x.data.size == 0:
        return empty_result(x.shape, x)
    if x.ndim == 0:
        return dropout(x.reshape(1), rate, key).reshape(())
    y = backend_of(x.data).kernels.dropout_forward(x.data, rate, key)
    return record(y, (x,), "dropout_backward", saved=(rate, key))


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = weight (x - mean) / sqrt(var + eps) + bias over the last axis (arXiv:1607.06450).

    x (..., C), weight and bias (C,) -> (..., C). Saves x and two statistics per row.
    """
    check_tensors("layernorm", x)
    if x.ndim == 0:
        raise ValueError("layernorm: x has shape (); expected (..., C)")
    w, b = (read("layernorm", *named, sum_dtype(x.dtype)) for named in (("weight", weight), ("bias", bias)))
    expect_shape("layernorm", "weight", weight, x.shape[-1:])
    expect_shape("layernorm", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return empty_result(x.shape, x, weight, bias)
    forward = backend_of(x.data).kernels.layernorm_forward
    y, mean, rstd = forward(x.data, w, b, float(eps))
    result = record(y, (x, weight, bias), _layernorm_backward, saved=(x.data, w, mean, rstd))
    return attach_recipe(result, forward, x.data, w, b, float(eps))


def _layernorm_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return backend_of(dy).kernels.layernorm_backward(dy, *saved, into(1), into(2)), None, None


def add_layernorm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """s = x + delta and y = layernorm(s): a residual connection and the following normalization, in one pass.

    x and delta (..., C), weight and bias (C,) -> s and y, both (..., C). Saves s and two statistics per row.
    """
    check_tensors("add_layernorm", x, delta)
    if x.ndim == 0:
        raise ValueError("add_layernorm: x has shape (); expected (..., C)")
    w, b = (read("add_layernorm", *named, sum_dtype(x.dtype)) for named in (("weight", weight), ("bias", bias)))
    expect_shape("add_layernorm", "delta", delta, x.shape)
    expect_shape("add_layernorm", "weight", weight, x.shape[-1:])
    expect_shape("add_layernorm", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return x + delta, empty_result(x.shape, x, delta, weight, bias)
    k = backend_of(x.data).kernels
    s, y, mean, rstd = k.add_layernorm_forward(x.data, delta.data, w, b, float(eps))
    total, normalized = record((s, y), (x, delta, weight, bias), _add_layernorm_backward, saved=(s, w, mean, rstd))
    return total, attach_recipe(normalized, k.layernorm_forward, s, w, b, float(eps))


def _add_layernorm_backward(
    saved: Saved, gradients: tuple[Array | None, Array | None], into: GradientBuffers
) -> Gradients:
    ds, dy = gradients
    if dy is None:  # only the sum was used
        return ds, ds, None, None
    k = backend_of(dy).kernels
    if ds is None:  # only the normalized result was used, as is the case after the last block
        dx = k.layernorm_backward(dy, *saved, into(2), into(3))
    else:
        dx = k.add_layernorm_backward(ds, dy, *saved, into(2), into(3))
    return dx, dx, None, None


def attention(qkv: Tensor, n_head: int, rate: float = 0.0, key: Key | None = None, tf32: bool = False) -> Tensor:
    """Causal multi-head softmax attention on packed queries, keys and values (arXiv:1706.03762, eq. 1).

    qkv (B, T, 3 * n_head * D), the result of one linear layer -> (B, T, n_head * D).
    If a key is given, dropout at `rate` is applied to the attention weights. Saves qkv, the result and row statistics
    of shape (B, H, T), but no T x T array.
    tf32  compute float32 matrix products in TF32, here and in the backward pass.
    Raises ValueError if qkv cannot be split into heads, or if the device does not support TF32.
    """
    rate = check_rate("attention", rate, key)
    check_tensors("attention", qkv)
    if n_head < 1 or qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"attention: qkv has shape {qkv.shape}; expected (B, T, 3 * n_head * head_dim) with n_head = {n_head}"
        )
    if qkv.data.size == 0:
        return empty_result((*qkv.shape[:2], qkv.shape[2] // 3), qkv)
    key = None if rate == 0 else key
    k = backend_of(qkv.data).kernels_for(tf32)
    out, lse = k.attention_forward(qkv.data, n_head, rate, key)
    return record(out, (qkv,), _attention_backward, saved=(k, qkv.data, out, lse, n_head, rate, key))


def _attention_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, *arguments = saved
    return (k.attention_backward(dy, *arguments),)


def attention_cached(
    qkv: Tensor, cache: Array, length: int, n_head: int, tf32: bool = False, prompt_dtype: str | None = None
) -> Tensor:
    """Causal attention of new tokens, whose keys and values are appended to `cache`. For generation, without gradients.

    qkv (B, T, 3 * n_head * D) at positions `length` and up; cache (2, B, n_head, capacity, D), modified in place
    -> (B, T, n_head * D).
    tf32  compute float32 matrix products in TF32.  prompt_dtype  compute in this dtype if T > 1 and it is fast.
    Raises RuntimeError if a gradient would be recorded: use no_grad().
    """
    if qkv.requires_grad:
        raise RuntimeError("attention_cached: there is no backward pass; call it inside no_grad()")
    if (end := length + qkv.shape[1]) > cache.shape[3]:
        raise ValueError(f"attention_cached: {end} positions needed; the cache has space for {cache.shape[3]}")
    backend, x = backend_of(qkv.data), qkv.data
    if prompt_dtype and x.shape[1] > 1 and not backend.slow_reason(prompt_dtype):
        x = backend.cast(x, prompt_dtype)
    out = backend.kernels_for(tf32).attention_cached(x, cache, length, n_head)
    return Tensor(backend.cast(out, qkv.dtype))


def gelu(x: Tensor, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """GELU of x + bias (arXiv:1606.08415): GPT-2's tanh form or, if `exact`, the form with the error function.

    x (..., C), bias (C,) or None -> (..., C). Saves x.
    """
    check_tensors("gelu", x)
    b = read_optional("gelu", "bias", bias, x.dtype)
    expect_shape("gelu", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return empty_result(x.shape, x, bias)
    if x.ndim == 0:
        return gelu((x if bias is None else x + bias).reshape(1), exact=exact).reshape(())
    k = backend_of(x.data).kernels
    forward = k.gelu_exact_forward if exact else k.gelu_forward
    parents = (x,) if bias is None else (x, bias)
    y = record(forward(x.data, b), parents, _gelu_backward, saved=(x.data, b, exact))
    return y if exact else attach_recipe(y, forward, x.data, b)  # (recomputing the error function is slower)


def _gelu_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    x, bias, exact = saved
    k = backend_of(dy).kernels
    backward = k.gelu_exact_backward if exact else k.gelu_backward
    if bias is None:
        return (backward(dy, x, None, None),)
    return backward(dy, x, bias, into(1)), None


def softmax(x: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) over the last axis. Saves the result."""
    check_tensors("softmax", x)
    if x.data.size == 0:
        return empty_result(x.shape, x)
    if x.ndim == 0:
        return softmax(x.reshape(1)).reshape(())
    y = backend_of(x.data).kernels.softmax_forward(x.data)
    return record(y, (x,), "softmax_backward", saved=(y,))


def cross_entropy(logits: Tensor, targets: Tensor | ArrayLike) -> Tensor:
    """The mean of -log softmax(logits)[target], in nats.

    logits (..., V), targets (...) integers -> a scalar. Saves the logits and one statistic per row.
    Raises ValueError for a target outside [0, V).
    """
    check_tensors("cross_entropy", logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits have shape (); expected (..., V)")
    backend = backend_of(logits.data)
    ids = backend.upload(host_indices("cross_entropy", "targets", targets, logits.shape[-1]))
    expect_shape("cross_entropy", "targets", ids, logits.shape[:-1])
    if ids.size == 0:
        return empty_result((), logits, value=math.nan)
    loss, lse = backend.kernels.cross_entropy_forward(logits.data, ids)
    return record(loss, (logits,), "cross_entropy_backward", saved=(logits.data, ids, lse))


def lm_head(
    x: Tensor, weight: Tensor, targets: Tensor | ArrayLike, head_rows: int | None = None, tf32: bool = False
) -> Tensor:
    """cross_entropy(x W^T, targets), fused: the head of a language model and its loss.

    x (..., C), weight (V, C), targets (...) integers -> a scalar, in nats. Saves x, weight and one (N, V) buffer, which
    first contains the logits and then their gradient. Raises ValueError for a target outside [0, V).
    head_rows  maximum number of rows (out of N) processed at a time. The buffer then has only head_rows rows and is not
               saved. If gradients are recorded, those of x and weight are computed immediately and saved instead.
    tf32       compute float32 matrix products in TF32, here and in the backward pass.
    """
    w, ids = _check_head(x, weight, targets)
    if ids.size == 0:
        return empty_result((), x, weight, value=math.nan)
    if x.shape[-1] == 0:
        return cross_entropy(x @ weight.transpose(), ids)
    k = x.backend.kernels_for(tf32)
    if head_rows is None or head_rows >= ids.size:
        loss, dlogits = k.lm_head_forward(x.data, w, ids)
        return record(loss, (x, weight), _lm_head_backward, saved=(k, dlogits, x.data, w))
    if not _has_gradient(x, weight):
        loss, _ = _lm_head_in_chunks(k, x.data, w, ids, head_rows, None, None)
        return record(loss, (x, weight), _lm_head_in_chunks_backward)
    dweight = _zeros(w) if weight.requires_grad else None
    loss, dx = _lm_head_in_chunks(k, x.data, w, ids, head_rows, 1.0, dweight)
    return record(loss, (x, weight), _lm_head_in_chunks_backward, saved=(dx, dweight))


def lm_head_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor | ArrayLike,
    dloss: float = 1.0,
    head_rows: int | None = None,
    tf32: bool = False,
) -> Array:
    """loss = lm_head(x, weight, targets); loss.backward(dloss), using less memory. Returns loss.data.

    The logits of a chunk of rows are immediately replaced by their gradients, and the gradient of a parameter is added
    directly to its buffer. So neither the (N, V) logits nor a (V, C) gradient is ever allocated.
    head_rows  maximum number of rows processed at a time. None: as many as fit in backend.logits_bytes.
    """
    w, ids = _check_head(x, weight, targets)
    if ids.size == 0 or x.shape[-1] == 0 or not _has_gradient(x, weight):
        loss = lm_head(x, weight, targets, head_rows, tf32)
        loss.backward(dloss)
        return loss.data
    if head_rows is None:
        head_rows = max(1, int(min(ids.size, x.backend.logits_bytes / (len(w) * w.itemsize))))
    leaf, dweight = weight.leaf, None
    if weight.requires_grad:
        dweight = leaf.buffer() if leaf else _zeros(w)
    k = x.backend.kernels_for(tf32)
    value, dx = _lm_head_in_chunks(k, x.data, w, ids, head_rows, dloss, dweight)
    result = record(value, (x, weight), _lm_head_in_chunks_backward, saved=(dx, None if leaf else dweight))
    del x, dx  # so that the backward pass frees their memory
    result.backward()
    return result.data


def _lm_head_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, *arrays = saved
    return k.lm_head_backward(dy, *arrays, into(1)), None


def _lm_head_in_chunks(
    k: SimpleNamespace,
    x: Array,
    weight: Array,
    ids: Array,
    head_rows: int,
    dloss: float | None,
    dweight: Array | None,
) -> tuple[Array, Array | None]:
    """Return the loss and dx; dx is None if dloss is None. Adds the gradient of weight to dweight."""
    backend, rows, ids = backend_of(x), x.reshape(-1, x.shape[-1]), ids.reshape(-1)
    losses: list[Array] = []
    dx, scale = None, None
    if dloss is not None:
        dx, scale = backend.empty(rows.shape, x.dtype), backend.np.full((), dloss, dtype=sum_dtype(x.dtype))
    for chunk in _chunks(len(ids), head_rows):
        share = len(ids[chunk]) / len(ids)
        loss, dlogits = k.lm_head_forward(rows[chunk], weight, ids[chunk])
        losses.append(loss * share)
        if dx is not None and scale is not None:
            dx[chunk] = k.lm_head_backward(scale * share, dlogits, rows[chunk], weight, dweight)
        del dlogits  # the next chunk uses its memory
    return sum(losses[1:], start=losses[0]), dx if dx is None else dx.reshape(x.shape)


def _lm_head_in_chunks_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    """The gradients for dloss = 1, multiplied by dloss."""
    dx, dweight = saved
    if dweight is not None and (total := into(1)) is not None:
        for rows in _chunks(len(dweight), SCALED_ROWS):
            total[rows] += dweight[rows] * dy
    return (dx.astype(dy.dtype, copy=False) * dy).astype(dx.dtype, copy=False), None


def _chunks(rows: int, head_rows: int) -> list[slice]:
    """Divide rows into nearly equal chunks of at most head_rows, the largest first, so that memory is reused."""
    if head_rows < 1:
        raise ValueError(f"lm_head: head_rows is {head_rows}; expected 1 or more")
    count = -(-rows // head_rows)
    stops = [-(-rows * i // count) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


def _check_head(x: Tensor, weight: Tensor, targets: Tensor | ArrayLike) -> tuple[Array, Array]:
    """Return the weight in x's dtype, and the targets on x's device."""
    check_tensors("lm_head", x)
    w = read("lm_head", "weight", weight, x.dtype)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"lm_head: x has shape {x.shape}, weight {w.shape}; expected (..., C) and (V, C)")
    ids = backend_of(x.data).upload(host_indices("lm_head", "targets", targets, weight.shape[0]))
    expect_shape("lm_head", "targets", ids, x.shape[:-1])
    return w, ids


def _zeros(weight: Array) -> Array:
    """A buffer for the gradient of a weight."""
    buffer = backend_of(weight).empty(weight.shape, sum_dtype(weight.dtype))
    buffer[...] = 0
    return buffer


def _has_gradient(*tensors: Tensor) -> bool:
    """Whether an operation on these Tensors is recorded."""
    return is_recording() and any(x.requires_grad for x in tensors)


if not TYPE_CHECKING:  # so that type checkers report misspelled names
    __getattr__ = missing_names.of_module("tinygrad2.ops", missing_names.OPS)
