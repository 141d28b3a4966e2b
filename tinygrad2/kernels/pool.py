"""The thread pool for computation on the CPU. Idle workers spin briefly before they sleep.

Waking a sleeping thread takes 50 to 100 microseconds, as long as many kernels take. An idle worker therefore spins for
about a millisecond first, so it starts immediately within a training step or between two generated tokens. A task is a
Python function (see `each`) or compiled code (see `each_compiled`). Compiled code starts and ends without the GIL.

While a task runs, BLAS is limited to the calling thread, since two thread pools would compete for the cores.
Afterwards its thread count is restored, so BLAS calls in other parts of the program are not affected.
"""

from __future__ import annotations

import atexit
import os
import platform
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from tinygrad2 import forks, threads

# The layout of a worker's slot in shared memory, in 64-bit words. The caller writes the first five words; the worker
# writes two words on another cache line. Incrementing TICKET posts a task; the task has finished when DONE == TICKET.
TICKET, FUNCTION, ARGUMENTS, START, STOP = range(5)
DONE, ASLEEP = 16, 17
WORDS = 32
PYTHON = 0  # the value of FUNCTION for a Python function
SPIN_SECONDS = 1e-3  # how long an idle worker spins before it sleeps

Intrinsic = tuple[Signature, Callable[..., ir.Value]]  # the signature, and a function that generates LLVM IR
CompiledTask = Any  # the result of numba.cfunc: `address`, and `ctypes` to call it from Python
F = TypeVar("F", bound=Callable)


