"""The operations that GPT-2 is made of, on Tensors.

Each is two functions that stand together: the forward one checks its arguments, calls the kernel of the same name (see
reference.py for the math) and records; the backward one calls the backward kernel with what was saved.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy

from tinygrad2.autograd import is_recording
from tinygrad2.backend import Backend, backend_of
from tinygrad2.random import Key
from tinygrad2.tensor import Tensor, record


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W + b.

    x (..., C_in), weight (C_in, C_out), bias (C_out,) or None -> (..., C_out). Saves x and weight.
    Raises ValueError where the shapes do not fit.
    """
    _check_tensors("linear", x, weights=(weight, bias))
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"linear: x has shape {x.shape}, weight {weight.shape}; expected (..., C_in), (C_in, C_out)")
    _expect("linear", "bias", bias, weight.shape[1:])
    y = backend_of(x.data).kernels.linear_forward(x.data, weight.compute, None if bias is None else bias.compute)
    parents = (x, weight) if bias is None else (x, weight, bias)
    return record(y, parents, _linear_backward, saved=(x.data, weight.compute, bias is not None))


def _linear_backward(saved, dy, into):
    x, weight, has_bias = saved
    dbias = into(2) if has_bias else None
    dx = backend_of(dy).kernels.linear_backward(dy, x, weight, into(1), dbias)
    return (dx, None, None) if has_bias else (dx, None)


def embedding(tokens: Any, wte: Tensor, wpe: Tensor | None = None, first_position: int = 0) -> Tensor:
    """y[..., t] = wte[tokens[..., t]] + wpe[first_position + t].

    tokens (..., T) integers (an array, a list or a Tensor), wte (V, C), wpe (P, C) or None -> (..., T, C).
    Saves the tokens. Raises ValueError for a token outside [0, V) and for a position past P.
    """
    _check_tensors("embedding", weights=(wte, wpe))
    backend = backend_of(wte.data)
    host = _host_indices("embedding", "tokens", tokens, wte.shape[0])
    ids = backend.upload(host)
    if wpe is not None:
        _expect("embedding", "wpe", wpe, (wpe.shape[0], wte.shape[1]))
        if ids.ndim == 0:
            raise ValueError("embedding: tokens have shape (); with positions, expected (..., T)")
        end = first_position + ids.shape[-1]
        if first_position < 0 or end > wpe.shape[0]:
            raise ValueError(f"embedding: positions {first_position} to {end - 1} asked for; wpe has {wpe.shape[0]}")
    y = backend.kernels.embedding_forward(ids, wte.compute, None if wpe is None else wpe.compute, first_position)
    parents = (wte,) if wpe is None else (wte, wpe)
    runs = TokenRuns(host, backend) if wte.requires_grad and is_recording() else None
    return record(y, parents, _embedding_backward, saved=(runs, first_position, wpe is not None))


def _embedding_backward(saved, dy, into):
    runs, first_position, has_wpe = saved
    dwpe = into(1) if has_wpe else None
    backend_of(dy).kernels.embedding_backward(dy, runs, first_position, into(0), dwpe)
    return (None, None) if has_wpe else (None,)


