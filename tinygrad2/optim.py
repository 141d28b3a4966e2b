"""AdamW on flat buffers, clipping by the global norm, learning-rate schedules, and gradients summed over ranks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial, reduce
from typing import Any

import numpy

from tinygrad2.distributed import Comm, NcclComm, share
from tinygrad2.nn import Module
from tinygrad2.params import Bucket, ParameterArena, Region


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2), on every parameter of `model`.

    Weight decay acts on matrices only (parameters of two or more axes), not on biases and gains. The moments are flat
    arrays in the order of the model's arena. `lr` may be changed from step to step.

    shared_by  ranks that share the moments out: each keeps those of its share of every bucket and updates that, and
               the ranks then send each other the new values (ZeRO, stage 1: arXiv:1910.02054). `step`, `state` and
               `load_state` are then called by all of them.
    """

    def __init__(
        self,
        model: Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        shared_by: Comm | None = None,
    ):
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise ValueError(f"AdamW: {name} is {value}, out of range")
        self.model = model
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0  # how many have been made
        self.shared_by = shared_by
        self._arena = model.arena()
        zeros, dtype = self._arena.backend.zeros, self._arena.dtype
        self.moments = [(zeros((b - a,), dtype), zeros((b - a,), dtype)) for _, a, b in self._parts()]

    @property
    def arena(self) -> ParameterArena:
        """The model's flat buffers; where the model has moved to another device, the moments follow it."""
        arena = self.model.arena()
        if arena is not self._arena:
            there, here = self._arena.backend, arena.backend
            self.moments = [(here.asarray(there.to_host(m)), here.asarray(there.to_host(v))) for m, v in self.moments]
            self._arena = arena
        return arena

    def _parts(self) -> list[tuple[Region, int, int]]:
        """(region, start, stop) of what is updated here: the whole regions, or this rank's share of every bucket."""
        if self.shared_by is None:
            return [(region, 0, len(region.values)) for region in self._arena.regions]
        return [_share_of(bucket, self.shared_by) for bucket in self._arena.buckets]

    def zero_grad(self) -> None:
        """Clear every gradient."""
        self.arena.zero_grad()

    def grad_norm(self) -> Any:
        """The Euclidean norm of all gradients together, as a 0-d array."""
        backend = self.arena.backend
        squares = [backend.kernels.squared_norm(region.grads[a:b]) for region, a, b in self._parts()]
        square = reduce(operator.add, squares)
        if self.shared_by is not None:
            if direct := self.shared_by.nccl(backend):
                direct.start_sum(square.reshape(1))
                direct.join()
            else:
                shared = self.shared_by.all_gather(backend.to_host(square))
                square = backend.asarray(shared.sum(), dtype=self.arena.dtype)
        return backend.np.sqrt(square)

    def step(self, max_norm: float | None = None) -> Any:
        """Update every parameter once; returns the norm of the gradients before clipping, a 0-d array.

        max_norm  scale the gradients down to this global norm where theirs is larger (arXiv:1211.5063), folded into the
                  update. The gradients themselves stay as they are.
        Where the norm is not finite, no parameter and no moment is changed: a NaN never reaches them. That is decided
        on the device, without the host waiting for the norm; `steps` counts the step all the same.
        """
        arena = self.arena
        np, kernels = arena.backend.np, arena.backend.kernels
        norm = self.grad_norm()
        one, nan = (np.full((), value, dtype=arena.dtype) for value in (1, math.nan))
        scale = one if max_norm is None else np.minimum(max_norm / (norm + 1e-6), one)
        scale = np.where(np.isfinite(norm), scale, nan)
        self.steps += 1
        numbers = arena.backend.upload(numpy.array([self.lr, self.steps], arena.dtype))
        lr, step = numbers[0], numbers[1]
        for (region, a, b), (m, v) in zip(self._parts(), self.moments, strict=True):
            decay = self.weight_decay if region.name == "decay" else 0.0
            values, grads = region.values[a:b], region.grads[a:b]
            kernels.adamw_step(values, grads, m, v, scale, lr, *self.betas, self.eps, decay, step)
        if self.shared_by is not None:
            self._exchange_values(self.shared_by)
        arena.refresh_copies()
        return norm

    def _exchange_values(self, ranks: Comm) -> None:
        """Give the other ranks the values that were updated here, and take theirs."""
        arena = self.arena
        if direct := ranks.nccl(arena.backend):
            for bucket in arena.buckets:
                direct.start_all_gather(bucket.region.values[bucket.start : bucket.stop])
            direct.join()
            return
        sent = [_Sent(arena, bucket, "values", ranks.start_all_gather) for bucket in arena.buckets]
        with ranks.waiting():
            for part in sent:
                part.finish()

    def state(self) -> dict[str, numpy.ndarray]:
        """The moments by parameter name (`exp_avg.NAME`, `exp_avg_sq.NAME`), on the host; `steps` is kept beside it.

        Where they are shared out, rank 0 gets all of them, and the others nothing.
        """
        arrays = {}
        for i, kind in enumerate(("exp_avg", "exp_avg_sq")):
            parts = [self.arena.backend.to_host(moments[i]) for moments in self.moments]
            for region, flat in self._whole(parts):
                for name, (start, stop) in region.where.items():
                    arrays[f"{kind}.{name}"] = flat[start:stop].reshape(self._arena.parameters[name].shape)
        return arrays

    def _whole(self, parts: list[numpy.ndarray]) -> list[tuple[Region, numpy.ndarray]]:
        """What was put together from every rank's parts, by region; nothing on other ranks than 0."""
        comm, arena = self.shared_by, self._arena
        if comm is None:
            return list(zip(arena.regions, parts, strict=True))
        whole = {r.name: numpy.empty(r.values.shape, arena.dtype) for r in arena.regions if comm.rank == 0}
        for bucket, part in zip(arena.buckets, parts, strict=True):
            into = whole[bucket.region.name][bucket.start : bucket.stop] if whole else None
            comm.gather_shares(part, into)
        return [(region, whole[region.name]) for region in arena.regions if whole]

    def load_state(self, arrays: dict[str, numpy.ndarray], steps: int) -> None:
        """Take over what `state()` gave. Raises ValueError naming a missing, surplus or wrongly shaped array."""
        arena, kinds = self.arena, ("exp_avg", "exp_avg_sq")
        expected = {f"{kind}.{name}": p.shape for kind in kinds for name, p in arena.parameters.items()}
        for name in sorted(expected.keys() ^ arrays.keys()):
            raise ValueError(f"optimizer state: {name} is {'missing' if name in expected else 'not one of the model'}")
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(f"optimizer state: {name} has shape {arrays[name].shape}; expected {shape}")
        for (region, a, b), moments in zip(self._parts(), self.moments, strict=True):
            for name, (start, stop) in region.where.items():
                first, last = max(a, start), min(b, stop)  # what of this parameter lies in the part
                for kind, flat in zip(kinds, moments, strict=True):
                    if first < last:
                        values = arrays[f"{kind}.{name}"].reshape(-1)[first - start : last - start]
                        flat[first - a : last - a] = arena.backend.asarray(values, dtype=arena.dtype)
        self.steps = steps


