"""Find the first non-finite value in a forward and backward pass: its tensor, operation and layer.

    checker = Checker(model)
    checker.run(lambda: model.loss(tokens, targets).backward())
    print(checker.first)

All results and gradients are checked through `tracing`, so passes outside `run` are not slowed down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy

from tinygrad2.array import Array
from tinygrad2.autograd import Leaf, no_grad
from tinygrad2.backend import backend_of
from tinygrad2.params import HasParameters
from tinygrad2.precision import sum_dtype
from tinygrad2.tensor import Tensor
from tinygrad2.tracer import BackwardOperation, Operation, tracing

LARGE = 2.0**64  # its square overflows in float32 and bfloat16
CHUNK = 1 << 22  # elements checked at a time, to limit the memory that the check needs


@dataclass(frozen=True)
class Place:
    """The first bad value in a tensor.

    phase      "forward" or "backward"; "" if a parameter was checked outside a pass.
    operation  the name of the operation, such as "linear"; "" outside a pass.
    layer      the module whose parameters the operation reads, such as "h.2.mlp.c_fc"; "after h.2.attn.c_attn" for an
               operation without parameters that follows that module; "" if there is none.
    tensor     the role of the tensor in the operation, such as "its result" or "parameter h.2.mlp.c_fc.weight".
    parameter  the name of the parameter, if the tensor is a parameter; else "".
    shape      the shape of the tensor.
    index      the index of the first bad value.
    value      the first bad value.
    bad        the number of bad values.
    """

    phase: str
    operation: str
    layer: str
    tensor: str
    parameter: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    value: float
    bad: int

    @property
    def finite(self) -> bool:
        """Whether the bad values are finite, but larger than LARGE."""
        return math.isfinite(self.value)

    @property
    def fraction(self) -> float:
        """The fraction of the tensor's values that are bad."""
        return self.bad / math.prod(self.shape)

    def __str__(self) -> str:
        position = f"[{', '.join(map(str, self.index))}] is " if self.index else ""
        more = f" ({self.bad:,} of {math.prod(self.shape):,} values)" if self.shape else ""
        where = f"{self.operation} {_where(self.layer)}, {self.phase} pass: " if self.operation else ""
        return f"{where}{self.tensor}{' ' if self.index else ' is '}{position}{self.value:.7g}{more}"


class _FoundError(Exception):
    """Raised to stop a pass at the first non-finite value."""


class Checker:
    """Checks everything that is computed in `run`.

    first  the first tensor with a non-finite value, or None.
    large  the first tensor with a finite value larger than LARGE, which can cause an overflow later, or None.
    """

    def __init__(self, model: HasParameters):
        self.first: Place | None = None
        self.large: Place | None = None
        named = list(model.named_parameters())
        self._parameters = {id(parameter): name for name, parameter in named}
        self._leaves = {id(parameter.leaf): name for name, parameter in named}
        self._operations: dict[Any, tuple[str, str]] = {}  # node -> the name of the operation, and its layer
        self._layer = ""

    @property
    def origin(self) -> Place | None:
        """The likely origin of the first non-finite value: the first value that is too large, if there is one."""
        return self.large or self.first

    def run(self, function: Callable[[], object]) -> bool:
        """Call the function, and stop at the first value that is not finite. Returns whether all values are finite."""
        with suppress(_FoundError), numpy.errstate(all="ignore"), tracing(self._forward, self._backward):
            function()
        self._operations.clear()
        return self.first is None

    def _forward(self, operation: Operation) -> None:
        names = [self._parameters.get(id(parent), "") for parent in operation.parents]
        layers = list(dict.fromkeys(name.rpartition(".")[0] or "the model" for name in names if name))
        if layers:
            self._layer = " and ".join(layers)
        layer = self._layer if layers else self._layer and f"after {self._layer}"
        for result in operation.results:
            if result._edge is not None:
                self._operations[result._edge[0]] = operation.name, layer
        if all(self._harmless(result.data) for result in operation.results):
            return
        inputs = [
            (f"parameter {name}" if name else f"its input {i}", name, parent.data)
            for i, (parent, name) in enumerate(zip(operation.parents, names, strict=True))
        ]
        single = len(operation.results) == 1
        results = [("its result" if single else f"its result {i}", "", r.data) for i, r in enumerate(operation.results)]
        self._note("forward", operation.name, layer, [*inputs, *results])

    def _backward(self, operation: BackwardOperation) -> None:
        pairs = zip(operation.edges, operation.gradients, strict=True)
        gradients = [(i, edge[0], dx) for i, (edge, dx) in enumerate(pairs) if edge is not None and dx is not None]
        if all(self._harmless(dx) for _, _, dx in gradients):
            return
        names = [self._leaves.get(id(target), "") if isinstance(target, Leaf) else "" for _, target, _ in gradients]
        tensors = []
        for (i, target, dx), name in zip(gradients, names, strict=True):
            source, layer = self._operations.get(target, ("", ""))
            result = f"the result of {source} {_where(layer)}" if source else f"its input {i}"
            tensors.append((f"the gradient of {name or result}", "", dx))
        self._note("backward", operation.name, self._operations.get(operation.node, ("", ""))[1], tensors)

    def _harmless(self, x: Array) -> bool:
        size = largest(x)
        return size <= LARGE or (math.isfinite(size) and self.large is not None)

    def _note(self, phase: str, operation: str, layer: str, tensors: list[tuple[str, str, Array]]) -> None:
        """Set `first` or `large` to the first tensor of an operation that has bad values."""
        for finite in (True, False):
            if finite and self.large is not None:
                continue
            for tensor, parameter, x in tensors:
                if found := _locate(x, finite):
                    place = Place(phase, operation, layer, tensor, parameter, tuple(x.shape), *found)
                    if finite:
                        self.large = place
                        break
                    self.first = place
                    raise _FoundError


