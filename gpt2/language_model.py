"""What generation, evaluation and training ask of a model: a model of another architecture is one new file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tinygrad2 import Key, Tensor
from tinygrad2.array import Array
from tinygrad2.backend import Backend
from tinygrad2.nn import Parameter, ParameterArena


class ModelConfig(Protocol):
    """The sizes of a language model.

    vocab_size   every token id is below it.
    n_positions  the context: the most tokens that the model reads at a time.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_positions(self) -> int: ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def summary(self) -> str:
        """The sizes in words, such as "4 layers, 128 wide, 4 heads"."""

    def memory(
        self, batch_size: int, block_size: int, precision: str, recompute: str, head_rows: int | None
    ) -> dict[str, int]:
        """Bytes that a training step keeps, by what they are for."""

    def flops_per_token(self, block_size: int) -> int:
        """Floating-point operations of training on one token, in sequences of block_size tokens."""


class Cache(Protocol):
    """Keys and values of the tokens read so far (see generate.KVCache).

    layers  one array a layer;  length  how many positions are filled.
    """

    layers: list[Array]
    length: int


class LanguageModel(Protocol):
    """A causal language model: token ids (B, T) -> features (B, T, C) -> logits (B, T, V) of each next token.

    It is a tinygrad2.nn.Module, which provides all that is about parameters.

    config       its sizes.
    backend      where it computes: the backend of its parameters.
    activations  the dtype of what its layers compute, by name.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def activations(self) -> str: ...

    def features(self, tokens: Any, key: Key | None = None, cache: Cache | None = None) -> Tensor:
        """What the output layer reads: tokens (B, T) -> (B, T, C).

        key    names the dropout masks; None is no dropout.
        cache  the tokens before these; these are added to it.
        """

    def head(self, features: Tensor) -> Tensor:
        """The output layer: features (..., C) -> logits (..., V)."""

    def loss(self, tokens: Any, targets: Any, key: Key | None = None) -> Tensor:
        """The mean cross-entropy in nats of predicting targets (B, T) from tokens (B, T), a scalar."""

    def cache_shapes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """The shape of each of a cache's arrays, for `batch` texts of up to `capacity` tokens."""

    def hidden_matrices(self) -> dict[str, int]:
        """The names of the hidden layers' matrices (in, out), and into how many blocks of columns each divides: 3 for
        queries, keys and values in one. Muon orthogonalizes these blocks."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]: ...
    def parameters(self) -> Iterator[Parameter]: ...
    def n_parameters(self) -> int: ...
    def arena(self) -> ParameterArena: ...

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model into the folder `path`."""