class GradientSum:
    """Adds up the gradients of all ranks, each bucket as soon as the backward pass is done with it.

    Between `start()` and `finish()` one backward pass runs, the last of a step: what earlier ones have summed up is in
    the same buffers. A bucket is on its way while the pass computes the next ones. Buckets start in the same order on
    every rank; one that the pass has not finished (a parameter that was not used) starts in `finish`.

    share_only  the optimizer has its moments shared out: each rank gets the sum of its own share of every bucket only.

    The backward pass raises RuntimeError where a parameter gets a gradient after it was announced as final: one that is
    used both in a function that `recompute` runs again and outside of it. Leave `start` out for such a model.
    """

    def __init__(self, model: Module, comm: Comm, share_only: bool = False):
        self.model, self.comm, self.share_only = model, comm, share_only
        self._missing: list[set[str]] = []  # for each bucket, the parameters that are not final yet
        self._sent: list[_Sent | None] = []  # None: from GPU to GPU
        self._direct = comm.nccl(model.arena().backend)

    def start(self) -> None:
        """From here on a bucket is sent off as soon as it is final."""
        if self.comm.size > 1:
            arena = self.model.arena()
            self._direct = self.comm.nccl(arena.backend)
            self._missing = [set(bucket.names) for bucket in arena.buckets]
            for name, parameter in arena.parameters.items():
                assert parameter.leaf is not None
                parameter.leaf.on_final = partial(self._final, name)

    def _final(self, name: str) -> None:
        if any(name in bucket.names for bucket in self.model.arena().buckets[: len(self._sent)]):
            raise RuntimeError(
                f"GradientSum: {name} got a gradient after its sum had begun: it is used in a recomputed function and "
                f"outside of it; leave out start() for this model"
            )
        for missing in self._missing:
            missing.discard(name)
        while len(self._sent) < len(self._missing) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        arena = self.model.arena()
        bucket = arena.buckets[len(self._sent)]
        if self._direct:
            self._direct.start_sum(bucket.region.grads[bucket.start : bucket.stop], self.share_only)
            self._sent.append(None)
        else:
            start = partial(self.comm.start_sum, share_only=self.share_only)
            self._sent.append(_Sent(arena, bucket, "grads", start))

    def finish(self, *numbers: Any) -> list[Any]:
        """Wait until the gradients are summed; returns the sums over the ranks of these numbers, such as the loss.

        Where sums go from GPU to GPU, the host does not wait, and the sum of a 0-d array is one on the GPU.
        """
        if self.comm.size == 1:
            return list(numbers)
        arena = self.model.arena()
        self._direct = self.comm.nccl(arena.backend)
        for parameter in arena.parameters.values():
            assert parameter.leaf is not None
            parameter.leaf.on_final = None
        while len(self._sent) < len(arena.buckets):
            self._send()
        if self._direct:
            self._sent.clear()
            return self._finish_on_gpu(self._direct, numbers)
        own = numpy.array(arena.backend.fetch(*numbers).get())
        sent = [part for part in self._sent if part is not None]
        sent[-1].ready()
        with self.comm.waiting():
            totals = self.comm.all_gather(own).sum(axis=0)
            for part in sent:
                part.finish()
        self._sent.clear()
        return totals.tolist()

    def _finish_on_gpu(self, direct: NcclComm, numbers: tuple[Any, ...]) -> list[Any]:
        backend = self.model.arena().backend
        totals = list(numbers)
        there = [i for i, number in enumerate(numbers) if isinstance(number, backend.np.ndarray)]
        here = [i for i in range(len(numbers)) if i not in there]
        if there:
            stacked = backend.np.stack([numbers[i] for i in there])
            direct.start_sum(stacked)
            for place, i in enumerate(there):
                totals[i] = stacked[place]
        direct.join()
        if here:
            with self.comm.waiting():
                sums = self.comm.all_gather(numpy.array([float(numbers[i]) for i in here])).sum(axis=0)
            for i, total in zip(here, sums.tolist(), strict=True):
                totals[i] = total
        return totals