def bad_parameters(model: HasParameters) -> Iterator[Place]:
    """The parameters with values that are not finite or are larger than LARGE."""
    for name, parameter in model.named_parameters():
        if not largest(parameter.data) <= LARGE:
            found = _locate(parameter.data, finite=False) or _locate(parameter.data, finite=True)
            assert found is not None
            yield Place("", "", "", f"parameter {name}", name, tuple(parameter.shape), *found)


def damage(model: HasParameters, function: Callable[[], object] | None = None) -> str:
    """A clause for error messages that explains why a model's results are not finite: its first damaged parameter or,
    if there is none, the first bad value that is computed when the function is called."""
    place = next(bad_parameters(model), None)
    if place is not None:
        return f"its weights are damaged: {place}"
    checker = Checker(model)
    if function is not None:
        with no_grad():
            checker.run(function)
    return f"its weights are finite; the first bad value: {checker.origin or 'could not be reproduced'}"


def largest(x: Array | Tensor) -> float:
    """The largest absolute value. NaN or infinity if the array contains one; 0 for integers and empty arrays."""
    values: Array = x.data if isinstance(x, Tensor) else x
    if values.dtype.kind in "biu" or not values.size:
        return 0.0
    flat, backend, size = values.reshape(-1), backend_of(values), 0.0
    for first in range(0, flat.size, CHUNK):
        part = flat[first : first + CHUNK].astype(sum_dtype(values.dtype), copy=False)
        found = max(
            abs(float(backend.to_host(part.min()))), abs(float(backend.to_host(part.max())))
        )  # both NaN, or none
        if not math.isfinite(found):
            return found
        size = max(size, found)
    return size


def _locate(x: Array, finite: bool) -> tuple[tuple[int, ...], float, int] | None:
    """The index and the value of the first non-finite value, and the number of such values; None if there are none. If
    `finite`, search for finite values larger than LARGE instead."""
    if x.dtype.kind in "biu":
        return None
    flat, backend = x.reshape(-1), backend_of(x)
    index, value, count = 0, 0.0, 0
    for first in range(0, flat.size, CHUNK):
        part = backend.to_host(flat[first : first + CHUNK]).astype(numpy.float64)
        bad = numpy.isfinite(part) & (abs(part) > LARGE) if finite else ~numpy.isfinite(part)
        if not count and bad.any():
            index, value = first + int(bad.argmax()), float(part[bad.argmax()])
        count += int(bad.sum())
    return (tuple(map(int, numpy.unravel_index(index, x.shape))), value, count) if count else None


def _where(layer: str) -> str:
    return layer if layer.startswith("after ") else f"in {layer}" if layer else "at the start"
