"""Modules, which combine parameters and operations. The operations are in ops.py, and their math is in reference.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy

from tinygrad2 import functional, missing_names, ops, random
from tinygrad2.backend import Backend, get_backend
from tinygrad2.initializers import Initializer, ModuleType, normal_init, zeros_init
from tinygrad2.params import Parameter, ParameterArena, arena_of
from tinygrad2.precision import Precision, PrecisionLike
from tinygrad2.state import State, modules_in, parameters_in
from tinygrad2.tensor import Tensor


class Module(State, metaclass=ModuleType):
    """The base class. Parameters and modules are attributes, or in lists, tuples and dicts. Their names are paths."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its dotted name, such as `h.0.attn.c_attn.weight`, in order of registration."""
        seen: set[int] = set()
        for name, parameter in parameters_in(self, prefix):
            if id(parameter) not in seen:  # a shared parameter appears once, under its first name
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in order of registration."""
        return (parameter for _, parameter in self.named_parameters())

    def arena(self) -> ParameterArena:
        """The flat buffers that contain the parameters; the first call moves the parameters into them."""
        if "_arena" not in vars(self) or not self._arena.valid:
            self._arena: ParameterArena = arena_of(self.named_parameters())
        return self._arena

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Raises TypeError when replacing a parameter by another type, or one that is in an arena."""
        old = vars(self).get(name)
        if isinstance(old, Parameter) and old is not value:
            if value is not None and not isinstance(value, Parameter):
                raise TypeError(
                    f"{type(self).__name__}.{name} is a parameter, and {type(value).__name__} is not; copy the values "
                    f"into it: module.{name}.data = values"
                )
            if old.arena is not None:
                raise TypeError(
                    f"{type(self).__name__}.{name} belongs to an optimizer, which would not see the new parameter; "
                    f"copy the values into it, or replace it before you create the optimizer"
                )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle, without the arena (copied parameters get a new one) or the initializer (which
        may be a lambda)."""
        return {name: value for name, value in vars(self).items() if name not in ("_arena", "init")}

    def modules(self) -> Iterator[Module]:
        """This module and all modules in it."""
        yield self
        yield from modules_in(self)

    def unsupported_reason(self, backend: Backend, precision: Precision) -> str | None:
        """Why this module does not support a precision on a device; None if it does."""
        return backend.unsupported_reason(precision)

    def to(self, device: str | None = None, precision: PrecisionLike | None = None) -> Self:
        """Move all parameters and gradients to "cpu" or "cuda", or change the precision of all layers, or both.

        Values are rounded to the new dtype, and copies are recreated if the precision uses them. Gradients whose dtype
        changes are dropped. The state of an optimizer is moved automatically. Returns the module.
        Raises ValueError, and changes nothing, if the device does not support the precision.
        """
        target = None if device is None else get_backend(device)
        wanted = None if precision is None else Precision.of(precision)
        parameters, layers = list(self.parameters()), [m for m in self.modules() if hasattr(m, "precision")]
        for backend in [target] if target else {p.backend for p in parameters}:
            for layer in layers:
                if reason := layer.unsupported_reason(backend, wanted or layer.precision):
                    raise ValueError(
                        f"{type(layer).__name__}: {reason}; also pass another precision, as in to('cpu', 'float32')"
                    )
        if wanted is not None:
            for layer in layers:
                layer.precision = wanted
        for p in parameters:
            backend = target or p.backend
            dtype, copy = (wanted.dtype_of(p.ndim), wanted.copies) if wanted else (p.dtype, p.copy_dtype)
            if (p.backend, p.dtype, p.copy_dtype) != (backend, dtype, copy):
                p.convert(backend, dtype, copy)
                vars(self).pop("_arena", None)
        return self

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters():
            parameter.grad = None

    def n_parameters(self) -> int:
        """The total number of elements in all parameters."""
        return sum(parameter.size for parameter in self.parameters())


class Layer(Module):
    """A module with its own parameters.

    device     the device of the parameters: "cpu", "cuda", or "auto" (a GPU if there is one).
    precision  a Precision, or the name of one. The input must have the dtype of its activations.
    """

    def __init__(self, device: str, precision: PrecisionLike):
        self.precision = Precision.of(precision)
        if reason := self.unsupported_reason(get_backend(device), self.precision):
            raise ValueError(f"{type(self).__name__}: {reason}")

    def _width(self, name: str, n: Any) -> int:
        """The length of an axis of a parameter. Raises TypeError or ValueError for anything but an integer >= 0."""
        if not hasattr(n, "__index__"):
            raise TypeError(f"{type(self).__name__}: {name} is {n!r}; expected an integer")
        if n < 0:
            raise ValueError(f"{type(self).__name__}: {name} is {n}; expected 0 or more")
        return int(n)

    def _parameter(self, values: numpy.ndarray, device: str) -> Parameter:
        dtype = self.precision.dtype_of(values.ndim)
        return Parameter(get_backend(device).asarray(values, dtype=dtype), copy=self.precision.copies)


class Linear(Layer):
    """y = x W + b: x (..., n_in) -> (..., n_out), W (n_in, n_out). By default W ~ normal(0, 1 / sqrt(n_in)), b = 0."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        bias: bool = True,
        init: Initializer | None = None,
        device: str = "cpu",
        precision: PrecisionLike = "float32",
    ):
        super().__init__(device, precision)
        n_in, n_out = self._width("n_in", n_in), self._width("n_out", n_out)
        self.init = init or normal_init(1 / math.sqrt(n_in or 1))
        self.weight = self._parameter(self.init((n_in, n_out)), device)
        self.bias = self._parameter(zeros_init((n_out,)), device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, tf32=self.precision.tf32)


