"""The base class of the optimizers: gradient clipping, skipped steps, and state, which can be sharded over ranks."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy

from tinygrad2 import missing_names
from tinygrad2.array import Array
from tinygrad2.distributed import Comm, all_gather, share
from tinygrad2.params import Bucket, HasParameters, Parameter, ParameterArena, ParameterList, Region


@dataclass
class Part:
    """Elements start ... stop - 1 of a region, which this rank updates, and the state arrays of these elements."""

    region: Region
    start: int
    stop: int
    state_names: tuple[str, ...]
    state: tuple[Array, ...]

    @property
    def values(self) -> Array:
        return self.region.values[self.start : self.stop]

    @property
    def grads(self) -> Array:
        return self.region.grads[self.start : self.stop]


class Optimizer(ABC):
    """Updates the parameters of a model. A subclass implements the update rule: `state_names` and `update`.

    model         a module, or an iterable of parameters such as `model.parameters()`.
    lr            learning rate; it may be changed between steps.
    weight_decay  applied to matrices (parameters with two or more axes), not to biases and gains.
    shared_by     the ranks that shard the state. Each rank stores the state of its share of every bucket and updates
                  that share; the ranks then gather the new values (ZeRO stage 1, arXiv:1910.02054). All of them must
                  call `step`, `state` and `load_state`.

    The state consists of flat arrays in arena order.
    """

    def __init__(
        self, model: HasParameters | Iterable[Parameter], lr: float, weight_decay: float, shared_by: Comm | None = None
    ):
        is_module = hasattr(model, "named_parameters")
        self.model: HasParameters = cast(HasParameters, model) if is_module else ParameterList(cast(Any, model))
        self.lr, self.weight_decay, self.shared_by = lr, weight_decay, shared_by
        self._arena = self.model.arena()
        self._steps = self._zeros(1)  # on the device, where it is decided whether a step is skipped
        self.parts = [
            Part(region, start, stop, names, tuple(self._zeros(stop - start) for _ in names))
            for region, start, stop, names in self._runs()
        ]

    @abstractmethod
    def state_names(self, parameter: str) -> tuple[str, ...]:
        """The names of the state arrays of this parameter."""

    @abstractmethod
    def update(self, part: Part, scale: Array, lr: Array, step: Array) -> None:
        """Update the values and the state of a part in place. Its gradients are multiplied by `scale`.

        scale, lr and step (from 1) are 0-d arrays on the device. If scale is NaN, the step is skipped: no value and
        no state may change.
        """

    def _require(self, name: str, value: Any, valid: bool) -> None:
        if not valid:
            raise ValueError(f"{type(self).__name__}: {name} is {value}, out of range")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("lr", "weight_decay"):
            self._require_number(name, value, math.isfinite)
        super().__setattr__(name, value)

    def _require_number(self, name: str, value: Any, valid: Callable[[Any], bool]) -> None:
        if not isinstance(value, int | float | numpy.number):
            raise TypeError(f"{type(self).__name__}: {name} is {value!r}; expected a number")
        self._require(name, value, bool(value >= 0 and valid(value)))

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            raise missing_names.missing(type(self).__name__, name, missing_names.OPTIMIZER)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: create one for the copy of the model, and call its "
            f"load_state(optimizer.state(), optimizer.steps)"
        )

    @property
    def arena(self) -> ParameterArena:
        """The model's flat buffers. If the model has moved to another device, the state is moved too."""
        arena = self.model.arena()
        if arena is not self._arena:
            old, self._arena = self._arena.backend, arena
            self._steps = arena.backend.asarray(old.to_host(self._steps), arena.dtype)
            for part, (region, *_) in zip(self.parts, self._runs(), strict=True):
                part.region = region
                part.state = tuple(arena.backend.asarray(old.to_host(array), arena.dtype) for array in part.state)
        return arena

    @property
    def kernels(self) -> Any:
        """The kernels for the device of the parameters."""
        return self._arena.backend.kernels

    def _zeros(self, n: int) -> Array:
        return self._arena.backend.zeros((n,), self._arena.dtype)

    def _runs(self) -> Iterator[tuple[Region, int, int, tuple[str, ...]]]:
        """Yield (region, start, stop, state names) of each part. Parts are the regions, or this rank's shares of the
        buckets, split between parameters whose state names differ."""
        regions = [(region, 0, len(region.values)) for region in self._arena.regions]
        for region, first, last in regions if self.shared_by is None else self._shares(self.shared_by):
            for names, members in groupby(region.where.items(), key=lambda item: self.state_names(item[0])):
                bounds = [bound for _, bounds in members for bound in bounds]
                start, stop = max(first, bounds[0]), min(last, bounds[-1])
                if start < stop:
                    yield region, start, stop, names

    def _shares(self, comm: Comm) -> Iterator[tuple[Region, int, int]]:
        for bucket in self._arena.buckets:
            start, stop = share(bucket.stop - bucket.start, comm.rank, comm.size)
            yield bucket.region, bucket.start + start, bucket.start + stop

    def decay_of(self, part: Part) -> float:
        """The weight decay of a part: 0 for biases and gains."""
        return self.weight_decay if part.region.name == "decay" else 0.0

    def zero_grad(self) -> None:
        """Clear every gradient."""
        self.arena.zero_grad()

    @property
    def steps(self) -> int:
        """The number of steps so far, excluding skipped ones. Reading it waits for the device."""
        return int(self.arena.backend.to_host(self._steps)[0])

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps[...] = count

    def grad_norm(self) -> Array:
        """The Euclidean norm of all gradients together, as a 0-d array."""
        backend = self.arena.backend
        squares = [backend.kernels.squared_norm(part.grads) for part in self.parts]
        with numpy.errstate(over="ignore"):  # norm() uses a sum that has not overflowed
            total = reduce(operator.add, squares or [self._zeros(3)])
        if self.shared_by is not None:
            if nccl := self.shared_by.nccl(backend):
                nccl.start_sum(total)
                nccl.join()
            else:
                gathered = self.shared_by.all_gather(backend.to_host(total))
                total = backend.asarray(gathered.sum(axis=0))
        return backend.kernels.norm(total)

    def step(self, max_norm: float | None = None, loss: Array | float | None = None) -> Array:
        """Update every parameter once. Returns the norm of the gradients before clipping, a 0-d array.

        max_norm  clip the gradients to this global norm (arXiv:1211.5063). The scaling is part of the update; the
                  gradients themselves are not modified.
        loss      the loss (a number or a 0-d array), which is then also checked to be finite.
        If the norm or the loss is not finite, the step is skipped: parameters and state do not change, and `steps` does
        not count it. This is decided on the device; the host does not wait for the norm.
        """
        if max_norm is not None:
            self._require_number("max_norm", max_norm, lambda value: True)
        arena = self.arena
        np = arena.backend.np
        norm = self.grad_norm()
        one, nan = (np.full((), value, dtype=arena.dtype) for value in (1, math.nan))
        scale = one if max_norm is None else np.minimum(max_norm / (norm + 1e-6), one)
        finite = np.isfinite(norm) if loss is None else np.isfinite(norm) & np.isfinite(loss)
        step = self._steps + one
        lr = arena.backend.upload(numpy.array([self.lr], arena.dtype))
        self.update_all(np.where(finite, scale, nan), lr[0], step[0])
        self._steps = np.where(finite, step, self._steps)
        arena.refresh_copies()
        arena.mark_written()
        return norm

    def update_all(self, scale: Array, lr: Array, step: Array) -> None:
        """Update all parts, and gather the values that other ranks have updated."""
        for part in self.parts:
            self.update(part, scale, lr, step)
        self.gather_values(self._arena.buckets)

    def gather_values(self, buckets: list[Bucket]) -> None:
        """If the state is sharded, get the values in these buckets that other ranks have updated."""
        if self.shared_by is not None:
            values = [(bucket.region.values[bucket.start : bucket.stop], bucket.staging) for bucket in buckets]
            all_gather(self.shared_by, self._arena.backend, values)

    def state(self) -> dict[str, numpy.ndarray]:
        """The state arrays on the host, by name, such as `exp_avg.NAME`. `steps` is not included.

        If the state is sharded, rank 0 gets all of it, and the other ranks get an empty dictionary.
        """
        arena, arrays = self.arena, {}
        for kind in dict.fromkeys(name for parameter in arena.parameters for name in self.state_names(parameter)):
            for region in arena.regions:
                for start, flat in self._gathered(region, kind):
                    for name, (first, last) in region.where.items():
                        if kind in self.state_names(name) and start <= first and last <= start + len(flat):
                            values = flat[first - start : last - start]
                            arrays[f"{kind}.{name}"] = values.reshape(arena.parameters[name].shape)
        return arrays

    def _gathered(self, region: Region, kind: str) -> Iterator[tuple[int, numpy.ndarray]]:
        """Yield (start, flat host array) of a state array, without splitting parameters. Only on rank 0."""
        to_host = self._arena.backend.to_host
        parts = [part for part in self.parts if part.region is region and kind in part.state_names]
        states = [(part, part.state[part.state_names.index(kind)]) for part in parts]
        if self.shared_by is None:
            yield from ((part.start, to_host(state)) for part, state in states)
            return
        comm, dtype = self.shared_by, self._arena.dtype
        whole = numpy.zeros(len(region.values), dtype) if comm.rank == 0 else None
        for bucket in self._arena.buckets:
            if bucket.region is region:
                first, last = (
                    bucket.start + bound for bound in share(bucket.stop - bucket.start, comm.rank, comm.size)
                )
                own = numpy.zeros(last - first, dtype)
                for part, state in states:
                    if first <= part.start and part.stop <= last:
                        own[part.start - first : part.stop - first] = to_host(state)
                comm.gather_shares(own, None if whole is None else whole[bucket.start : bucket.stop])
        if whole is not None:
            yield 0, whole

    def load_state(self, arrays: dict[str, numpy.ndarray], steps: int) -> None:
        """Load what `state()` returned. Raises ValueError naming a missing, unexpected or wrongly shaped array."""
        arena = self.arena
        shapes = {f"{kind}.{name}": p.shape for name, p in arena.parameters.items() for kind in self.state_names(name)}
        for name in sorted(shapes.keys() ^ arrays.keys()):
            raise ValueError(f"optimizer state: {name} is {'missing' if name in shapes else 'unexpected'}")
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"optimizer state: {name} has shape {arrays[name].shape}; expected {shape}")
        for part in self.parts:
            for name, (start, stop) in part.region.where.items():
                first, last = max(part.start, start), min(part.stop, stop)  # this parameter's range in this part
                for kind, state in zip(part.state_names, part.state, strict=True):
                    if first < last:
                        values = arrays[f"{kind}.{name}"].reshape(-1)[first - start : last - start]
                        state[first - part.start : last - part.start] = arena.backend.asarray(values, dtype=arena.dtype)
        self.steps = steps
