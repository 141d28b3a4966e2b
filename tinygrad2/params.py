"""Parameters, and the arena that keeps them in flat buffers."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy
from ml_dtypes import bfloat16

from tinygrad2.array import Array
from tinygrad2.autograd import Leaf
from tinygrad2.backend import Backend, backend_of
from tinygrad2.distributed import Comm, Staging
from tinygrad2.tensor import Tensor, form_of

BUCKET_SIZE = 1 << 22  # elements that ranks transfer at a time, where a parameter has no more


class Parameter(Tensor):
    """A tensor that an optimizer updates: always a leaf.

    Assigning to `.data` and `.grad` copies into the parameter's memory (and assigning None to `.grad` clears it), so
    that a parameter never leaves the arena it was placed in.

    copy  hold a bfloat16 copy of the data, kept equal to it: operations read the copy (see `compute`), while the
          optimizer adds its small updates to the data, in float32.
    """

    __slots__ = ("_data", "_copy", "_placed")
    _data: Array

    def __init__(self, data: Array, copy: bool = False):
        self._copy: Array | None = None
        self._placed = False
        super().__init__(data, requires_grad=True)
        if copy:
            self.hold_copy()

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
            self._data[...] = self._checked("data", values)
            if self._copy is not None:
                self._copy[...] = self._data.astype(bfloat16)
        else:
            self._data = values

    @property
    def compute(self) -> Array:
        return self._data if self._copy is None else self._copy

    @property
    def has_copy(self) -> bool:
        """Whether a bfloat16 copy is held."""
        return self._copy is not None

    def hold_copy(self) -> None:
        """Hold a bfloat16 copy from now on. The parameter leaves its arena."""
        self._copy, self._placed = self._data.astype(bfloat16), False

    @property
    def grad(self) -> Any:
        return self._leaf.grad

    @grad.setter
    def grad(self, values: Any) -> None:
        if values is not None:
            values = self._checked("grad", values)
        if self._placed:
            self._leaf.buffer()[...] = 0 if values is None else values
        else:
            self._leaf.grad = values

    def _checked(self, name: str, values: Any) -> Array:
        values = values.data if isinstance(values, Tensor) else backend_of(self._data).asarray(values)
        if values.shape != self._data.shape:
            raise ValueError(f"parameter: {name} of shape {values.shape} assigned; expected {self._data.shape}")
        return values

    def move(self, backend: Backend) -> None:
        """Move to another backend, with the gradient. The parameter leaves its arena.

        A bfloat16 copy is dropped: the new device may not need one.
        """
        old, grad = backend_of(self._data), self._leaf.grad
        self._data, self._copy = backend.asarray(old.to_host(self._data)), None
        self._leaf.forms = (form_of(self._data),)
        self._leaf.grad = None if grad is None else backend.asarray(old.to_host(grad))
        self._placed = False

    def narrow(self) -> None:
        """Hold the values in bfloat16, in half the memory. The parameter can then only be read, and has no gradient."""
        host = backend_of(self._data).to_host(self._data)
        self._data, self._copy, self._leaf.grad, self._placed = host.astype(bfloat16), None, None, False

    def place(self, data: Array, grad: Array, copy: Array | None = None) -> None:
        """Move the values to the memory `data`, `grad` and `copy` (views of the parameter's shape).

        copy  given exactly where the parameter holds a copy.
        """
        data[...] = self._data
        if self._leaf.grad is not None:
            grad[...] = self._leaf.grad
        if copy is not None:
            copy[...] = self._copy
        self._data, self._copy, self._leaf.grad, self._placed = data, copy, grad, True


@dataclass
class Region:
    """A flat buffer of the parameters with weight decay, or of those without.

    values and grads are 1-D arrays; `where` maps a parameter's name to its (start, stop) in both.
    copies  the values in bfloat16, kept equal to them, or None.
    """

    name: str
    values: Array
    grads: Array
    where: dict[str, tuple[int, int]]
    copies: Array | None = None


@dataclass
class Bucket:
    """The elements start ... stop - 1 of a region, which ranks transfer at a time, and the names of its parameters.

    staging  host memory for the transfer.
    """

    region: Region
    start: int
    stop: int
    names: list[str]
    staging: Staging = field(default_factory=Staging)


class HasParameters(Protocol):
    """What an optimizer asks of a model; a nn.Module has it."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]: ...
    def arena(self) -> ParameterArena: ...


class ParameterArena:
    """All parameters of a model in two flat regions: `decay` (matrices) and `no_decay` (biases and gains).

    Clearing the gradients is one memset per region, the optimizer one kernel per region, and ranks sum any run of
    final gradients as one slice. For that, parameters stand in the order in which the backward pass finishes their
    gradients: the last registered is the first to be final. An embedding that is tied to the output layer is registered
    first and final last.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]]):
        backward_order = list(named_parameters)[::-1]
        if not backward_order:
            raise ValueError("ParameterArena: there are no parameters")
        self.parameters = dict(backward_order)
        self.backend: Backend = backend_of(backward_order[0][1].data)
        self.dtype = backward_order[0][1].dtype
        self.has_copies = backward_order[0][1].has_copy
        for name, parameter in backward_order:
            if parameter.dtype != self.dtype:
                raise TypeError(f"ParameterArena: {name} is {parameter.dtype}, others are {self.dtype}; use one dtype")
            if parameter.has_copy != self.has_copies:
                raise TypeError(
                    f"ParameterArena: some parameters hold a bfloat16 copy and some not; {name} differs from the first"
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
        copies = self.backend.zeros((stop,), bfloat16) if self.has_copies else None
        for name, parameter in members:
            place, shape = slice(*where[name]), parameter.shape
            copy = None if copies is None else copies[place].reshape(shape)
            parameter.place(values[place].reshape(shape), grads[place].reshape(shape), copy)
        return Region(region, values, grads, where, copies)

    def zero_grad(self) -> None:
        """Clear every gradient."""
        for region in self.regions:
            region.grads[...] = 0

    def refresh_copies(self) -> None:
        """Round the values to the bfloat16 copies again, after they were changed in the flat buffers."""
        for region in self.regions:
            if region.copies is not None:
                region.copies[...] = region.values.astype(bfloat16)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The regions in runs of whole parameters, in the order in which the backward pass finishes them. A run has up
        to BUCKET_SIZE elements; a larger parameter is a bucket of its own."""
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
        names = list(self.parameters)[::-1]  # as they were registered
        host = (self.backend.to_host(self.parameters[name].data) for name in names)
        checksums = comm.all_gather(numpy.array([zlib.crc32(numpy.asarray(values, order="C").data) for values in host]))
        differs = checksums != checksums[0]
        if differs.any():
            first = int(differs.any(axis=0).argmax())
            raise ValueError(
                f"the ranks have diverged: {names[first]} on rank {differs[:, first].argmax()} differs from rank 0, by "
                f"its checksum. The machines may differ, or one may be faulty; resume from a checkpoint"
            )
