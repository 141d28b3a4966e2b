"""The interface that generation, evaluation and training require of a model, for any architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from numpy.typing import ArrayLike

from tinygrad2 import Key, Tensor
from tinygrad2.array import Array
from tinygrad2.backend import Backend
from tinygrad2.nn import Parameter, ParameterArena
from tinygrad2.precision import Precision


class ModelConfig(Protocol):
    """The sizes of a language model.

    vocab_size   the number of token ids.
    n_positions  the context: the maximum number of tokens in a sequence.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_positions(self) -> int: ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def summary(self) -> str:
        """The sizes as text, such as "4 layers, 4 heads, embedding size 128, context 64"."""

    def flops_per_token(self, block_size: int) -> int:
        """Floating-point operations per token in training, in sequences of block_size tokens."""


class Cache(Protocol):
    """Keys and values of the tokens processed so far (see generate.KVCache).

    layers  one array per layer.
    length  the number of positions in use.
    """

    layers: list[Array]
    length: int


class LanguageModel(Protocol):
    """A causal language model: token ids (B, T) -> features (B, T, C) -> logits (B, T, V) of each next token.

    It is a tinygrad2.nn.Module, which provides the methods for parameters.

    config     the sizes.
    backend    the backend of the parameters, on which the model runs.
    precision  the dtypes of parameters and activations.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def precision(self) -> Precision: ...

    def features(self, tokens: ArrayLike, key: Key | None = None, cache: Cache | None = None) -> Tensor:
        """The input of the output layer: tokens (B, T) -> (B, T, C).

        key    the key of the dropout masks; None for no dropout.
        cache  keys and values of the preceding tokens; those of `tokens` are appended.
        """

    def head(self, features: Tensor) -> Tensor:
        """The output layer: features (..., C) -> logits (..., V)."""

    def loss(self, tokens: ArrayLike, targets: ArrayLike, key: Key | None = None) -> Tensor:
        """The mean cross-entropy in nats of predicting targets (B, T) from tokens (B, T), a scalar."""

    def backward(self, tokens: ArrayLike, targets: ArrayLike, key: Key | None = None, dloss: float = 1.0) -> Array:
        """Equivalent to loss(tokens, targets, key).backward(dloss), possibly with less memory. Returns the loss.

        Training calls it for each micro-batch. Unless a model has its own method, as GPT2 has, it uses this one:
        `backward = LanguageModel.backward`.
        """
        loss = self.loss(tokens, targets, key)
        loss.backward(dloss)
        return loss.data

    def cache_shapes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """The shapes of a cache's arrays, one per layer, for `batch` texts of up to `capacity` tokens."""

    def hidden_matrices(self) -> dict[str, int]:
        """Map the name of each matrix (in, out) of the hidden layers to its number of column blocks: 3 for a matrix
        that computes queries, keys and values. Muon orthogonalizes each block separately."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]: ...
    def parameters(self) -> Iterator[Parameter]: ...
    def n_parameters(self) -> int: ...
    def arena(self) -> ParameterArena: ...

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model to the folder `path`."""