class LayerNorm(Layer):
    """y = weight xhat + bias, where xhat is x (..., n) normalized over the last axis. weight starts at 1, bias at 0."""

    def __init__(self, n: int, eps: float = 1e-5, device: str = "cpu", precision: PrecisionLike = "float32"):
        super().__init__(device, precision)
        self.weight = self._parameter(numpy.ones(self._width("n", n)), device)
        self.bias = self._parameter(zeros_init((n,)), device)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layernorm(x, self.weight, self.bias, self.eps)

    def add_and_normalize(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """s = x + delta and layernorm(s), fused."""
        return ops.add_layernorm(x, delta, self.weight, self.bias, self.eps)


class Embedding(Layer):
    """Looks up tokens (...) in a table (n, width) -> (..., width). By default the table ~ normal(0, 0.02)."""

    def __init__(
        self,
        n: int,
        width: int,
        init: Initializer | None = None,
        device: str = "cpu",
        precision: PrecisionLike = "float32",
    ):
        super().__init__(device, precision)
        n, width = self._width("n", n), self._width("width", width)
        self.init = init or normal_init(0.02)
        self.weight = self._parameter(self.init((n, width)), device)

    def __call__(self, tokens: Any) -> Tensor:
        return ops.embedding(tokens, self.weight, dtype=self.precision.activations)


class RMSNorm(Layer):
    """y = weight x / sqrt(mean(x^2) + eps) over the last axis, of length n (arXiv:1910.07467). Initially weight = 1."""

    def __init__(self, n: int, eps: float = 1e-5, device: str = "cpu", precision: PrecisionLike = "float32"):
        super().__init__(device, precision)
        self.weight = self._parameter(numpy.ones(self._width("n", n)), device)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rmsnorm(x, self.weight, self.eps)


class ReLU(Module):
    """max(x, 0)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


class GELU(Module):
    """GELU in the tanh form, as in GPT-2, or, if `exact`, with the error function (arXiv:1606.08415)."""

    def __init__(self, exact: bool = False):
        self.exact = exact

    def __call__(self, x: Tensor) -> Tensor:
        return ops.gelu(x, exact=self.exact)


class SiLU(Module):
    """x sigmoid(x)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.silu()


class Dropout(Module):
    """Sets elements to 0 with probability `rate` and divides the others by 1 - rate. Without a key, the identity."""

    sites = 1  # the number of random streams that a module uses

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout: the rate is {rate}; expected 0 <= rate < 1")
        self.rate = rate

    def __call__(self, x: Tensor, key: random.Key | None = None) -> Tensor:
        return ops.dropout(x, self.rate, key)


class Sequential(Module):
    """Applies layers in order. In training, pass a key; each Dropout layer receives it with a site of its own."""

    def __init__(self, *layers: Callable[..., Tensor]):
        self.layers = list(layers)
        for i, layer in enumerate(layers):
            if not callable(layer):
                raise TypeError(
                    f"Sequential: layer {i} has type {type(layer).__name__}; expected a module or a function of one "
                    f"argument"
                )

    @property
    def sites(self) -> int:
        """The number of Dropout layers."""
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


if not TYPE_CHECKING:  # so that type checkers report misspelled names
    __getattr__ = missing_names.of_module("tinygrad2.nn", missing_names.LAYERS)
