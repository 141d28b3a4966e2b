"""Sums the gradients of all ranks, bucket by bucket, while the backward pass is still running."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy

from tinygrad2.array import Array
from tinygrad2.distributed import Comm, HostTransfer, NcclComm
from tinygrad2.params import HasParameters


class GradientSum:
    """Sums the gradients over the ranks. The transfer of a bucket starts as soon as its gradients are final.

    Call `start()` before the last backward pass of a step, and `finish()` after it; earlier passes accumulate in the
    same buffers. A bucket is transferred while the pass computes the following ones. Transfers start in the same order
    on every rank. Buckets that are not complete when the pass ends (since a parameter is unused) start in `finish`.

    share_only  for a sharded optimizer: each rank needs only the sum of its own share of every bucket.

    The backward pass raises RuntimeError if a parameter gets a gradient after it was reported as final. This happens if
    the parameter is used both inside and outside a recomputed function. Do not call `start` for such a model.
    """

    def __init__(self, model: HasParameters, comm: Comm, share_only: bool = False):
        self.model, self.comm, self.share_only = model, comm, share_only
        self._missing: list[set[str]] = []  # per bucket, the parameters whose gradients are not final yet
        self._started = 0  # number of buckets whose transfer has started
        self._transfers: list[HostTransfer] = []  # the transfers through host memory
        self._nccl = comm.nccl(model.arena().backend)

    def start(self) -> None:
        """From now on, transfer each bucket as soon as it is final."""
        if self.comm.size > 1:
            arena = self.model.arena()
            self._nccl = self.comm.nccl(arena.backend)
            self._missing = [set(bucket.names) for bucket in arena.buckets]
            for name, parameter in arena.parameters.items():
                assert parameter.leaf is not None
                parameter.leaf.on_final = partial(self._on_final, name)

    def _on_final(self, name: str) -> None:
        if any(name in bucket.names for bucket in self.model.arena().buckets[: self._started]):
            raise RuntimeError(
                f"GradientSum: {name} got a gradient after its sum had started, since it is used both inside and "
                f"outside a recomputed function; do not call start() for this model"
            )
        for missing in self._missing:
            missing.discard(name)
        while self._started < len(self._missing) and not self._missing[self._started]:
            self._start_next()

    def _start_next(self) -> None:
        arena = self.model.arena()
        bucket = arena.buckets[self._started]
        grads = bucket.region.grads[bucket.start : bucket.stop]
        if self._nccl:
            self._nccl.start_sum(grads, self.share_only)
        else:
            start = partial(self.comm.start_sum, share_only=self.share_only)
            self._transfers.append(HostTransfer(arena.backend, grads, bucket.staging, start))
        self._started += 1

    def finish(self, *numbers: Array | float) -> list[Any]:
        """Wait until the gradients are summed. Returns the sums over the ranks of these numbers, such as the loss.

        With NCCL, the host does not wait, and the sum of 0-d GPU arrays is a 0-d GPU array.
        """
        if self.comm.size == 1:
            return list(numbers)
        arena = self.model.arena()
        self._nccl = self.comm.nccl(arena.backend)
        for parameter in arena.parameters.values():
            assert parameter.leaf is not None
            parameter.leaf.on_final = None
        while self._started < len(arena.buckets):
            self._start_next()
        self._started = 0
        if self._nccl:
            return self._finish_on_gpu(self._nccl, numbers)
        own = numpy.array(arena.backend.fetch(*numbers).get())
        self._transfers[-1].wait_for_device()
        with self.comm.waiting():
            totals = self.comm.all_gather(own).sum(axis=0)
            for transfer in self._transfers:
                transfer.finish()
        self._transfers.clear()
        return totals.tolist()

    def _finish_on_gpu(self, nccl: NcclComm, numbers: tuple[Array | float, ...]) -> list[Any]:
        backend = self.model.arena().backend
        totals: list[Any] = list(numbers)
        on_gpu = [i for i, number in enumerate(numbers) if isinstance(number, backend.np.ndarray)]
        on_host = [i for i in range(len(numbers)) if i not in on_gpu]
        if on_gpu:
            stacked = backend.np.stack([numbers[i] for i in on_gpu])
            nccl.start_sum(stacked)
            for position, i in enumerate(on_gpu):
                totals[i] = stacked[position]
        nccl.join()
        if on_host:
            with self.comm.waiting():
                sums = self.comm.all_gather(numpy.array([float(numbers[i]) for i in on_host])).sum(axis=0)
            for i, total in zip(on_host, sums.tolist(), strict=True):
                totals[i] = total
        return totals
