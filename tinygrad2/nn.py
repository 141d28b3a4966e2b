"""Modules: they hold parameters and call operations on them. The operations are in ops.py, the math in reference.py."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy

from tinygrad2 import ops, random
from tinygrad2.backend import get_backend
from tinygrad2.params import Parameter, ParameterArena
from tinygrad2.precision import check_parameter_dtype
from tinygrad2.tensor import Tensor

Initializer = Callable[[tuple[int, ...]], numpy.ndarray]


@dataclass(frozen=True)
class _NormalInit:
    std: float
    key: random.Key
    movable: bool  # to another site

    def __call__(self, shape: tuple[int, ...]) -> numpy.ndarray:
        return random.normal(self.key, shape, self.std)


class _Construction(threading.local):
    """The module that is being constructed in this thread: the sites at which its layers draw, in order."""

    sites: Iterator[int] | None = None


_construction = _Construction()


def normal_init(std: float, key: random.Key | None = None) -> Initializer:
    """Initial values from normal(0, std). Without a key they are drawn from seed 0, at a site of the layer's own in its
    model: they depend on the structure of the model alone, not on what was constructed before."""
    if key is not None:
        return _NormalInit(std, key, False)
    site = random.LAYER_SITES if _construction.sites is None else next(_construction.sites)
    return _NormalInit(std, random.Key(0, site=site), True)


def zeros_init(shape: tuple[int, ...]) -> numpy.ndarray:
    """Initial values of 0: for biases, and for weights that are about to be loaded."""
    return numpy.zeros(shape, dtype=numpy.float32)


class _ModuleType(type):
    """Numbers the layers of a module by the order of their construction, and then those that were passed to it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if _construction.sites is not None:  # part of a module
            return super().__call__(*args, **kwargs)
        _construction.sites = sites = itertools.count(random.LAYER_SITES)
        try:
            module = super().__call__(*args, **kwargs)
            module._separate_sites(sites)
            return module
        finally:
            _construction.sites = None


class Module(metaclass=_ModuleType):
    """Holds parameters, modules and lists of modules as attributes; their names are the paths to them."""

    def _separate_sites(self, sites: Iterator[int]) -> None:
        """Draw the initial values again, at a free site, of layers that drew at the site of an earlier layer: they were
        constructed apart from each other. Values that were changed in the meantime stay."""
        layers = [layer for layer in _modules(self) if getattr(vars(layer).get("init"), "movable", False)]
        occupied = {layer.init.key.site for layer in layers}
        seen: set[int] = set()
        for layer in layers:
            init, weight = layer.init, layer.weight
            if init.key.site in seen:
                layer.init = replace(init, key=init.key.at(next(site for site in sites if site not in occupied)))
                initial = init(weight.shape).astype(weight.dtype)
                if numpy.array_equal(weight.backend.to_host(weight.data), initial):
                    weight.data = layer.init(weight.shape)
            seen.add(layer.init.key.site)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter under its dotted name, such as `h.0.attn.c_attn.weight`, in the order of registration."""
        seen: set[int] = set()
        for name, parameter in _named(prefix, vars(self)):
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


def _named(prefix: str, members: dict[str, Any]) -> Iterator[tuple[str, Parameter]]:
    for name, value in members.items():
        if isinstance(value, Parameter):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module):
            yield from _named(f"{prefix}{name}.", vars(value))
        elif isinstance(value, list):
            yield from _named(f"{prefix}{name}.", {str(i): item for i, item in enumerate(value)})


def _modules(module: Module) -> Iterator[Any]:
    """The module and all modules in it, each once."""
    found: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, Module) and id(value) not in found:
            found[id(value)] = value
            visit(list(vars(value).values()))

    visit(module)
    return iter(found.values())


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
        self.init = init or normal_init(1 / math.sqrt(n_in))
        self.weight = _parameter(self.init((n_in, n_out)), device, dtype)
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
        self.init = init or normal_init(0.02)
        self.weight = _parameter(self.init((n, width)), device, dtype)

    def __call__(self, tokens: Any) -> Tensor:
        return ops.embedding(tokens, self.weight)
