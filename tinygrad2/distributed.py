"""Several processes that train one model together: the ranks of an MPI job, or one process alone.

Every rank holds the same parameters and computes the gradients of its own part of each batch. What they exchange passes
through a `Comm`: `world()` gives the one that this process was started with, and whoever uses it need not know which.

Sums are ours: each rank is sent all parts of its own share of a buffer, adds them up in the order of the ranks, and
sends the result to the others. That moves as little as any all-reduce does, uses both directions of every link, and two
runs on as many ranks give the same bits whichever MPI library moves them.

A rank that fails ends the job. An error that nobody catches is printed and aborts every rank. A process that was killed
or stopped cannot say so, hence a background thread of each rank sends a heartbeat, which does not depend on how long a
step, a checkpoint or a compilation takes.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import numpy

from tinygrad2 import backend, threads
from tinygrad2.backend import Backend
from tinygrad2.files import discard_stdout
from tinygrad2.machine import cores

T = TypeVar("T")

BEAT = 1.0  # seconds between two heartbeats
SILENCE = 20.0  # seconds without one after which a rank counts as dead
POLL = 5e-5  # seconds between two looks at a transfer: MPI moves data only when it is asked
POLL_BESIDE = 2e-4  # the same while the caller computes
GRACE = 5.0  # seconds that an abort may take before the process ends by itself

# How those who start ranks name their number, and a rank's own. Under Slurm a mpirun inside a job step goes first.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("PMI_SIZE", "PMI_RANK"),  # MPICH and its relatives
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # srun
)


class Comm(Protocol):
    """What ranks do together. Every method but `abort` is called by all ranks, in the same order.

    rank, size  which one this is, and how many there are.
    waited      seconds that the caller has spent waiting for the others so far, in `waiting()`.
    idle_cores  of this machine, which the one who started the ranks may use, but has bound none of them to.
    """

    rank: int
    size: int
    waited: float
    idle_cores: int

    def from_root(self, function: Callable[[], T]) -> T:
        """What function() gives on rank 0, called when all ranks have come here; all of them get it.

        Where it raises there, the others end without a word.
        """

    def all_gather(self, array: numpy.ndarray) -> numpy.ndarray:
        """The arrays of all ranks, of one shape and dtype, stacked in the order of the ranks."""

    def gather_shares(self, share: numpy.ndarray, whole: numpy.ndarray | None) -> None:
        """Put the shares of all ranks together as `whole`, a flat host array, on rank 0; elsewhere that is None."""

    def start_sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> Future[None]:
        """Begin to add up a flat host array over the ranks, in place; with share_only, only this rank's share of it.

        after  is called first, in the background: it waits until the array is ready.
        """

    def start_all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> Future[None]:
        """Begin to fill a flat host array, of which each rank has brought its own share, with those of the others."""

    def gpu_sums(self, on: Backend) -> GpuSums | None:
        """What adds up arrays of this backend from GPU to GPU, or None where they pass through host memory.

        That is so where each rank has a GPU of its own and NCCL is installed. The first call is made by all ranks.
        """

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside this context the caller only waits for what was started, and its time counts as `waited`."""
        yield

    def root_speaks(self) -> None:
        """From now on only rank 0 prints on standard output."""

    def abort(self, code: int) -> None:
        """End every rank at once, with this exit status. Returns only where there is just one rank."""


def share(n: int, rank: int, size: int) -> tuple[int, int]:
    """The part (start, stop) of n numbers that is a rank's own: contiguous, in the order of the ranks, nearly equal."""
    return n * rank // size, n * (rank + 1) // size


