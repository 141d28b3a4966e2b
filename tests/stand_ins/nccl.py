"""A stand-in for cupy.cuda.nccl on the arrays of strict_cupy.py, which computes sums and detects ordering errors.

The output of a call contains NaN until the compute stream has waited for an event that was recorded on the call's
stream after the call, so that reads that are too early are visible. RaceError is raised if
  - a call is launched on a stream that has not waited for the latest work on the compute stream;
  - memory is freed or written to (also by another call) while a call still uses it.
The calls in a group run when it ends. NcclError is raised for a group that was not ended or not started, and for memory
that does not belong to an array of the given type.

An `Exchange` provides the values of the other ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from unittest import mock

import numpy as np

from tests.stand_ins import strict_cupy
from tests.stand_ins.strict_cupy import POISON, RaceError, device

MODULE = f"{strict_cupy.library.__name__}.cuda.nccl"  # where the stand-in's CudaBackend looks for it


class Exchange(Protocol):
    """Communication between the ranks. All ranks call every method, in the same order."""

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over the ranks."""

    def from_root(self, values: np.ndarray, root: int) -> np.ndarray:
        """The value of the rank `root`."""


class Echo:
    """All ranks have the same values."""

    def __init__(self, size: int = 2):
        self.size = size

    def total(self, values: np.ndarray) -> np.ndarray:
        return self.size * values

    def from_root(self, values: np.ndarray, root: int) -> np.ndarray:
        return values


class Ranks:
    """The ranks of an MPI communicator that is not used for anything else."""

    def __init__(self, comm: Any):
        self.comm = comm

    def total(self, values: np.ndarray) -> np.ndarray:
        result = np.empty_like(values)
        self.comm.Allreduce(values, result)
        return result

    def from_root(self, values: np.ndarray, root: int) -> np.ndarray:
        result = values.copy()
        self.comm.Bcast(result, root)
        return result


class NcclError(RuntimeError):
    """A call that NCCL rejects, or that would hang."""


class NCCL:
    """The module. `calls` lists the names of the calls that were launched."""

    available = True
    NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8
    NcclError = NcclError

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self.calls: list[str] = []
        self.group: list[Callable[[], None]] | None = None
        self.NcclCommunicator = partial(NcclCommunicator, self)

    def get_unique_id(self) -> bytes:
        return bytes(128)

    def groupStart(self) -> None:
        if self.group is not None:
            raise NcclError("groupStart: the previous group was not ended")
        self.group = []

    def groupEnd(self) -> None:
        if self.group is None:
            raise NcclError("groupEnd: no group was started")
        group, self.group = self.group, None
        for call in group:
            call()


class NcclCommunicator:
    def __init__(self, nccl: NCCL, ndev: int, commId: bytes, rank: int):
        if not (isinstance(commId, bytes) and len(commId) == 128 and 0 <= rank < ndev):
            raise NcclError("NcclCommunicator: expected an id of 128 bytes and a rank below the number of ranks")
        self._nccl, self._size, self._rank = nccl, ndev, rank

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int, /) -> None:
        self._sum("allReduce", sendbuf, recvbuf, count, datatype, op, None, stream)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int, /) -> None:
        self._sum("reduce", sendbuf, recvbuf, count, datatype, op, root, stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int, /) -> None:
        exchange = partial(self._nccl.exchange.from_root, root=root)
        self._call("bcast", buff, count, datatype, root, root != self._rank, exchange, stream)

    def _sum(self, name: str, send: int, receive: int, count: int, kind: int, op: int, root: Any, stream: int) -> None:
        if send != receive or op != self._nccl.NCCL_SUM:
            raise NcclError(f"{name}: the stand-in supports only in-place sums")
        self._call(name, send, count, kind, root, root in (None, self._rank), self._nccl.exchange.total, stream)

    def _call(
        self,
        name: str,
        pointer: int,
        count: int,
        kind: int,
        root: int | None,
        writes: bool,
        exchange: Callable[[np.ndarray], np.ndarray],
        stream: int,
    ) -> None:
        if root is not None and not 0 <= root < self._size:
            raise NcclError(f"{name}: root is {root}; expected 0 to {self._size - 1}")
        dtype = {self._nccl.NCCL_FLOAT32: np.dtype("float32"), self._nccl.NCCL_FLOAT64: np.dtype("float64")}[kind]
        launch = partial(self._launch, name, pointer, count, dtype, writes, exchange, stream)
        if self._nccl.group is None:
            launch()
        else:
            self._nccl.group.append(launch)

    def _launch(
        self,
        name: str,
        pointer: int,
        count: int,
        dtype: np.dtype,
        writes: bool,
        exchange: Callable[[np.ndarray], np.ndarray],
        number: int,
    ) -> None:
        stream = device.streams[number]
        self._nccl.calls.append(name)
        if stream.others_seen != device.launches:
            raise RaceError(f"{name}: its stream has not waited for the preceding computations")
        if count == 0:
            exchange(np.empty(0, dtype))
            return
        owner = device.owner(pointer, count * dtype.itemsize)
        if owner is None or owner().dtype != dtype:
            raise NcclError(f"{name}: expected {count} elements of {dtype} in one array")
        memory = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), np.uint8)
        values = memory.view(dtype).copy()
        result = exchange(values)
        if writes:
            memory[:] = POISON
        before = memory.tobytes()

        def complete() -> None:
            if owner() is None:
                raise RaceError(f"{name}: memory was freed before the compute stream had waited for the call")
            if memory.tobytes() != before:
                raise RaceError(f"{name}: memory was written to while the call used it")
            if writes:
                memory.view(dtype)[:] = result

        device.launch_beside(stream, complete)


@contextmanager
def installed(exchange: Exchange, address: str = "0000:00:00.0") -> Iterator[NCCL]:
    """Inside this context, the stand-in for CuPy provides this NCCL and a GPU with this address."""
    nccl = NCCL(exchange)
    runtime = strict_cupy.Library.cuda.runtime
    with (
        mock.patch.dict("sys.modules", {MODULE: nccl}),
        mock.patch.object(runtime, "deviceGetPCIBusId", return_value=address),
    ):
        yield nccl