class TokenRuns:
    """Which rows of a batch hold the same token: what the embedding's backward pass needs, found on the host.

    order  (N,) the positions sorted by token: equal tokens stand side by side, in runs;  tokens  (N,) those tokens.
    first  (U,) the row where each run begins;  ids  (U,) its token.
    folds  pairs of index arrays (into, other) of sorted rows to add pairwise, round by round.

    Each line is found, and uploaded as one array, when first asked for: no more than the kernel at hand needs, and at a
    time at which the device is still busy with what was launched before.
    """

    def __init__(self, tokens: numpy.ndarray, backend: Backend):
        self._flat, self._backend = tokens.reshape(-1), backend

    order = property(lambda self: self._rows[0])
    tokens = property(lambda self: self._rows[1])
    first = property(lambda self: self._runs[0])
    ids = property(lambda self: self._runs[1])

    @functools.cached_property
    def _sorted(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        keys = self._flat
        if keys.max() < 1 << 16:
            keys = keys.astype(numpy.uint16)  # which NumPy sorts by radix, in a tenth of the time
        order = numpy.argsort(keys, kind="stable")
        return order, self._flat[order]

    @functools.cached_property
    def _first(self) -> numpy.ndarray:
        _, tokens = self._sorted
        return numpy.flatnonzero(numpy.diff(tokens, prepend=tokens[0] - 1))

    @functools.cached_property
    def _rows(self) -> list[Any]:
        return self._upload(*self._sorted)

    @functools.cached_property
    def _runs(self) -> list[Any]:
        return self._upload(self._first, self._sorted[1][self._first])

    @functools.cached_property
    def folds(self) -> list[tuple[Any, Any]]:
        length = numpy.diff(self._first, append=self._flat.size)
        place = numpy.arange(self._flat.size) - numpy.repeat(self._first, length)  # of each row within its run
        left = numpy.repeat(length, length) - place  # rows from here to the run's end
        pieces, distance = [], 1
        while distance < length.max():
            into = numpy.flatnonzero((place % (2 * distance) == 0) & (left > distance))
            pieces += [into, into + distance]
            distance *= 2
        uploaded = self._upload(*pieces) if pieces else []
        return list(zip(uploaded[::2], uploaded[1::2], strict=True))

    def _upload(self, *pieces: numpy.ndarray) -> list[Any]:
        stops = numpy.cumsum([len(piece) for piece in pieces])[:-1]
        return self._backend.np.split(self._backend.upload(numpy.concatenate(pieces)), stops)


def dropout(x: Tensor, rate: float, key: Key | None) -> Tensor:
    """y = x m / (1 - rate) with m Bernoulli(1 - rate); x itself where key is None or rate is 0.

    x (samples, ...). The mask is a pure function of the key and of the element's index in the global batch; it is
    computed again in backward, so nothing is saved. Raises ValueError for a rate outside [0, 1).
    """
    rate = _check_rate("dropout", rate)
    if key is None or rate == 0:
        return x
    _check_tensors("dropout", x)
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"dropout: x has shape {x.shape}; expected (samples, ...)")
    return record(backend_of(x.data).kernels.dropout_forward(x.data, rate, key), (x,), _dropout_backward, (rate, key))


def _dropout_backward(saved, dy, into):
    return (backend_of(dy).kernels.dropout_backward(dy, *saved),)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """y = weight (x - mean) / sqrt(var + eps) + bias over the last axis (arXiv:1607.06450).

    x (..., C), weight and bias (C,) -> (..., C). Saves x and two statistics per row.
    """
    _check_tensors("layernorm", x, gains=(weight, bias))
    _expect("layernorm", "weight", weight, x.shape[-1:])
    _expect("layernorm", "bias", bias, x.shape[-1:])
    y, mean, rstd = backend_of(x.data).kernels.layernorm_forward(x.data, weight.data, bias.data, float(eps))
    return record(y, (x, weight, bias), _layernorm_backward, saved=(x.data, weight.data, mean, rstd))


def _layernorm_backward(saved, dy, into):
    return backend_of(dy).kernels.layernorm_backward(dy, *saved, into(1), into(2)), None, None


def add_layernorm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """s = x + delta and y = layernorm(s), the residual connection and the normalisation after it, in one pass.

    x and delta (..., C), weight and bias (C,) -> s and y, both (..., C). Saves s and two statistics per row.
    """
    _check_tensors("add_layernorm", x, delta, gains=(weight, bias))
    _expect("add_layernorm", "delta", delta, x.shape)
    _expect("add_layernorm", "weight", weight, x.shape[-1:])
    _expect("add_layernorm", "bias", bias, x.shape[-1:])
    k = backend_of(x.data).kernels
    s, y, mean, rstd = k.add_layernorm_forward(x.data, delta.data, weight.data, bias.data, float(eps))
    return record((s, y), (x, delta, weight, bias), _add_layernorm_backward, saved=(s, weight.data, mean, rstd))


def _add_layernorm_backward(saved, dy, into):
    ds, dy = dy
    if dy is None:  # only the sum was used
        return ds, ds, None, None
    k = backend_of(dy).kernels
    if ds is None:  # only the normalised result was used, as after the last block
        dx = k.layernorm_backward(dy, *saved, into(2), into(3))
    else:
        dx = k.add_layernorm_backward(ds, dy, *saved, into(2), into(3))
    return dx, dx, None, None