class _Sent:
    """A bucket on its way to the other ranks, and back."""

    def __init__(self, arena: ParameterArena, bucket: Bucket, kind: str, start: Callable[..., Future[None]]):
        self.backend = arena.backend
        self.array = getattr(bucket.region, kind)[bucket.start : bucket.stop]
        self.host = bucket.host = self.backend.staging(self.array, bucket.host)
        self.ready = self.backend.download(self.array, self.host)
        self.future = start(self.host, after=self.ready)

    def finish(self) -> None:
        self.future.result()
        self.backend.put_back(self.host, self.array)


def _share_of(bucket: Bucket, comm: Comm) -> tuple[Region, int, int]:
    """(region, start, stop) of the part of a bucket that is this rank's own."""
    start, stop = share(bucket.stop - bucket.start, comm.rank, comm.size)
    return bucket.region, bucket.start + start, bucket.start + stop


def constant(step: int, *, lr: float, warmup: int = 0) -> float:
    """lr, after a linear warm-up: lr (step + 1) / warmup while step < warmup. Steps count from 0."""
    return lr * (step + 1) / warmup if step < warmup else lr


def linear(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then a straight line from lr at `warmup` to min_lr at `decay_steps`, and min_lr from there."""
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * (1 - _progress(step, warmup, decay_steps))


def cosine(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then half a cosine from lr at `warmup` to min_lr at `decay_steps`, and min_lr from there.

    lr(step) = min_lr + (lr - min_lr) (1 + cos(pi p)) / 2, p the progress from 0 to 1.
    Source: arXiv:1608.03983, eq. 5.
    """
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, decay_steps)))


def _progress(step: int, warmup: int, decay_steps: int) -> float:
    return min(1.0, (step - warmup) / (decay_steps - warmup)) if decay_steps > warmup else 1.0
