"""Modules: they hold parameters and call operations on them. The operations are in ops.py, the math in reference.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy

from tinygrad2 import functional, ops, random
from tinygrad2.backend import get_backend
from tinygrad2.params import Parameter, ParameterArena
from tinygrad2.precision import check_parameter_dtype
from tinygrad2.state import State, parameters_in
from tinygrad2.tensor import Tensor

Initializer = Callable[[tuple[int, ...]], numpy.ndarray]
_sites = itertools.count(random.LAYER_SITES)  # each layer without an initializer of its own draws at another site


def normal_init(std: float, key: random.Key | None = None) -> Initializer:
    """Initial values from normal(0, std); without a key, from seed 0, at a new site for each layer."""
    chosen = random.Key(0, site=next(_sites)) if key is None else key
    return lambda shape: random.normal(chosen, shape, std)


def zeros_init(shape: tuple[int, ...]) -> numpy.ndarray:
    """Initial values of 0: for biases, and for weights that are about to be loaded."""
    return numpy.zeros(shape, dtype=numpy.float32)


class Module(State):
    """Holds parameters and modules as attributes, or in lists, tuples and dicts; their names are the paths to them."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter under its dotted name, such as `h.0.attn.c_attn.weight`, in the order of registration."""
        seen: set[int] = set()
        for name, parameter in parameters_in(self, prefix):
            if id(parameter) not in seen:  # a shared parameter counts once, under its first name
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in the order of registration."""
        return (parameter for _, parameter in self.named_parameters())

    def arena(self) -> ParameterArena:
        """The flat buffers that hold the parameters; the first call moves the parameters there."""
        if "_arena" not in vars(self):
            self._arena = ParameterArena(self.named_parameters())
        return self._arena

    def to(self, device: str) -> Self:
        """Move every parameter and gradient to "cpu" or "cuda"; returns the module. Its optimizer needs no call."""
        backend = get_backend(device)
        for parameter in list(self.parameters()):
            if parameter.backend is not backend:
                parameter.move(backend)
                vars(self).pop("_arena", None)
        return self

    def narrow(self) -> Self:
        """Convert every matrix to bfloat16, to generate faster: half as many bytes are read for each token.

        Values are rounded to 8 significant bits; biases, gains and activations keep their dtype. Afterwards there are
        no gradients: compute inside no_grad(). On the CPU only; raises ValueError elsewhere.
        """
        for parameter in list(self.parameters()):
            if not parameter.backend.narrow_weights:
                raise ValueError(
                    f"bfloat16: weights held in bfloat16 alone are supported on the CPU only; the model is on "
                    f'{parameter.backend.device}; move it with to("cpu") or --device cpu'
                )
            if parameter.ndim >= 2:
                parameter.narrow()
        vars(self).pop("_arena", None)
        return self

    def hold_copies(self) -> Self:
        """Add a bfloat16 copy of every parameter, which operations read; returns the module.

        Call it again after the module has moved to another device: the copies are not moved.
        """
        for parameter in list(self.parameters()):
            parameter.hold_copy()
        vars(self).pop("_arena", None)
        return self

    def zero_grad(self) -> None:
        """Clear every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def n_parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.size for parameter in self.parameters())


def _parameter(values: numpy.ndarray, device: str, dtype: str) -> Parameter:
    return Parameter(get_backend(device).asarray(values, dtype=check_parameter_dtype(dtype)))


class Linear(Module):
    """y = x W + b, W (n_in, n_out). The default initialisation is normal(0, 1 / sqrt(n_in)), the bias 0."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        bias: bool = True,
        init: Initializer | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ):
        init = init or normal_init(1 / math.sqrt(n_in))
        self.weight = _parameter(init((n_in, n_out)), device, dtype)
        self.bias = _parameter(zeros_init((n_out,)), device, dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Normalises the last axis of length n, then y = weight xhat + bias; weight starts at 1, bias at 0."""

    def __init__(self, n: int, eps: float = 1e-5, device: str = "cpu", dtype: str = "float32"):
        self.weight = _parameter(numpy.ones(n), device, dtype)
        self.bias = _parameter(zeros_init((n,)), device, dtype)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layernorm(x, self.weight, self.bias, self.eps)

    def add_and_normalize(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """s = x + delta and layernorm(s), fused."""
        return ops.add_layernorm(x, delta, self.weight, self.bias, self.eps)


class Embedding(Module):
    """A table of n rows of the given width; the default initialisation is normal(0, 0.02)."""

    def __init__(
        self, n: int, width: int, init: Initializer | None = None, device: str = "cpu", dtype: str = "float32"
    ):
        init = init or normal_init(0.02)
        self.weight = _parameter(init((n, width)), device, dtype)

    def __call__(self, tokens: Any) -> Tensor:
        return ops.embedding(tokens, self.weight)


class RMSNorm(Module):
    """y = weight x / sqrt(mean(x^2) + eps) over the last axis of length n; weight starts at 1 (arXiv:1910.07467)."""

    def __init__(self, n: int, eps: float = 1e-5, device: str = "cpu", dtype: str = "float32"):
        self.weight = _parameter(numpy.ones(n), device, dtype)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rmsnorm(x, self.weight, self.eps)


class ReLU(Module):
    """max(x, 0)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


class GELU(Module):
    """GELU in its tanh form, which GPT-2 uses, or with `exact` with the error function (arXiv:1606.08415)."""

    def __init__(self, exact: bool = False):
        self.exact = exact

    def __call__(self, x: Tensor) -> Tensor:
        return ops.gelu(x, exact=self.exact)


class SiLU(Module):
    """x sigmoid(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.silu()


class Dropout(Module):
    """With a key, each element is 0 with probability `rate`, else divided by 1 - rate; without, the input itself."""

    sites = 1  # how many streams of random numbers a module draws from

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout: the rate is {rate}; expected 0 <= rate < 1")
        self.rate = rate

    def __call__(self, x: Tensor, key: random.Key | None = None) -> Tensor:
        return ops.dropout(x, self.rate, key)


class Sequential(Module):
    """The layers one after the other. A key, given to train, is passed to each Dropout, at a site of its own."""

    def __init__(self, *layers: Callable[..., Tensor]):
        self.layers = list(layers)

    @property
    def sites(self) -> int:
        """How many Dropouts there are."""
        return sum(getattr(layer, "sites", 0) for layer in self.layers)

    def __call__(self, x: Tensor, key: random.Key | None = None) -> Tensor:
        for layer in self.layers:
            sites = getattr(layer, "sites", 0)
            x = layer(x, key) if sites else layer(x)
            key = key.at(key.site + sites) if key is not None else None
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> Callable[..., Tensor]:
        return self.layers[i]
