"""Data-parallel training of one model by several processes: the ranks of an MPI job, or a single process.

Every rank has a copy of the parameters and computes the gradients for its own part of each batch. Ranks communicate
through a `Comm`. `world()` returns the one for this process; callers do not need to know the number of ranks.

The all-reduce is implemented here, as a reduce-scatter followed by an all-gather. Each rank receives all contributions
to its own share of a buffer, sums them in rank order, and sends the result to the others. This moves the minimum amount
of data, uses both directions of every link, and gives the same bits in every run with the same number of ranks and any
MPI library.

If a rank fails, the job ends. An uncaught exception is printed and aborts all ranks. A process that was killed or
suspended cannot report a failure. Therefore each rank sends heartbeats from a background thread, even during a long
step, checkpoint or compilation.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import numpy

from tinygrad2 import backend, threads
from tinygrad2.array import Array
from tinygrad2.backend import Backend
from tinygrad2.files import discard_stdout
from tinygrad2.machine import cores, install_command

T = TypeVar("T")

HEARTBEAT = 1.0  # seconds between heartbeats
TIMEOUT = 20.0  # seconds without a heartbeat after which a rank counts as dead
POLL = 5e-5  # seconds between polls of a transfer; MPI makes progress only when it is called
POLL_WHILE_COMPUTING = 2e-4  # the same, while the caller computes
RECEIVE_BUFFER = 16 << 20  # maximum size of the receive buffer of a sum, in bytes
ABORT_TIMEOUT = 5.0  # seconds to wait for an abort before the process exits anyway

# The environment variables that each launcher sets, in order of precedence: the number of ranks, and the rank of this
# process. mpirun inside a Slurm job step takes precedence over the step.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH and its derivatives
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # srun
)


class Comm(Protocol):
    """Communication between ranks. All ranks must call every method except `abort`, in the same order.

    rank        this rank, from 0 to size - 1.
    size        the number of ranks.
    waited      total seconds that the caller has spent waiting for other ranks, in `waiting()`.
    idle_cores  number of cores of this machine that the launcher may use but has not bound any rank to.
    """

    rank: int
    size: int
    waited: float
    idle_cores: int

    def from_root(self, function: Callable[[], T]) -> T:
        """Call function() on rank 0 once all ranks have reached this call, and broadcast its result to all of them.

        If it raises, rank 0 raises and the other ranks exit silently.
        """

    def all_gather(self, array: numpy.ndarray) -> numpy.ndarray:
        """Stack the arrays of all ranks, which have the same shape and dtype, in rank order: (size, *array.shape)."""

    def gather_shares(self, share: numpy.ndarray, whole: numpy.ndarray | None) -> None:
        """Gather the shares of all ranks into `whole`, a flat host array on rank 0. The other ranks pass None."""

    def start_sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> Future[None]:
        """Start summing a flat host array over the ranks, in place. If share_only, sum only this rank's share.

        after  is called first, in the background, and returns when the array is ready.
        """

    def start_all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> Future[None]:
        """Start an all-gather, in place, of a flat host array of which each rank has its own share."""

    def nccl(self, device: Backend) -> NcclComm | None:
        """GPU-to-GPU communication for arrays of this backend, or None if they are transferred through host memory.

        It is available if each rank has its own GPU and NCCL is installed. The first call is collective.
        """

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the caller only waits for operations already started. The time is added to `waited`."""
        yield

    def silence_other_ranks(self) -> None:
        """From now on, only rank 0 prints to standard output."""

    def abort(self, code: int) -> None:
        """End all ranks immediately, with this exit status. Returns only if there is a single rank."""


def share(n: int, rank: int, size: int) -> tuple[int, int]:
    """A rank's share (start, stop) of n elements. Shares are contiguous, in rank order, and of nearly equal size."""
    return n * rank // size, n * (rank + 1) // size


class Staging:
    """Host memory for transferring an array between its device and other ranks. It is reused in every step."""

    def __init__(self) -> None:
        self.host: numpy.ndarray | None = None


class HostTransfer:
    """The sum or all-gather of a flat array over the ranks, through host memory.

    start  Comm.start_sum or Comm.start_all_gather.
    """

    def __init__(self, device: Backend, array: Array, staging: Staging, start: Callable[..., Future[None]]):
        self._device, self._array = device, array
        self._host = staging.host = device.staging(array, staging.host)
        self.wait_for_device = device.download(array, self._host)
        self._future = start(self._host, after=self.wait_for_device)

    def finish(self) -> None:
        """Wait for the other ranks, and start copying the result back."""
        self._future.result()
        self._device.copy_back(self._host, self._array)