class GpuSums:
    """Sums from GPU to GPU, made by NCCL on a stream of its own, beside what is being computed.

    Every method launches and returns; the host never waits. What is launched here begins when all that was computed
    before has been; what is computed after `join` begins when all sums have been made.

    identity  names this group of ranks: from rank 0's `nccl.get_unique_id()`.
    """

    def __init__(self, on: Backend, nccl: Any, rank: int, size: int, identity: Any):
        # Otherwise NCCL chooses by what it expects to be fast; a sum inside a switch rounds otherwise than a ring's.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        self.size = size
        self._cuda, self._nccl = on.np.cuda, nccl
        self._codes = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._communicator = nccl.NcclCommunicator(size, identity, rank)
        self._stream = on.np.cuda.Stream(non_blocking=True)
        self._travelling: list[Any] = []  # arrays whose memory must not be given to others yet

    def start_sum(self, flat: Any, share_only: bool = False) -> None:
        """Begin to add up a flat array over the ranks, in place; with share_only, only this rank's share of it."""
        pointer, code = self._begin(flat)
        add, stream = self._nccl.NCCL_SUM, self._stream.ptr
        if share_only:
            for root, (start, count) in enumerate(self._shares(flat)):
                self._communicator.reduce(pointer + start, pointer + start, count, code, add, root, stream)
        else:
            self._communicator.allReduce(pointer, pointer, flat.size, code, add, stream)
        self._nccl.groupEnd()

    def start_all_gather(self, flat: Any) -> None:
        """Begin to fill a flat array, of which each rank has brought its own share, with those of the others."""
        pointer, code = self._begin(flat)
        for root, (start, count) in enumerate(self._shares(flat)):
            self._communicator.bcast(pointer + start, count, code, root, self._stream.ptr)
        self._nccl.groupEnd()

    def join(self) -> None:
        """Have the computation go on only when the sums are there."""
        self._cuda.get_current_stream().wait_event(self._stream.record())
        self._travelling.clear()  # from here on the order of the computation's stream protects their memory

    def _begin(self, flat: Any) -> tuple[int, int]:
        self._stream.wait_event(self._cuda.get_current_stream().record())
        self._travelling.append(flat)
        self._nccl.groupStart()
        return flat.data.ptr, self._codes[flat.dtype.name]

    def _shares(self, flat: Any) -> Iterator[tuple[int, int]]:
        """(offset in bytes, how many numbers) of each rank's share."""
        for rank in range(self.size):
            start, stop = share(flat.size, rank, self.size)
            yield start * flat.itemsize, stop - start


class SoloComm:
    """One process: it has nobody to wait for."""

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

    def gpu_sums(self, on: Backend) -> GpuSums | None:
        return None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def root_speaks(self) -> None:
        pass

    def abort(self, code: int) -> None:
        pass