def attention(qkv: Tensor, n_head: int, rate: float = 0.0, key: Key | None = None) -> Tensor:
    """Causal multi-head softmax attention on packed queries, keys and values (arXiv:1706.03762, eq. 1).

    qkv (B, T, 3 * n_head * D), as the one linear layer before it leaves them -> (B, T, n_head * D).
    With a key, dropout at `rate` acts on the attention weights. Saves qkv, the result and (B, H, T) row statistics;
    no T x T array. Raises ValueError where qkv does not divide into heads.
    """
    rate = _check_rate("attention", rate)
    _check_tensors("attention", qkv)
    if n_head < 1 or qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"attention: qkv has shape {qkv.shape}; expected (B, T, 3 * n_head * head_dim) with n_head = {n_head}"
        )
    key = None if rate == 0 else key
    out, lse = backend_of(qkv.data).kernels.attention_forward(qkv.data, n_head, rate, key)
    return record(out, (qkv,), _attention_backward, saved=(qkv.data, out, lse, n_head, rate, key))


def _attention_backward(saved, dy, into):
    return (backend_of(dy).kernels.attention_backward(dy, *saved),)


def attention_cached(qkv: Tensor, cache: Any, length: int, n_head: int) -> Tensor:
    """Causal attention of new tokens, whose keys and values join those in `cache`; for generation, without gradients.

    qkv (B, T, 3 * n_head * D) of the positions from `length` on; cache (2, B, n_head, capacity, D), written to
    -> (B, T, n_head * D). Raises RuntimeError where a gradient would be recorded: use no_grad().
    """
    if qkv.requires_grad:
        raise RuntimeError("attention_cached: it has no backward pass; generate inside no_grad()")
    if length + qkv.shape[1] > cache.shape[3]:
        raise ValueError(
            f"attention_cached: {length + qkv.shape[1]} positions needed; the cache holds {cache.shape[3]}"
        )
    return Tensor(backend_of(qkv.data).kernels.attention_cached(qkv.data, cache, length, n_head))


def gelu(x: Tensor, bias: Tensor | None = None, exact: bool = False) -> Tensor:
    """GELU of x + bias (arXiv:1606.08415): GPT-2's tanh form, or with `exact` the form with the error function.

    x (..., C), bias (C,) or None -> (..., C). Saves x.
    """
    _check_tensors("gelu", x, weights=(bias,))
    _expect("gelu", "bias", bias, x.shape[-1:])
    k = backend_of(x.data).kernels
    b = None if bias is None else bias.compute
    y = k.gelu_exact_forward(x.data, b) if exact else k.gelu_forward(x.data, b)
    return record(y, (x,) if bias is None else (x, bias), _gelu_backward, saved=(x.data, b, exact))


def _gelu_backward(saved, dy, into):
    x, bias, exact = saved
    k = backend_of(dy).kernels
    backward = k.gelu_exact_backward if exact else k.gelu_backward
    if bias is None:
        return (backward(dy, x, None, None),)
    return backward(dy, x, bias, into(1)), None