def all_gather(comm: Comm, device: Backend, arrays: Sequence[tuple[Array, Staging]]) -> None:
    """All-gather flat arrays on a device, in place. Each rank has its own share of each array."""
    if nccl := comm.nccl(device):
        for array, _ in arrays:
            nccl.start_all_gather(array)
        nccl.join()
        return
    transfers = [HostTransfer(device, array, staging, comm.start_all_gather) for array, staging in arrays]
    with comm.waiting():
        for transfer in transfers:
            transfer.finish()


class NcclComm:
    """GPU-to-GPU communication with NCCL, on a separate stream, so that it overlaps with computation.

    Every method launches an operation and returns; the host never waits. A transfer starts when all previously launched
    operations are done; an operation launched after `join` starts when all transfers are done.

    identity  the unique ID of this group of ranks, from rank 0's `nccl.get_unique_id()`.
    """

    def __init__(self, device: Backend, nccl: Any, rank: int, size: int, identity: Any):
        # By default, NCCL chooses the algorithm that it expects to be fastest. A reduction in the switch rounds
        # differently from a ring, so the algorithm is fixed.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        self.size = size
        assert device.cuda is not None
        self._cuda, self._event, self._nccl = device.np.cuda, device.cuda.event, nccl
        self._codes = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._communicator = nccl.NcclCommunicator(size, identity, rank)
        self._stream = device.np.cuda.Stream(non_blocking=True)
        self._in_flight: list[Array] = []  # references that prevent reuse of the memory

    def start_sum(self, flat: Array, share_only: bool = False) -> None:
        """Start summing a flat array over the ranks, in place. If share_only, sum only this rank's share."""
        pointer, code = self._begin(flat)
        add, stream = self._nccl.NCCL_SUM, self._stream.ptr
        if share_only:
            for root, (start, count) in enumerate(self._shares(flat)):
                self._communicator.reduce(pointer + start, pointer + start, count, code, add, root, stream)
        else:
            self._communicator.allReduce(pointer, pointer, flat.size, code, add, stream)
        self._nccl.groupEnd()

    def start_all_gather(self, flat: Array) -> None:
        """Start an all-gather, in place, of a flat array of which each rank has its own share."""
        pointer, code = self._begin(flat)
        for root, (start, count) in enumerate(self._shares(flat)):
            self._communicator.bcast(pointer + start, count, code, root, self._stream.ptr)
        self._nccl.groupEnd()

    def join(self) -> None:
        """Make the current stream wait for all transfers."""
        self._cuda.get_current_stream().wait_event(self._event(self._stream))
        self._in_flight.clear()  # from now on, stream order protects the memory from reuse

    def _begin(self, flat: Array) -> tuple[int, int]:
        self._stream.wait_event(self._event())
        self._in_flight.append(flat)
        self._nccl.groupStart()
        return flat.data.ptr, self._codes[flat.dtype.name]

    def _shares(self, flat: Array) -> Iterator[tuple[int, int]]:
        """Yield (offset in bytes, number of elements) of each rank's share."""
        for rank in range(self.size):
            start, stop = share(flat.size, rank, self.size)
            yield start * flat.itemsize, stop - start


class SoloComm:
    """A single process."""

    rank, size, waited, idle_cores = 0, 1, 0.0, 0

    def from_root(self, function: Callable[[], T]) -> T:
        return function()

    def all_gather(self, array: numpy.ndarray) -> numpy.ndarray:
        return array[None]

    def gather_shares(self, share: numpy.ndarray, whole: numpy.ndarray | None) -> None:
        assert whole is not None
        whole[...] = share

    def start_sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> Future[None]:
        return self.start_all_gather(flat, after)

    def start_all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> Future[None]:
        after()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def nccl(self, device: Backend) -> NcclComm | None:
        return None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def silence_other_ranks(self) -> None:
        pass

    def abort(self, code: int) -> None:
        pass