class MPIComm:
    """The ranks of an MPI job.

    Three communicators, so that what one thread sends never meets what another one expects: `_calls` for what the
    caller waits for, `_bulk` for the thread that moves gradients, `_pulse` for the heartbeats. Nothing blocks inside
    MPI, which would keep a core busy: whoever waits looks from time to time, and sleeps in between.
    """

    def __init__(self, MPI: Any):
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise ValueError("MPI: this library does not let several threads communicate (MPI_THREAD_MULTIPLE)")
        self._in_place, self._any_source, self._status = MPI.IN_PLACE, MPI.ANY_SOURCE, MPI.Status
        world = MPI.COMM_WORLD
        self.rank, self.size, self.waited = world.rank, world.size, 0.0
        self._calls, self._bulk, self._pulse = world.Dup(), world.Dup(), world.Dup()
        machine = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = machine.rank
        masks = machine.allgather(cores())
        self.threads = fair_threads(masks, machine.rank)
        starter = cores(os.getppid()) if "OMPI_COMM_WORLD_SIZE" in os.environ else set()
        self.idle_cores = len(starter - set().union(*masks))
        self._parcels = numpy.empty(0, dtype=numpy.uint8)  # what arrives to be added up
        self._caller_waits = False
        self._gpu_sums: list[GpuSums | None] = []  # empty before the first question
        self._courier = ThreadPoolExecutor(1, "courier")
        self._ending = threading.Event()
        self._watch = threading.Thread(target=self._watch_over, name="heartbeat", daemon=True)
        self._watch.start()
        atexit.register(self._leave)  # runs before mpi4py's own, which finalizes MPI

    def from_root(self, function: Callable[[], T]) -> T:
        error: BaseException | None = None
        result = None
        self._await(self._calls.Ibarrier(), POLL)
        if self.rank == 0:
            try:
                result = function()
            except BaseException as raised:
                error = raised
        self._await(self._calls.Ibarrier(), POLL)  # the others wait here, asleep, not inside bcast
        result, failed = self._calls.bcast((result, error is not None))
        if error is not None:
            raise error
        if failed:
            raise SystemExit(0)  # rank 0 says why, and its exit status is the job's
        return result

    def all_gather(self, array: numpy.ndarray) -> numpy.ndarray:
        together = numpy.empty((self.size, *array.shape), dtype=array.dtype)
        self._await(self._calls.Iallgather(numpy.asarray(array, order="C"), together), POLL)
        return together

    def gather_shares(self, share: numpy.ndarray, whole: numpy.ndarray | None) -> None:
        into = None if whole is None else [whole, self._layout(len(whole))]
        self._await(self._calls.Igatherv(share, into), POLL)

    def start_sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> Future[None]:
        return self._courier.submit(self._sum, flat, share_only, after)

    def start_all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> Future[None]:
        return self._courier.submit(self._all_gather, flat, after)

    def _sum(self, flat: numpy.ndarray, share_only: bool, after: Callable[[], None]) -> None:
        after()
        start, stop = share(len(flat), self.rank, self.size)
        n = stop - start
        if self._parcels.nbytes < self.size * n * flat.itemsize:
            self._parcels = numpy.empty(self.size * n * flat.itemsize, dtype=numpy.uint8)
        parcels = self._parcels[: self.size * n * flat.itemsize].view(flat.dtype)
        arriving = ([n] * self.size, [n * rank for rank in range(self.size)])
        self._await(self._bulk.Ialltoallv([flat, self._layout(len(flat))], [parcels, arriving]))
        numpy.add.reduce(parcels.reshape(self.size, n), axis=0, out=flat[start:stop])
        if not share_only:
            self._all_gather(flat, lambda: None)

    def _all_gather(self, flat: numpy.ndarray, after: Callable[[], None]) -> None:
        after()
        self._await(self._bulk.Iallgatherv(self._in_place, [flat, self._layout(len(flat))]))

    def _layout(self, n: int) -> tuple[list[int], list[int]]:
        """(counts, starts) of the shares of n numbers, as MPI wants them."""
        parts = [share(n, rank, self.size) for rank in range(self.size)]
        return [stop - start for start, stop in parts], [start for start, _ in parts]

    def _await(self, request: Any, pause: float | None = None) -> None:
        while not request.Test():
            time.sleep(pause or (POLL if self._caller_waits else POLL_BESIDE))

    def gpu_sums(self, on: Backend) -> GpuSums | None:
        if on.cuda is None:
            return None
        if not self._gpu_sums:
            nccl, place = on.cuda.nccl(), f"{socket.gethostname()} {on.cuda.address()}"
            places = self._calls.allgather(place if nccl else None)
            if None not in places and len(set(places)) == self.size:
                identity = self._calls.bcast(nccl.get_unique_id() if self.rank == 0 else None)
                self._gpu_sums.append(GpuSums(on, nccl, self.rank, self.size, identity))
            else:
                self._gpu_sums.append(None)
        return self._gpu_sums[0]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began, self._caller_waits = time.perf_counter(), True
        try:
            yield
        finally:
            self._caller_waits = False
            self.waited += time.perf_counter() - began

    def root_speaks(self) -> None:
        if self.rank:
            discard_stdout()

    def abort(self, code: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        last = threading.Timer(GRACE, os._exit, (code,))
        last.daemon = True
        last.start()
        time.sleep(0.1)  # mpirun reads what was printed before it hears of the abort
        self._calls.Abort(code)
        os._exit(code)

    def _watch_over(self) -> None:
        """Tell the others every second that this rank lives, and end the job when one of them falls silent.

        Rank 0 and every other rank listen to each other: whoever falls silent, somebody notices. A rank that was
        stopped together with its job and goes on with it does not count its own absence against the others.
        """
        peers = range(1, self.size) if self.rank == 0 else range(1)
        heard = dict.fromkeys(peers, time.monotonic())
        awake = time.monotonic()
        while not self._ending.wait(BEAT):
            for peer in peers:
                self._pulse.Isend(b"", peer).Free()
            status = self._status()
            while self._pulse.Iprobe(self._any_source, status=status):
                self._pulse.Recv(bytearray(), status.source)
                heard[status.source] = time.monotonic()
            now = time.monotonic()
            if now - awake > SILENCE / 2:
                heard = dict.fromkeys(peers, now)
            awake = now
            for peer, last in heard.items():
                if now - last > SILENCE:
                    print(f"rank {peer} has not answered for {now - last:.0f} s; all ranks end", file=sys.stderr)
                    self.abort(1)

    def _leave(self) -> None:
        """At the process's end: wait for the others, who may still save, and only then stop the heartbeat."""
        self._await(self._calls.Ibarrier(), POLL)
        self._ending.set()
        self._watch.join()


_world: Comm | None = None


def world() -> Comm:
    """The ranks that this process was started among, or it alone. Without mpirun, mpi4py is not imported.

    Among several ranks the first call sets this one up: it computes on its share of the machine's cores, on the GPU
    of its number, and an error that nobody catches ends the job.

    Raises ValueError where mpi4py is missing, or belongs to another MPI than the mpirun that started this process.
    """
    global _world
    if _world is None:
        size, rank = _launched()
        _world = SoloComm() if size == 1 else _join(size, rank)
    return _world


def _launched() -> tuple[int, int]:
    """(number of ranks, this rank), by what the one who started this process left in the environment."""
    for names in LAUNCHERS:
        size, rank = (os.environ.get(name, "") for name in names)
        if size.isdigit() and rank.isdigit():
            return int(size), int(rank)
    return 1, 0


def _join(size: int, rank: int) -> MPIComm:
    try:
        with warnings.catch_warnings(action="ignore"):  # about a foreign mpirun: we say so ourselves
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'rank {rank} of {size}: mpi4py does not work ({error}); pip install -e ".[mpi]"') from None
    if MPI.COMM_WORLD.size != size:
        if rank:
            raise SystemExit(1)  # each of these jobs of one rank finds the same; the first one says it
        library = MPI.Get_library_version().split(",")[0]
        raise ValueError(
            f"{size} ranks were started, but mpi4py's MPI ({library}) sees {MPI.COMM_WORLD.size}: it is not that of "
            f"the mpirun that started them; use the mpirun that belongs to it, or install only one of the two"
        )
    comm = MPIComm(MPI)
    threads.set_count(comm.threads)
    backend.choose_gpu(comm.local_rank)
    if comm.rank:
        backend.silence_compile_notice()

    def ended(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(f"rank {comm.rank} of {comm.size}:\n{lines}", end="", file=sys.stderr)
        comm.abort(1)

    sys.excepthook = ended
    threading.excepthook = lambda failed: ended(failed.exc_type, failed.exc_value, failed.exc_traceback)
    return comm


def fail(line: str, code: int) -> int:
    """Say why this process ends, and end all ranks; returns `code` where there is only one.

    Where all ranks fail for the same reason, it is said once: the others let rank 0 speak and end the job first.
    """
    comm = _world or SoloComm()
    rank = comm.rank if _world else _launched()[1]
    time.sleep(min(rank, 2))
    print(line, file=sys.stderr, flush=True)
    comm.abort(code)
    return code


def fair_threads(masks: list[set[int]], rank: int) -> int:
    """How many threads a rank should compute on: the cores of its own mask, each divided among those who may use it."""
    return max(1, int(sum(1 / sum(core in mask for mask in masks) for core in masks[rank]) + 1e-9))