def softmax(x: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) over the last axis. Saves the result."""
    _check_tensors("softmax", x)
    y = backend_of(x.data).kernels.softmax_forward(x.data)
    return record(y, (x,), _softmax_backward, saved=(y,))


def _softmax_backward(saved, dy, into):
    return (backend_of(dy).kernels.softmax_backward(dy, *saved),)


def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
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
    loss, lse = backend.kernels.cross_entropy_forward(logits.data, ids)
    return record(loss, (logits,), _cross_entropy_backward, saved=(logits.data, ids, lse))


def _cross_entropy_backward(saved, dy, into):
    return (backend_of(dy).kernels.cross_entropy_backward(dy, *saved),)


def lm_head(x: Tensor, weight: Tensor, targets: Any, head_rows: int | None = None) -> Tensor:
    """cross_entropy(x W^T, targets), fused: the head of a language model and its loss.

    x (..., C), weight (V, C), targets (...) integers -> a scalar, in nats. Saves x, weight and one (N, V) buffer, which
    holds first the logits and then their gradient. Raises ValueError for a target outside [0, V).
    head_rows  take so many of the N rows at a time: the buffer has as many, and the backward pass computes the logits
               again (a third more work in the head).
    """
    _check_tensors("lm_head", x, weights=(weight,))
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"lm_head: x has shape {x.shape}, weight {weight.shape}; expected (..., C) and (V, C)")
    backend = backend_of(x.data)
    ids = backend.upload(_host_indices("lm_head", "targets", targets, weight.shape[0]))
    _expect("lm_head", "targets", ids, x.shape[:-1])
    if head_rows is not None and head_rows < ids.size:
        return _lm_head_in_chunks(x, weight, ids.reshape(-1), head_rows)
    loss, dlogits = backend.kernels.lm_head_forward(x.data, weight.compute, ids)
    return record(loss, (x, weight), _lm_head_backward, saved=(dlogits, x.data, weight.compute))


def _lm_head_backward(saved, dy, into):
    return backend_of(dy).kernels.lm_head_backward(dy, *saved, into(1)), None


def _lm_head_in_chunks(x: Tensor, weight: Tensor, ids: Any, head_rows: int) -> Tensor:
    if head_rows < 1:
        raise ValueError(f"lm_head: head_rows is {head_rows}; expected 1 or more")
    k, rows = backend_of(x.data).kernels, x.data.reshape(-1, x.shape[-1])
    count = -(-len(rows) // head_rows)
    stops = [len(rows) * i // count for i in range(count + 1)]  # nearly equal, so that their memory serves again
    chunks = [slice(start, stop) for start, stop in itertools.pairwise(stops)]
    losses = [
        k.lm_head_forward(rows[chunk], weight.compute, ids[chunk])[0] * (len(ids[chunk]) / len(rows))
        for chunk in chunks
    ]
    loss = sum(losses[1:], start=losses[0])
    return record(loss, (x, weight), _lm_head_in_chunks_backward, saved=(x.data, weight.compute, ids, chunks))


def _lm_head_in_chunks_backward(saved, dy, into):
    x, weight, ids, chunks = saved
    backend, dweight = backend_of(dy), into(1)
    dx, rows = backend.np.empty(x.shape, dtype=x.dtype), x.reshape(-1, x.shape[-1])
    for chunk in chunks:
        dlogits = backend.kernels.lm_head_forward(rows[chunk], weight, ids[chunk])[1]
        share = dy * (len(ids[chunk]) / len(rows))
        dx.reshape(rows.shape)[chunk] = backend.kernels.lm_head_backward(share, dlogits, rows[chunk], weight, dweight)
    return dx, None


def _check_tensors(
    op: str, *tensors: Tensor | None, weights: tuple[Tensor | None, ...] = (), gains: tuple[Tensor, ...] = ()
) -> None:
    """All given are Tensors of one floating-point dtype: nothing is promoted silently.

    weights  count as what is computed with (see Tensor.compute). Matrices that are nothing but bfloat16 may stand
             beside activations of float32 too, where nothing is recorded.
    gains    may be float32 beside activations in bfloat16.
    """
    for tensor in (*tensors, *weights, *gains):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected Tensors, got {type(tensor).__name__}; wrap it as Tensor(...)")
    dtypes = {tensor.dtype.name for tensor in tensors if tensor is not None}
    for weight in weights:
        narrow = weight is not None and weight.dtype.name == "bfloat16" and weight.ndim > 1 and "bfloat16" not in dtypes
        if narrow and is_recording():
            raise TypeError(f"{op}: weights in bfloat16 have no gradients; compute inside no_grad()")
        if weight is not None and not narrow:
            dtypes.add(weight.compute.dtype.name)
    dtypes |= {gain.dtype.name for gain in gains if (gain.dtype.name, dtypes) != ("float32", {"bfloat16"})}
    if not dtypes and weights:  # tables in bfloat16 give float32
        return
    if len(dtypes) != 1 or "float" not in next(iter(dtypes)):
        raise TypeError(f"{op}: the arguments are of dtypes {', '.join(sorted(dtypes))}; expected one float type")


def _check_rate(op: str, rate: float) -> float:
    if not 0 <= rate < 1:
        raise ValueError(f"{op}: the dropout rate is {rate}; expected 0 <= rate < 1")
    return float(rate)


def _expect(op: str, name: str, value: Any, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {tuple(shape)}")


def _host_indices(op: str, name: str, values: Any, limit: int) -> numpy.ndarray:
    """`values` as an int64 array on the host, every one checked to be in [0, limit): a GPU would read past the end.

    What is on a device already is read back, which waits for the device.
    """
    values = values.data if isinstance(values, Tensor) else values
    if isinstance(values, list | tuple | int):
        try:
            values = numpy.asarray(values)
        except ValueError:
            raise ValueError(f"{op}: {name} are rows of different lengths; expected a rectangle of integers") from None
    if not hasattr(values, "dtype"):
        raise TypeError(f"{op}: {name} are of type {type(values).__name__}; expected an array of integers")
    if values.size == 0:
        raise ValueError(f"{op}: {name} have shape {values.shape}, which holds nothing")
    if values.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} are of dtype {values.dtype}; expected integers")
    host = backend_of(values).to_host(values)
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} hold {low if low < 0 else high}; expected integers in [0, {limit})")
    return host.astype(numpy.int64)