class MPIComm:
    """The ranks of an MPI job.

    Each thread has its own communicator, so that messages cannot be mixed up: `_calls` for operations that the caller
    waits for, `_bulk` for the thread that transfers gradients, and `_heartbeats`. No call blocks inside MPI, which
    would busy-wait; instead, a waiting thread polls the request and sleeps in between.
    """

    def __init__(self, MPI: Any):
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ValueError("MPI: this library does not support calls from several threads (MPI_THREAD_MULTIPLE)")
        self._in_place, self._any_source, self._status = MPI.IN_PLACE, MPI.ANY_SOURCE, MPI.Status
        world = MPI.COMM_WORLD
        self.rank, self.size, self.waited = world.rank, world.size, 0.0
        self._calls, self._bulk, self._heartbeats = world.Dup(), world.Dup(), world.Dup()
        machine = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = machine.rank
        masks = machine.allgather(cores())
        self.threads = fair_threads(masks, machine.rank)
        launcher = cores(os.getppid()) if "OMPI_COMM_WORLD_SIZE" in os.environ else set()
        self.idle_cores = len(launcher - set().union(*masks))
        self._received = numpy.empty(0, dtype=numpy.uint8)  # receive buffer for the contributions to a sum
        self._caller_waits = False
        self._nccl_comms: dict[Backend, NcclComm | None] = {}
        self._worker = ThreadPoolExecutor(1, "transfers")
        self._ending = threading.Event()
        self._monitor = threading.Thread(target=self._exchange_heartbeats, name="heartbeat", daemon=True)
        self._monitor.start()
        atexit.register(self._leave)  # this runs before mpi4py's own handler, which finalizes MPI

    def from_root(self, function: Callable[[], T]) -> T:
        error: BaseException | None = None
        result = None
        self._await(self._calls.Ibarrier(), POLL)
        if self.rank == 0:
            try:
                result = function()
            except BaseException as raised:
                error = raised
        self._await(self._calls.Ibarrier(), POLL)  # the other ranks sleep here instead of busy-waiting in bcast
        result, failed = self._calls.bcast((result, error is not None))
        if error is not None:
            raise error
        if failed:
            raise SystemExit(0)  # rank 0 reports the error and determines the exit status of the job
        return result

    def all_gather(self, array: numpy.ndarray) -> numpy.ndarray:
        together = numpy.empty((self.size, *array.shape), dtype=array.dtype)
        self._await(self._calls.Iallgather(numpy.asarray(array, order="C"), together), POLL)
        return together

    def gather_shares(self, share: numpy.ndarray, whole: numpy.ndarray | None) -> None:
        into = None if whole is None else [whole, self._layout(len(whole))]
        self._await(self._calls.Igatherv(share, into), POLL)

    def start_sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> Future[None]:
        return self._worker.submit(self._sum, flat, share_only, after)

    def start_all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> Future[None]:
        return self._worker.submit(self._all_gather, flat, after)

    def _sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> None:
        after()
        counts, starts = self._layout(len(flat))
        most = max(1, RECEIVE_BUFFER // (self.size * flat.itemsize))  # elements of a share per message
        for first in range(0, max(counts), most):
            lengths = [min(most, max(0, count - first)) for count in counts]
            begin = [start + min(first, count) for start, count in zip(starts, counts, strict=True)]
            self._sum_shares(flat, lengths, begin)
        if not share_only:
            self._all_gather(flat, lambda: None)

    def _sum_shares(self, flat: numpy.ndarray, counts: list[int], starts: list[int]) -> None:
        """Reduce-scatter: each rank computes the sum over all ranks of its counts[rank] elements from starts[rank]."""
        n, start = counts[self.rank], starts[self.rank]
        nbytes = self.size * n * flat.itemsize
        if self._received.nbytes < nbytes:
            self._received = numpy.empty(nbytes, dtype=numpy.uint8)
        received = self._received[:nbytes].view(flat.dtype)
        layout = ([n] * self.size, [n * rank for rank in range(self.size)])
        self._await(self._bulk.Ialltoallv([flat, (counts, starts)], [received, layout]))
        numpy.add.reduce(received.reshape(self.size, n), axis=0, out=flat[start : start + n])

    def _all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> None:
        after()
        self._await(self._bulk.Iallgatherv(self._in_place, [flat, self._layout(len(flat))]))

    def _layout(self, n: int) -> tuple[list[int], list[int]]:
        """Return (counts, starts) of the shares of n elements, as MPI expects them."""
        parts = [share(n, rank, self.size) for rank in range(self.size)]
        return [stop - start for start, stop in parts], [start for start, _ in parts]

    def _await(self, request: Any, pause: float | None = None) -> None:
        while not request.Test():
            time.sleep(pause or (POLL if self._caller_waits else POLL_WHILE_COMPUTING))

    def nccl(self, device: Backend) -> NcclComm | None:
        if device.cuda is None:
            return None
        if device not in self._nccl_comms:
            nccl, address = device.cuda.nccl(), f"{socket.gethostname()} {device.cuda.address()}"
            addresses = self._calls.allgather(address if nccl else None)
            if None not in addresses and len(set(addresses)) == self.size:
                identity = self._calls.bcast(nccl.get_unique_id() if self.rank == 0 else None)
                self._nccl_comms[device] = NcclComm(device, nccl, self.rank, self.size, identity)
            else:
                self._nccl_comms[device] = None
        return self._nccl_comms[device]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began, self._caller_waits = time.perf_counter(), True
        try:
            yield
        finally:
            self._caller_waits = False
            self.waited += time.perf_counter() - began

    def silence_other_ranks(self) -> None:
        if self.rank:
            discard_stdout()

    def abort(self, code: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        fallback = threading.Timer(ABORT_TIMEOUT, os._exit, (code,))
        fallback.daemon = True
        fallback.start()
        time.sleep(0.1)  # let mpirun read the output before it handles the abort
        self._calls.Abort(code)
        os._exit(code)

    def _exchange_heartbeats(self) -> None:
        """Send a heartbeat every second, and end the job if another rank's heartbeats stop.

        Rank 0 monitors every other rank, and each of them monitors rank 0. Time during which this process was suspended
        does not count, since the others may have been suspended too.
        """
        peers = range(1, self.size) if self.rank == 0 else range(1)
        heard = dict.fromkeys(peers, time.monotonic())
        awake = time.monotonic()
        while not self._ending.wait(HEARTBEAT):
            for peer in peers:
                self._heartbeats.Isend(b"", peer).Free()
            status = self._status()
            while self._heartbeats.Iprobe(self._any_source, status=status):
                self._heartbeats.Recv(bytearray(), status.source)
                heard[status.source] = time.monotonic()
            now = time.monotonic()
            if now - awake > TIMEOUT / 2:
                heard = dict.fromkeys(peers, now)
            awake = now
            for peer, last in heard.items():
                if now - last > TIMEOUT:
                    print(f"rank {peer} has not responded for {now - last:.0f} s; ending all ranks", file=sys.stderr)
                    self.abort(1)

    def _leave(self) -> None:
        """At exit, wait for the other ranks, which may still be writing a checkpoint; then stop the heartbeat."""
        self._await(self._calls.Ibarrier(), POLL)
        self._ending.set()
        self._monitor.join()


_world: Comm | None = None


def world() -> Comm:
    """The communicator of this process's job. Without a launcher, there is a single rank, and mpi4py is not imported.

    If there are several ranks, the first call sets up this rank: its share of the machine's cores, its own GPU, and a
    hook that ends the job if there is an uncaught exception.

    Raises ValueError if mpi4py is missing, or uses a different MPI library than the mpirun that started this process.
    """
    global _world
    if _world is None:
        size, rank = _launched()
        _world = SoloComm() if size == 1 else _join(size, rank)
    return _world


def _launched() -> tuple[int, int]:
    """Return (number of ranks, this rank), from the environment variables of the launcher."""
    for names in LAUNCHERS:
        size, rank = (os.environ.get(name, "") for name in names)
        if size.isdigit() and rank.isdigit():
            return int(size), int(rank)
    return 1, 0


def _join(size: int, rank: int) -> MPIComm:
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about a different mpirun, which is reported below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"rank {rank} of {size}: mpi4py does not work ({error}); {install_command('mpi')}") from None
    if MPI.COMM_WORLD.size != size:
        if rank:
            raise SystemExit(1)  # every process sees a job with one rank; the first one reports it
        library = MPI.Get_library_version().split(",")[0]
        if not any(os.environ.get(name) for name, _ in LAUNCHERS[:-1]):
            raise ValueError(
                f"Slurm's step has {size} tasks, but mpi4py's MPI ({library}) sees {MPI.COMM_WORLD.size}: in an "
                f"srun --pty shell, use `srun --overlap -n {size} python ...`, or unset SLURM_STEP_NUM_TASKS for a "
                f"single process; in a job, use srun --mpi=pmix, or the mpirun of that MPI"
            )
        raise ValueError(
            f"{size} ranks were started, but mpi4py's MPI ({library}) sees {MPI.COMM_WORLD.size}: they were "
            f"started by the mpirun of a different MPI; use the mpirun of mpi4py's MPI, or install only one MPI"
        )
    comm = MPIComm(MPI)
    threads.set_count(comm.threads)
    backend.choose_gpu(comm.local_rank)
    if comm.rank:
        backend.silence_compile_notice()

    def report(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(f"rank {comm.rank} of {comm.size}:\n{lines}", end="", file=sys.stderr)
        comm.abort(1)

    sys.excepthook = report
    threading.excepthook = lambda failed: report(failed.exc_type, failed.exc_value, failed.exc_traceback)
    return comm


def fail(line: str, code: int) -> int:
    """Print an error and end all ranks. Returns `code` if there is only one rank.

    If all ranks fail for the same reason, it is printed only once: the others wait for rank 0, which ends the job.
    """
    comm = _world or SoloComm()
    rank = comm.rank if _world else _launched()[1]
    time.sleep(min(rank, 2))
    if rank:
        line = f"rank {rank}: {line}"  # reached only if rank 0 has not ended the job
    print(line, file=sys.stderr, flush=True)
    comm.abort(code)
    return code


def fair_threads(masks: list[set[int]], rank: int) -> int:
    """The number of threads for a rank. Each core in its affinity mask counts 1 / (number of ranks on that core)."""
    return max(1, int(sum(1 / sum(core in mask for mask in masks) for core in masks[rank]) + 1e-9))
