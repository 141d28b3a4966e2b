"""The operations that GPT-2 is made of, on Tensors.

Each function checks its arguments, calls the kernel of the same name (see reference.py for the math) and records its
backward pass: the name of a kernel or, if parameters have gradients to add to, the function below it.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import missing_names
from tinygrad2.arguments import is_float
from tinygrad2.array import Array
from tinygrad2.autograd import GradientBuffers, Gradients, Saved
from tinygrad2.backend import backend_of
from tinygrad2.precision import sum_dtype
from tinygrad2.random import Key, check_key
from tinygrad2.tensor import Tensor, record


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tf32: bool = False) -> Tensor:
    """y = x W + b.

    x (..., C_in), weight (C_in, C_out), bias (C_out,) or None -> (..., C_out). Saves x and weight.
    tf32  multiply float32 in TF32, here and in the backward pass.
    Raises ValueError if the shapes do not match, or if the device does not support TF32.
    """
    _check_tensors("linear", x)
    w, b = _read("linear", "weight", weight, x.dtype), _read_optional("linear", "bias", bias, x.dtype)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear: x has shape {x.shape}, weight {w.shape}; expected (..., C_in), (C_in, C_out)")
    _expect("linear", "bias", bias, w.shape[1:])
    if x.data.size == 0 or w.size == 0:  # kernels do not support empty arrays
        return x @ weight if bias is None else x @ weight + bias
    k = backend_of(x.data).kernels_for(tf32)
    parents = (x, weight) if bias is None else (x, weight, bias)
    return record(k.linear_forward(x.data, w, b), parents, _linear_backward, saved=(k, x.data, w, bias is not None))


def _linear_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, x, weight, has_bias = saved
    dbias = into(2) if has_bias else None
    dx = k.linear_backward(dy, x, weight, into(1), dbias)
    return (dx, None, None) if has_bias else (dx, None)


def logits(x: Tensor, weight: Tensor, tf32: bool = False) -> Tensor:
    """y = x W^T: an output layer whose matrix is the token embedding.

    x (..., C), weight (V, C) -> (..., V). Saves x and weight.
    tf32  multiply float32 in TF32, here and in the backward pass.
    Raises ValueError if the shapes do not match, or if the device does not support TF32.
    """
    _check_tensors("logits", x)
    w = _read("logits", "weight", weight, x.dtype)
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
    dtype  the dtype to read the tables in, and of the result. None means wte's dtype, or float32 if that is bfloat16.
    Saves the tokens, on the host. Raises ValueError for a token outside [0, V) or a position beyond P.
    """
    _check_tensors("embedding", wte)
    dtype = sum_dtype(wte.dtype) if dtype is None else dtype
    table, positions = _read("embedding", "wte", wte, dtype), _read_optional("embedding", "wpe", wpe, dtype)
    backend = backend_of(wte.data)
    host = _host_indices("embedding", "tokens", tokens, wte.shape[0])
    ids = backend.upload(host)
    if wpe is not None:
        _expect("embedding", "wpe", wpe, (wpe.shape[0], wte.shape[1]))
        if ids.ndim == 0:
            raise ValueError("embedding: tokens have shape (); with positions, expected (..., T)")
        end = first_position + ids.shape[-1]
        if first_position < 0 or end > wpe.shape[0]:
            raise ValueError(f"embedding: positions {first_position} to {end - 1} requested; wpe has {wpe.shape[0]}")
    if ids.size == 0 or wte.shape[1] == 0:
        return _empty((*ids.shape, wte.shape[1]), wte, wpe)
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

    x (samples, ...). The mask is a function of only the key and the element's index in the global batch; the
    backward pass recomputes it, so only the key is saved. Raises ValueError for a rate outside [0, 1).
    """
    rate = _check_rate("dropout", rate, key)
    if key is None or rate == 0:
        return x
    _check_tensors("dropout", x)
    if x.data.size == 0:
        return _empty(x.shape, x)
    if x.ndim == 0:
        return dropout(x.reshape(1), rate, key).reshape(())
    y = backend_of(x.data).kernels.dropout_forward(x.data, rate, key)
    return record(y, (x,), "dropout_backward", saved=(rate, key))


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = weight (x - mean) / sqrt(var + eps) + bias over the last axis (arXiv:1607.06450).

    x (..., C), weight and bias (C,) -> (..., C). Saves x and two statistics per row.
    """
    _check_tensors("layernorm", x)
    if x.ndim == 0:
        raise ValueError("layernorm: x has shape (); expected (..., C)")
    w, b = (_read("layernorm", *named, sum_dtype(x.dtype)) for named in (("weight", weight), ("bias", bias)))
    _expect("layernorm", "weight", weight, x.shape[-1:])
    _expect("layernorm", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return _empty(x.shape, x, weight, bias)
    y, mean, rstd = backend_of(x.data).kernels.layernorm_forward(x.data, w, b, float(eps))
    return record(y, (x, weight, bias), _layernorm_backward, saved=(x.data, w, mean, rstd))


def _layernorm_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return backend_of(dy).kernels.layernorm_backward(dy, *saved, into(1), into(2)), None, None


def add_layernorm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """s = x + delta and y = layernorm(s), the residual connection and the normalization after it, in one pass.

    x and delta (..., C), weight and bias (C,) -> s and y, both (..., C). Saves s and two statistics per row.
    """
    _check_tensors("add_layernorm", x, delta)
    if x.ndim == 0:
        raise ValueError("add_layernorm: x has shape (); expected (..., C)")
    w, b = (_read("add_layernorm", *named, sum_dtype(x.dtype)) for named in (("weight", weight), ("bias", bias)))
    _expect("add_layernorm", "delta", delta, x.shape)
    _expect("add_layernorm", "weight", weight, x.shape[-1:])
    _expect("add_layernorm", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return x + delta, _empty(x.shape, x, delta, weight, bias)
    k = backend_of(x.data).kernels
    s, y, mean, rstd = k.add_layernorm_forward(x.data, delta.data, w, b, float(eps))
    total, normalized = record((s, y), (x, delta, weight, bias), _add_layernorm_backward, saved=(s, w, mean, rstd))
    return total, normalized


def _add_layernorm_backward(
    saved: Saved, gradients: tuple[Array | None, Array | None], into: GradientBuffers
) -> Gradients:
    ds, dy = gradients
    if dy is None:  # only the sum was used
        return ds, ds, None, None
    k = backend_of(dy).kernels
    if ds is None:  # only the normalized result was used, as after the last block
        dx = k.layernorm_backward(dy, *saved, into(2), into(3))
    else:
        dx = k.add_layernorm_backward(ds, dy, *saved, into(2), into(3))
    return dx, dx, None, None


def attention(qkv: Tensor, n_head: int, rate: float = 0.0, key: Key | None = None, tf32: bool = False) -> Tensor:
    """Causal multi-head softmax attention on packed queries, keys and values (arXiv:1706.03762, eq. 1).

    qkv (B, T, 3 * n_head * D), the result of one linear layer -> (B, T, n_head * D).
    With a key, dropout at `rate` acts on the attention weights. Saves qkv, the result and (B, H, T) row statistics;
    no T x T array.
    tf32  multiply float32 in TF32, here and in the backward pass.
    Raises ValueError if qkv does not divide into heads, or if the device does not support TF32.
    """
    rate = _check_rate("attention", rate, key)
    _check_tensors("attention", qkv)
    if n_head < 1 or qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"attention: qkv has shape {qkv.shape}; expected (B, T, 3 * n_head * head_dim) with n_head = {n_head}"
        )
    if qkv.data.size == 0:
        return _empty((*qkv.shape[:2], qkv.shape[2] // 3), qkv)
    key = None if rate == 0 else key
    k = backend_of(qkv.data).kernels_for(tf32)
    out, lse = k.attention_forward(qkv.data, n_head, rate, key)
    return record(out, (qkv,), _attention_backward, saved=(k, qkv.data, out, lse, n_head, rate, key))


def _attention_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, *arguments = saved
    return (k.attention_backward(dy, *arguments),)


def attention_cached(qkv: Tensor, cache: Array, length: int, n_head: int, tf32: bool = False) -> Tensor:
    """Causal attention of new tokens, whose keys and values are added to `cache`; for generation, without gradients.

    qkv (B, T, 3 * n_head * D) of the positions from `length`; cache (2, B, n_head, capacity, D), written to
    -> (B, T, n_head * D).
    tf32  multiply float32 in TF32.
    Raises RuntimeError if a gradient would be recorded: use no_grad().
    """
    if qkv.requires_grad:
        raise RuntimeError("attention_cached: there is no backward pass; call it inside no_grad()")
    end = length + qkv.shape[1]
    if end > cache.shape[3]:
        raise ValueError(f"attention_cached: {end} positions needed; the cache has space for {cache.shape[3]}")
    return Tensor(backend_of(qkv.data).kernels_for(tf32).attention_cached(qkv.data, cache, length, n_head))


def gelu(x: Tensor, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """GELU of x + bias (arXiv:1606.08415): GPT-2's tanh form, or with `exact` the form with the error function.

    x (..., C), bias (C,) or None -> (..., C). Saves x.
    """
    _check_tensors("gelu", x)
    b = _read_optional("gelu", "bias", bias, x.dtype)
    _expect("gelu", "bias", bias, x.shape[-1:])
    if x.data.size == 0:
        return _empty(x.shape, x, bias)
    if x.ndim == 0:
        return gelu((x if bias is None else x + bias).reshape(1), exact=exact).reshape(())
    k = backend_of(x.data).kernels
    y = k.gelu_exact_forward(x.data, b) if exact else k.gelu_forward(x.data, b)
    return record(y, (x,) if bias is None else (x, bias), _gelu_backward, saved=(x.data, b, exact))


def _gelu_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    x, bias, exact = saved
    k = backend_of(dy).kernels
    backward = k.gelu_exact_backward if exact else k.gelu_backward
    if bias is None:
        return (backward(dy, x, None, None),)
    return backward(dy, x, bias, into(1)), None


def softmax(x: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) over the last axis. Saves the result."""
    _check_tensors("softmax", x)
    if x.data.size == 0:
        return _empty(x.shape, x)
    if x.ndim == 0:
        return softmax(x.reshape(1)).reshape(())
    y = backend_of(x.data).kernels.softmax_forward(x.data)
    return record(y, (x,), "softmax_backward", saved=(y,))


def cross_entropy(logits: Tensor, targets: Tensor | ArrayLike) -> Tensor:
    """The mean of -log softmax(logits)[target], in nats.

    logits (..., V), targets (...) integers -> a scalar. Saves the logits and one statistic per row.
    Raises ValueError for a target outside [0, V).
    """
    _check_tensors("cross_entropy", logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits have shape (); expected (..., V)")
    backend = backend_of(logits.data)
    ids = backend.upload(_host_indices("cross_entropy", "targets", targets, logits.shape[-1]))
    _expect("cross_entropy", "targets", ids, logits.shape[:-1])
    if ids.size == 0:
        return _empty((), logits, value=math.nan)
    loss, lse = backend.kernels.cross_entropy_forward(logits.data, ids)
    return record(loss, (logits,), "cross_entropy_backward", saved=(logits.data, ids, lse))


def lm_head(
    x: Tensor, weight: Tensor, targets: Tensor | ArrayLike, head_rows: int | None = None, tf32: bool = False
) -> Tensor:
    """cross_entropy(x W^T, targets), fused: the head of a language model and its loss.

    x (..., C), weight (V, C), targets (...) integers -> a scalar, in nats. Saves x, weight and one (N, V) buffer, which
    contains first the logits and then their gradient. Raises ValueError for a target outside [0, V).
    head_rows  process at most this many of the N rows at a time: the buffer has this many rows, and the backward pass
               computes the logits again (a third more work in the head).
    tf32       multiply float32 in TF32, here and in the backward pass.
    """
    _check_tensors("lm_head", x)
    w = _read("lm_head", "weight", weight, x.dtype)
    if w.ndim != 2 or x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"lm_head: x has shape {x.shape}, weight {w.shape}; expected (..., C) and (V, C)")
    backend = backend_of(x.data)
    ids = backend.upload(_host_indices("lm_head", "targets", targets, weight.shape[0]))
    _expect("lm_head", "targets", ids, x.shape[:-1])
    if ids.size == 0:
        return _empty((), x, weight, value=math.nan)
    if x.shape[-1] == 0:
        return cross_entropy(x @ weight.transpose(), ids)
    k = backend.kernels_for(tf32)
    if head_rows is not None and head_rows < ids.size:
        chunks = _chunks(ids.size, head_rows)
        loss = _lm_head_in_chunks(k, x.data, w, ids.reshape(-1), chunks)
        saved = k, x.data, w, ids.reshape(-1), chunks
        return record(loss, (x, weight), _lm_head_in_chunks_backward, saved)
    loss, dlogits = k.lm_head_forward(x.data, w, ids)
    return record(loss, (x, weight), _lm_head_backward, saved=(k, dlogits, x.data, w))


def _lm_head_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, *arrays = saved
    return k.lm_head_backward(dy, *arrays, into(1)), None


def _chunks(rows: int, head_rows: int) -> list[slice]:
    """Rows in chunks of at most head_rows, of nearly equal sizes, so that memory is reused."""
    if head_rows < 1:
        raise ValueError(f"lm_head: head_rows is {head_rows}; expected 1 or more")
    count = -(-rows // head_rows)
    stops = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


def _lm_head_in_chunks(k: SimpleNamespace, x: Array, weight: Array, ids: Array, chunks: list[slice]) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    losses = [k.lm_head_forward(rows[chunk], weight, ids[chunk])[0] * (len(ids[chunk]) / len(rows)) for chunk in chunks]
    return sum(losses[1:], start=losses[0])


def _lm_head_in_chunks_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    k, x, weight, ids, chunks = saved
    dweight = into(1)
    dx, rows = backend_of(dy).np.empty(x.shape, dtype=x.dtype), x.reshape(-1, x.shape[-1])
    for chunk in chunks:
        dlogits = k.lm_head_forward(rows[chunk], weight, ids[chunk])[1]
        share = dy * (len(ids[chunk]) / len(rows))
        dx.reshape(rows.shape)[chunk] = k.lm_head_backward(share, dlogits, rows[chunk], weight, dweight)
    return dx, None


def _check_tensors(op: str, *tensors: Tensor) -> None:
    """Check that all are Tensors of one floating-point dtype: types are not promoted."""
    for tensor in tensors:
        _check_is_tensor(op, tensor)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not is_float(tensors[0].dtype):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"{op}: the arguments have dtypes {names}; expected one floating-point dtype")


def _check_is_tensor(op: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected Tensors, got {type(value).__name__}; wrap it as Tensor(...)")


def _read(op: str, name: str, parameter: Tensor, dtype: DTypeLike) -> Array:
    """The values of a parameter for an op whose activations have this dtype: see Tensor.read_as."""
    _check_is_tensor(op, parameter)
    return parameter.read_as(dtype, f"{op}: {name}")


def _read_optional(op: str, name: str, parameter: Tensor | None, dtype: DTypeLike) -> Array | None:
    return None if parameter is None else _read(op, name, parameter, dtype)


def _empty(shape: tuple[int, ...], *parents: Tensor | None, value: float = 0.0) -> Tensor:
    """The result of an operation on empty arrays, which kernels do not support: an empty array, or NaN for a mean.
    The gradients of its parents are zeros."""
    wanted = tuple(parent for parent in parents if parent is not None)
    backend, dtype = wanted[0].backend, wanted[0].data.dtype
    zeros = tuple(parent.data.shape for parent in wanted)
    return record(backend.np.full(shape, value, dtype=dtype), wanted, _empty_backward, saved=zeros)


def _empty_backward(saved: Saved, dy: Array, into: GradientBuffers) -> Gradients:
    return tuple(backend_of(dy).zeros(shape, dy.dtype) for shape in saved)


def _check_rate(op: str, rate: float, key: Key | None) -> float:
    if key is not None:
        check_key(op, key)
    if not 0 <= rate < 1:
        raise ValueError(f"{op}: the dropout rate is {rate}; expected 0 <= rate < 1")
    return float(rate)


def _expect(op: str, name: str, value: Tensor | Array | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {tuple(shape)}")


def _host_indices(op: str, name: str, values: Any, limit: int) -> numpy.ndarray:
    """`values` as an int64 array on the host, each checked to be in [0, limit): a GPU would read out of bounds.

    An array on a device is copied to the host, which waits for the device.
    """
    values = values.data if isinstance(values, Tensor) else values
    if isinstance(values, list | tuple | int):
        try:
            values = numpy.asarray(values)
        except ValueError:
            raise ValueError(f"{op}: {name} have rows of different lengths; expected equal lengths") from None
    if not hasattr(values, "dtype"):
        raise TypeError(f"{op}: {name} have type {type(values).__name__}; expected an array of integers")
    if values.size == 0:  # (NumPy makes an empty list float64)
        return numpy.zeros(values.shape, dtype=numpy.int64)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} have dtype {values.dtype}; expected integers")
    host = backend_of(values).to_host(values)
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} contain {low if low < 0 else high}; expected integers in [0, {limit})")
    return host.astype(numpy.int64)


if not TYPE_CHECKING:  # so that type checkers report misspelled names
    __getattr__ = missing_names.of_module("tinygrad2.ops", missing_names.OPS)
