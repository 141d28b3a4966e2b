"""Parameters, and the arena that stores them in flat buffers."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy
from ml_dtypes import bfloat16
from numpy.typing import DTypeLike

from tinygrad2.arguments import numpy_array, of_numpy
from tinygrad2.array import Array
from tinygrad2.autograd import Leaf, is_recording
from tinygrad2.backend import Backend, backend_of
from tinygrad2.distributed import Comm, Staging
from tinygrad2.tensor import Tensor, form_of, gradient_array

BUCKET_SIZE = 1 << 22  # maximum number of elements that ranks transfer at once, unless a single parameter has more


class Parameter(Tensor):
    """A tensor that an optimizer updates: always a leaf.

    Assigning to `.data` or `.grad` copies into the parameter's memory (assigning None to `.grad` clears it), so a
    parameter never leaves its arena. Tensor operators and methods use the data.

    copy  the dtype of a copy that is kept in sync with the data, or None. Layers with activations of that dtype read
          the copy, while the optimizer adds its small updates to the data.

    A parameter whose data is bfloat16 has no gradient and can only be read inside no_grad().
    """

    __slots__ = ("_data", "_copy", "_arena")
    _is_parameter = True
    _data: Array

    def __init__(self, data: Array, copy: DTypeLike | None = None):
        self._copy: Array | None = None
        self._arena: weakref.ref[ParameterArena] | None = None
        super().__init__(data, requires_grad=True)
        self._copy = _rounded(self._data, copy)

    @property
    def _leaf(self) -> Leaf:
        assert self.leaf is not None  # a parameter is never a result
        return self.leaf

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, values: Any) -> None:
        if hasattr(self, "_data"):
            self._data[...] = self.checked("parameter: data", values)
            if self._copy is not None:
                self._copy[...] = self._data.astype(self._copy.dtype)
            self.mark_written()
        else:
            self._data = values

    @property
    def copy_dtype(self) -> numpy.dtype | None:
        """The dtype of the copy, or None if there is none."""
        return None if self._copy is None else self._copy.dtype

    def read_as(self, dtype: DTypeLike, what: str) -> Array:
        if self._copy is not None and self._copy.dtype == dtype:
            return self._copy
        if self._data.dtype == bfloat16 and self.ndim >= 2:
            if is_recording():
                raise TypeError(f"{what} is stored in bfloat16 only and has no gradient; compute inside no_grad()")
            return self._data
        return super().read_as(dtype, what)

    @property
    def grad(self) -> Any:
        return self._leaf.grad

    @grad.setter
    def grad(self, values: Any) -> None:
        if values is not None:
            values = gradient_array(values, self._leaf, "parameter: grad")
        if self._arena is not None:
            self._leaf.buffer()[...] = 0 if values is None else values
        else:
            self._leaf.grad = values

    @property
    def arena(self) -> ParameterArena | None:
        """The arena that contains the values and the gradient, or None."""
        return None if self._arena is None else self._arena()

    def _leave_arena(self) -> None:
        if self.arena is not None:
            self.arena.valid = False
        self._arena = None

    def mark_written(self) -> None:
        """Record that the values were changed in place. A backward pass that needs the old values then raises."""
        self._leaf.mark_written(*(array for array in (self._data, self._copy) if array is not None))

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        return _rebuild_parameter, (function, arguments, self.copy_dtype)

    def checked(self, what: str, values: Any) -> Array:
        """Convert values to an array of the parameter's shape. Raises TypeError or ValueError; messages start with
        `what`."""
        given = values.data if isinstance(values, Tensor) else of_numpy(values)
        array = backend_of(self._data).asarray(given if hasattr(given, "dtype") else numpy_array(what, given))
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise TypeError(f"{what} has dtype {array.dtype}; expected floats, integers or booleans")
        if array.shape != self._data.shape:
            raise ValueError(f"{what} has shape {array.shape}; expected {self._data.shape}, the parameter's shape")
        return array

    def convert(self, backend: Backend, dtype: DTypeLike, copy: DTypeLike | None) -> None:
        """Move the values to a backend and convert them to a dtype, with or without a copy in another dtype. The
        parameter leaves its arena. The gradient is moved too, but it is dropped if the dtype changes."""
        old, grad = backend_of(self._data), self._leaf.grad
        same, values = self._data.dtype == dtype, old.to_host(self._data)
        self._data = backend.asarray(values if same else values.astype(dtype))
        self._copy = _rounded(self._data, copy)
        self._leaf.forms = (form_of(self._data),)
        self._leaf.grad = backend.asarray(old.to_host(grad)) if same and grad is not None else None
        self._leave_arena()

    def place(self, arena: ParameterArena, data: Array, grad: Array, copy: Array | None = None) -> None:
        """Move the values to the memory `data`, `grad` and `copy` of an arena (views of the parameter's shape).

        copy  required if and only if the parameter has a copy.
        """
        data[...] = self._data
        if self._leaf.grad is not None:
            grad[...] = self._leaf.grad
        if copy is not None:
            copy[...] = self._copy
        self._data, self._copy, self._leaf.grad, self._arena = data, copy, grad, weakref.ref(arena)


def _rebuild_parameter(
    function: Callable[..., Parameter], arguments: tuple[Any, ...], copy: DTypeLike | None
) -> Parameter:
    """Recreate a pickled or copied parameter, outside any arena; see Parameter.__reduce__."""
    parameter = function(*arguments)
    parameter._copy = _rounded(parameter._data, copy)
    return parameter


def _rounded(data: Array, dtype: DTypeLike | None) -> Array | None:
    return None if dtype is None else data.astype(numpy.dtype(dtype))


@dataclass
class Region:
    """A flat buffer of the parameters with weight decay, or of the parameters without it.

    values, grads  1-D arrays.
    where          maps a parameter's name to its (start, stop) in both arrays.
    copies         the values in the dtype that layers read, kept in sync, or None.
    """

    name: str
    values: Array
    grads: Array
    where: dict[str, tuple[int, int]]
    copies: Array | None = None


@dataclass
class Bucket:
    """Elements start ... stop - 1 of a region, which ranks transfer at once, and the names of their parameters.

    staging  host memory for the transfer.
    """

    region: Region
    start: int
    stop: int
    names: list[str]
    staging: Staging = field(default_factory=Staging)


class HasParameters(Protocol):
    """The interface that an optimizer needs from a model; an nn.Module has it."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]: ...
    def arena(self) -> ParameterArena: ...


class ParameterList:
    """Parameters without a module, for an optimizer. Their names are their positions."""

    def __init__(self, parameters: Iterable[Parameter]):
        given = list(parameters) if isinstance(parameters, Iterable) else [parameters]
        self._parameters = list({id(parameter): parameter for parameter in given}.values())  # without duplicates
        for i, parameter in enumerate(self._parameters):
            if not isinstance(parameter, Parameter):
                raise TypeError(
                    f"optimizer: item {i} of the parameters has type {type(parameter).__name__}; expected a module, "
                    f"or an iterable of Parameters such as model.parameters()"
                )

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter, named by its position."""
        return ((f"{prefix}{i}", parameter) for i, parameter in enumerate(self._parameters))

    def arena(self) -> ParameterArena:
        """The arena that contains the parameters; the first call moves them there."""
        if not hasattr(self, "_arena") or not self._arena.valid:
            self._arena: ParameterArena = arena_of(self.named_parameters())
        return self._arena


def arena_of(named_parameters: Iterable[tuple[str, Parameter]]) -> ParameterArena:
    """The arena that already contains exactly these parameters, or a new one."""
    named = list(named_parameters)
    arena = named[0][1].arena if named else None
    if arena and arena.valid and {id(p) for p in arena.parameters.values()} == {id(p) for _, p in named}:
        return arena
    return ParameterArena(named)


class ParameterArena:
    """All parameters of a model in two flat regions: `decay` (matrices) and `no_decay` (biases and gains).

    Clearing the gradients takes one memset per region, the optimizer runs one kernel per region, and ranks sum
    consecutive gradients as one slice. Parameters are therefore in the order in which the backward pass finishes their
    gradients: the last registered parameter is finished first. An embedding that is tied to the output layer is
    registered first and finished last.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]]):
        backward_order = list(named_parameters)[::-1]
        if not backward_order:
            raise ValueError("ParameterArena: there are no parameters")
        for name, parameter in backward_order:
            if parameter.arena is not None:
                raise ValueError(
                    f"ParameterArena: {name} is in the arena of another module or optimizer, with other parameters; "
                    f"create one optimizer for all of them"
                )
        self.valid = True  # until a parameter leaves, for example to another device
        self.parameters = dict(backward_order)
        self.backend: Backend = backend_of(backward_order[0][1].data)
        self.dtype = backward_order[0][1].dtype
        self.copy_dtype = backward_order[0][1].copy_dtype
        for name, parameter in backward_order:
            if parameter.dtype != self.dtype:
                raise TypeError(f"ParameterArena: {name} is {parameter.dtype}, others are {self.dtype}; use one dtype")
            if parameter.copy_dtype != self.copy_dtype:
                raise TypeError(
                    f"ParameterArena: the copy of {name} has dtype {parameter.copy_dtype}, other copies "
                    f"{self.copy_dtype}; use one precision"
                )
        self.regions = [
            self._place("decay", [(name, p) for name, p in backward_order if p.ndim >= 2]),
            self._place("no_decay", [(name, p) for name, p in backward_order if p.ndim < 2]),
        ]

    def _place(self, region: str, members: list[tuple[str, Parameter]]) -> Region:
        where, stop = {}, 0
        for name, parameter in members:
            where[name] = (stop, stop + parameter.size)
            stop += parameter.size
        values, grads = self.backend.zeros((stop,), self.dtype), self.backend.zeros((stop,), self.dtype)
        copies = None if self.copy_dtype is None else self.backend.zeros((stop,), self.copy_dtype)
        for name, parameter in members:
            place, shape = slice(*where[name]), parameter.shape
            copy = None if copies is None else copies[place].reshape(shape)
            parameter.place(self, values[place].reshape(shape), grads[place].reshape(shape), copy)
        return Region(region, values, grads, where, copies)

    def zero_grad(self) -> None:
        """Clear every gradient."""
        for region in self.regions:
            self.backend.clear(region.grads)

    def mark_written(self) -> None:
        """Record that the values were changed in the flat buffers."""
        for parameter in self.parameters.values():
            parameter.mark_written()

    def refresh_copies(self) -> None:
        """Update the copies after the values were changed in the flat buffers."""
        for region in self.regions:
            if region.copies is not None:
                self.backend.convert(region.values, region.copies)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The regions divided into buckets, in the order in which the backward pass finishes them. Parameters are not
        split. A bucket has up to BUCKET_SIZE elements, or a single larger parameter."""
        buckets: list[Bucket] = []
        for region in self.regions:
            for name, (start, stop) in region.where.items():
                last = buckets[-1] if buckets else None
                if last and last.region is region and stop - last.start <= BUCKET_SIZE:
                    last.stop = stop
                    last.names.append(name)
                else:
                    buckets.append(Bucket(region, start, stop, [name]))
        order = {name: i for i, name in enumerate(self.parameters)}
        return sorted(buckets, key=lambda bucket: order[bucket.names[-1]])

    def check_equal(self, comm: Comm) -> None:
        """Raise ValueError naming the first parameter that is not bitwise equal on all ranks."""
        if comm.size == 1:
            return
        names = list(self.parameters)[::-1]  # in order of registration
        host = (self.backend.to_host(self.parameters[name].data) for name in names)
        checksums = comm.all_gather(numpy.array([zlib.crc32(numpy.asarray(values, order="C").data) for values in host]))
        differs = checksums != checksums[0]
        if differs.any():
            first = int(differs.any(axis=0).argmax())
            raise ValueError(
                f"the ranks have diverged: {names[first]} on rank {differs[:, first].argmax()} differs from rank 0 "
                f"(by checksum). The machines may differ, or one may be faulty; resume from a checkpoint"
            )
