"""trace(model, tokens) returns the intermediate values of a forward pass, from the embeddings to the logits.

`tinygrad2.tracing` reports every operation of the forward pass. The tracer follows the residual stream through the
operations: the stream starts as the token embedding, and each attention and MLP adds its output to it. This works for
any model that uses the engine's operations and adds to its residual stream with `+` or `ops.add_layernorm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt2.language_model import LanguageModel
from tinygrad2 import Tensor, no_grad, tracing
from tinygrad2.tracer import Operation

ATTENTION_N_HEAD = 4  # the index of n_head in the values that ops.attention saves


@dataclass
class LayerTrace:
    """One layer of a trace, for a text of T tokens. The input of the next layer is stream + attention + mlp.

    stream     (T, C), the residual stream at the input of the layer.
    attention  (T, C), the output that attention adds to the stream; None if the layer has no attention.
    mlp        (T, C), the output that the MLP (or any module after attention) adds; None if the layer has no MLP.
    """

    stream: np.ndarray
    attention: np.ndarray | None = None
    mlp: np.ndarray | None = None
    _weights: Callable[[], np.ndarray] | None = None

    def weights(self) -> np.ndarray:
        """The attention weights, (H, T, T): head, query, key. The weights of a query sum to 1; those of later keys
        are 0.

        Attention kernels do not store the weights, so each call computes them from the queries and keys.
        Raises ValueError if the layer has no attention.
        """
        if self._weights is None:
            raise ValueError("trace: this layer has no attention, so it has no attention weights")
        return self._weights()


@dataclass
class Trace:
    """The intermediate values of a model for a text of T tokens. They are NumPy arrays on the host, in the precision of
    the model's activations (float32 if it is bfloat16).

    tokens     (T,), the ids.
    embedding  (T, C), the token embedding, plus the position embedding if the model has one.
    layers     one LayerTrace per layer, in order.
    stream     (T, C), the residual stream after the last layer.
    features   (T, C), the input of the output layer: the normalized stream.
    logits     (T, V); softmax(logits[t]) is the predicted distribution of token t + 1.
    """

    tokens: np.ndarray
    embedding: np.ndarray
    layers: list[LayerTrace]
    stream: np.ndarray
    features: np.ndarray
    logits: np.ndarray


def trace(model: LanguageModel, tokens: Sequence[int] | np.ndarray) -> Trace:
    """Compute the activations of `model` for the ids `tokens` (T,), without dropout and gradients.

    Raises ValueError if `tokens` is empty, not one-dimensional, or longer than the model's context, or if the model has
    no embedding.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"trace: tokens have shape {ids.shape}; expected (T,), the ids of one text, with T >= 1")
    tracer = _Tracer(len(ids))
    with no_grad(), tracing(tracer):
        features = model.features(ids[None])
    with no_grad():
        logits = model.head(features)
    if tracer.stream is None or tracer.embedding is None:
        raise ValueError(f"trace: {type(model).__name__} has no embedding; expected a model that begins with one")
    stream, embedding = _on_host(tracer.stream), _on_host(tracer.embedding)
    return Trace(ids, embedding, tracer.layers, stream, _on_host(features), _on_host(logits))


def attention_weights(qkv: np.ndarray, n_head: int) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) over the keys up to each query, as `ops.attention` computes it without dropout.

    qkv (T, 3 n_head D): queries, keys and values, concatenated -> (n_head, T, T).
    Source: arXiv:1706.03762, eq. 1.
    """
    T, width = qkv.shape
    D = width // (3 * n_head)
    q, k, _ = qkv.reshape(T, 3, n_head, D).transpose(1, 2, 0, 3)  # each (n_head, T, D)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(D)
    scores[:, ~np.tri(T, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


@dataclass
class _Tracer:
    """Follows the residual stream of a text of `length` tokens through the operations, and records what is added to it.

    A layer begins when the output of attention is added. The next addition that is not from attention is its MLP.
    """

    length: int
    stream: Tensor | None = None
    embedding: Tensor | None = None
    layers: list[LayerTrace] = field(default_factory=list)
    _embeddings: list[Tensor] = field(default_factory=list)
    _weights: Callable[[], np.ndarray] | None = None  # the weights of an attention whose output has not been added yet

    def __call__(self, operation: Operation) -> None:
        result = operation.results[0]
        if operation.name == "embedding":
            self._embeddings.append(result)
            if self.stream is None:
                self.stream = self.embedding = result
        elif operation.name == "attention":
            qkv, n_head = _on_host(operation.parents[0]), operation.saved[ATTENTION_N_HEAD]
            self._weights = lambda: attention_weights(qkv, n_head)
        elif operation.name == "softmax" and result.shape[2:] == (self.length, self.length):  # (1, H, T, T)
            weights = _on_host(result)
            self._weights = lambda: weights
        elif operation.name in ("add", "add_layernorm") and result.shape == getattr(self.stream, "shape", None):
            first, second = operation.parents[:2]
            if self.stream is first or self.stream is second:
                self._add(second if self.stream is first else first, result)

    def _add(self, added: Tensor, total: Tensor) -> None:
        assert self.stream is not None
        if any(added is one for one in self._embeddings):  # the position embedding
            self.embedding = total
        elif self._weights is None and self.layers and self.layers[-1].mlp is None:
            self.layers[-1].mlp = _on_host(added)
        elif self._weights is None:
            self.layers.append(LayerTrace(_on_host(self.stream), mlp=_on_host(added)))
        else:
            self.layers.append(LayerTrace(_on_host(self.stream), _on_host(added), _weights=self._weights))
            self._weights = None
        self.stream = total


def _on_host(x: Tensor) -> np.ndarray:
    """The values (1, ...) of one text as a NumPy array (...)."""
    values = x.numpy()[0]
    return values.astype(np.float32) if values.dtype.itemsize < 4 else values