@intrinsic
def _load(typing_context: Context, address: types.Type) -> Intrinsic:
    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(word, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(typing_context: Context, address: types.Type, value: types.Type) -> Intrinsic:
    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], word, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pointer(typing_context: Context, address: types.Type, like: types.Type) -> Intrinsic:
    """Convert an address to a pointer to values of the type of `like`, in compiled code."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


def task(function: Callable[[int, int, int], None]) -> CompiledTask:
    """Compile function(arguments, start, stop) for each_compiled. `arguments` is the address of an int64 array."""
    signature = types.void(types.int64, types.int64, types.int64)
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # there is no writable folder for the cache
        return cfunc(signature)(function)


@intrinsic
def _pause(typing_context: Context) -> Intrinsic:
    """Emit the processor's spin-loop hint, which yields execution units to the core's other hardware thread."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(
    typing_context: Context, function: types.Type, arguments_: types.Type, start: types.Type, stop: types.Type
) -> Intrinsic:
    """Call function(arguments, start, stop), given the function's address."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def compiled(function: F) -> F:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no writable folder for the cache
        return njit(nogil=True)(function)


@compiled
def _spin(count: int) -> None:
    for _ in range(count):
        _pause()


@cache
def _spins() -> int:
    """Return the number of spin iterations in SPIN_SECONDS. (The length of a pause depends on the processor.)"""
    _spin(1)
    spent = []
    for _ in range(10):  # use the minimum, since another thread may have held the lock or the core
        started = time.perf_counter()
        _spin(1000)
        spent.append(time.perf_counter() - started)
    return max(1000, int(1000 * SPIN_SECONDS / min(spent)))


@compiled
def _run_tasks(slot: int, finished: int, max_spins: int) -> int:
    """Run compiled tasks as they are posted to the slot at this address. Returns the ticket if a Python task is
    posted, or 0 if no task is posted for max_spins iterations.

    finished  the ticket of the Python task that the worker has just run, or 0. DONE is set here, without the GIL.
    """
    _store(slot + 8 * ASLEEP, 0)
    if finished:
        _store(slot + 8 * DONE, finished)
    last = _load(slot + 8 * DONE)
    spins = 0
    while True:
        ticket = _load(slot + 8 * TICKET)
        if ticket != last:
            function = _load(slot + 8 * FUNCTION)
            if function == PYTHON:
                return ticket
            call(function, _load(slot + 8 * ARGUMENTS), _load(slot + 8 * START), _load(slot + 8 * STOP))
            _store(slot + 8 * DONE, ticket)
            last = ticket
            spins = 0
        _pause()
        spins += 1
        if spins > max_spins:
            _store(slot + 8 * ASLEEP, 1)
            if _load(slot + 8 * TICKET) == last:
                return 0
            _store(slot + 8 * ASLEEP, 0)
            spins = 0


@compiled
def _wait(slots: int, count: int, max_spins: int) -> bool:
    """Spin until the first `count` workers have finished. Returns False if one takes more than max_spins iterations."""
    for worker in range(count):
        slot = slots + 8 * WORDS * worker
        spins = 0
        while _load(slot + 8 * DONE) != _load(slot + 8 * TICKET):
            _pause()
            spins += 1
            if spins > max_spins:
                return False
    return True


@compiled
def _post(slots: int, count: int) -> None:
    """Post the tasks in the slots of the first `count` workers."""
    for worker in range(count):
        slot = slots + 8 * WORDS * worker
        _store(slot + 8 * TICKET, _load(slot + 8 * TICKET) + 1)


@compiled
def _post_and_run(slots: int, count: int, function: int, arguments: int, start: int, stop: int, max_spins: int) -> bool:
    """Post the tasks, compute the range start ... stop - 1 on the calling thread, then wait for the workers."""
    _post(slots, count)
    call(function, arguments, start, stop)
    return _wait(slots, count, max_spins)


@compiled
def _run_steps(table: int, width: int, first: int, count: int, slots: int, concurrent: bool, max_spins: int) -> int:
    """Run steps first ... count - 1 of a table; see `table`. Returns count when all steps have finished. If the wait
    for a step times out, returns the index of the next step, or -count after the last; the caller must then wait.

    concurrent  whether the parts run on the workers; otherwise they run sequentially on this thread."""
    for step in range(first, count):
        row = table + 8 * width * step
        function, arguments, parts = _load(row), _load(row + 8), _load(row + 16)
        for part in range(1, parts):
            start, stop = _load(row + 24 + 16 * part), _load(row + 32 + 16 * part)
            if concurrent:
                slot = slots + 8 * WORDS * (part - 1)
                _store(slot + 8 * FUNCTION, function)
                _store(slot + 8 * ARGUMENTS, arguments)
                _store(slot + 8 * START, start)
                _store(slot + 8 * STOP, stop)
            else:
                call(function, arguments, start, stop)
        workers = parts - 1 if concurrent else 0
        if not _post_and_run(slots, workers, function, arguments, _load(row + 24), _load(row + 32), max_spins):
            return step + 1 if step + 1 < count else -count
    return count


class _Worker:
    """A worker thread and its slot."""

    def __init__(self, slot: np.ndarray):
        self.slot = slot
        self.task: Callable[[], None] | None = None
        self.error: BaseException | None = None
        self.wake = threading.Lock()  # held while the thread sleeps (an interrupted threading.Event can stay locked)
        self.wake.acquire()
        self.thread = threading.Thread(target=self._work, name="tinygrad2", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        forks.worker.inside = True
        ticket = 0
        while True:
            ticket = _run_tasks(self.slot.ctypes.data, ticket, _spins())
            if not ticket:
                self.wake.acquire()
            elif self.task is None:
                return
            else:
                try:
                    self.task()
                except BaseException as error:  # re-raised on the calling thread
                    self.error = error
                self.task = None

    def wake_up(self) -> None:
        """Wake the thread if it sleeps. Only the thread itself clears ASLEEP, so an interrupt here is harmless."""
        if self.slot[ASLEEP] and self.wake.locked():
            self.wake.release()


_busy = threading.Lock()  # workers compute for one caller at a time; other callers compute on their own threads
_caller = 0  # the thread that last used the workers
_slots = np.zeros((0, WORDS), dtype=np.int64)
_workers: list[_Worker] = []


def _get_workers(count: int) -> list[_Worker]:
    """Return the first `count` workers. If the pool is smaller, it is replaced by a larger one.

    If a caller was interrupted after posting a task and before waiting for it, the task may still be running. This
    function waits for it: a task posted to a busy worker would be lost, and its caller would wait forever.
    """
    global _slots, _workers, _caller
    _caller = threading.get_ident()
    _wait_for(_workers)
    if count > len(_workers):
        _stop_workers()
        slots = np.zeros((max(count, threads.count() - 1), WORDS), dtype=np.int64)
        _workers, _slots = [_Worker(slot) for slot in slots], slots
    return _workers[:count]


def _stop_workers() -> None:
    """End the threads of the pool."""
    global _workers
    workers, _workers = _workers, []
    for worker in workers:
        worker.slot[FUNCTION], worker.task = PYTHON, None
    _post(_slots.ctypes.data, len(workers))
    for worker in workers:
        while worker.thread.is_alive():
            worker.wake_up()
            worker.thread.join(SPIN_SECONDS)


@atexit.register
def _close() -> None:
    """Stop the pool at exit; later tasks run on the calling thread. If another thread, such as a daemon, is still
    running a task, it holds the lock, and the pool is not stopped."""
    if _busy.acquire(timeout=1):
        _stop_workers()


def _computing_here() -> bool:
    """Whether the workers are computing for this thread. It is then running a signal handler."""
    return _busy.locked() and _caller == threading.get_ident()


def _before_fork() -> None:
    """Let the workers finish, so that the child process has their results too."""
    if _computing_here():
        _wait_for(_workers)


def _reset_after_fork() -> None:
    """Reset the state in the child process, in which the threads do not exist."""
    global _busy, _workers
    _workers = []
    if not _computing_here():
        _busy = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_reset_after_fork)
forks.locks.append(global_compiler_lock)


def each(task: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """Call task(start, stop) for every range in parallel, with the first range on the calling thread.

    A nested call runs all ranges on its own thread. If any part raises an error, the first one is re-raised after
    all parts have finished.
    """
    if len(ranges) == 1 or hasattr(forks.worker, "inside") or not _busy.acquire(blocking=False):
        for start, stop in ranges:
            task(start, stop)
        return
    try:
        workers = _get_workers(len(ranges) - 1)
        with threads.blas_on_one_thread():
            try:
                for worker, (start, stop) in zip(workers, ranges[1:], strict=True):
                    # Each part runs in the caller's context, which contains NumPy's errstate.
                    worker.task, worker.error = partial(copy_context().run, task, start, stop), None
                    worker.slot[FUNCTION] = PYTHON
                _post(_slots.ctypes.data, len(workers))
                for worker in workers:
                    worker.wake_up()
                task(*ranges[0])
            finally:
                _wait_for(workers)
        for worker in workers:
            if worker.error is not None:
                raise worker.error
    finally:
        _busy.release()


def clear(array: np.ndarray) -> None:
    """Fill a flat array with zeros, at least 1 MB per thread."""
    each(lambda start, stop: array[start:stop].fill(0), threads.parts(len(array), (1 << 20) // array.itemsize))


def each_compiled(function: CompiledTask, arguments: np.ndarray, ranges: list[tuple[int, int]]) -> None:
    """Like `each`, for a compiled function(arguments, start, stop); `arguments` is an array of 64-bit words."""
    address = arguments.ctypes.data
    if len(ranges) == 1 or hasattr(forks.worker, "inside") or not _busy.acquire(blocking=False):
        for start, stop in ranges:
            function.ctypes(address, start, stop)
        return
    try:
        workers, max_spins, ended = _get_workers(len(ranges) - 1), _spins(), False
        for worker, (start, stop) in zip(workers, ranges[1:], strict=True):
            worker.slot[FUNCTION : STOP + 1] = function.address, address, start, stop
            worker.wake_up()
        try:
            ended = _post_and_run(_slots.ctypes.data, len(workers), function.address, address, *ranges[0], max_spins)
        finally:
            if not ended:
                _wait_for(workers)
    finally:
        _busy.release()


def table(steps: list[tuple[int, np.ndarray, list[tuple[int, int]]]]) -> np.ndarray:
    """Return a table for run_table: one row per compiled task (address, arguments, ranges). The caller must keep the
    arguments alive."""
    width = 3 + 2 * max(len(ranges) for _, _, ranges in steps)
    rows = np.zeros((len(steps), width), dtype=np.int64)
    for row, (address, arguments, ranges) in zip(rows, steps, strict=True):
        row[:3] = address, arguments.ctypes.data, len(ranges)
        row[3 : 3 + 2 * len(ranges)] = np.ravel(ranges)
    return rows


def run_table(table: np.ndarray) -> None:
    """Run the tasks of a table one after another, each like `each_compiled`, without Python code in between."""
    address, width, count, spins = table.ctypes.data, table.shape[1], len(table), _spins()
    parts = int(table[:, 2].max())
    if parts == 1 or hasattr(forks.worker, "inside") or not _busy.acquire(blocking=False):
        _run_steps(address, width, 0, count, _slots.ctypes.data, False, spins)
        return
    try:
        workers, done = _get_workers(parts - 1), 0
        for worker in workers:
            worker.wake_up()
        while 0 <= done < count:
            ended = False
            try:
                done = _run_steps(address, width, done, count, _slots.ctypes.data, True, spins)
                ended = done == count
            finally:
                if not ended:
                    _wait_for(workers)
    finally:
        _busy.release()


def _wait_for(workers: list[_Worker]) -> None:
    """Wait until all workers have finished. Only then re-raise an interrupt: workers write to the caller's memory."""
    try:
        while not _wait(_slots.ctypes.data, len(workers), _spins()):
            if _lost(workers):
                raise RuntimeError(
                    "pool: a signal handler forked during a computation; the child process cannot complete it"
                )
            for worker in workers:
                worker.wake_up()
            time.sleep(0)  # yields the core if there are more threads than cores
    except BaseException:
        if not _lost(workers):
            _wait_for(workers)
        raise


def _lost(workers: list[_Worker]) -> bool:
    """Whether these workers are threads of the parent process, from which this process was forked."""
    return not all(worker.thread.is_alive() for worker in workers)
