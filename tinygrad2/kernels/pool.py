"""The threads that compute on the CPU: one pool, whose threads wait for more work by looking, not sleeping.

To wake a thread that sleeps takes 50 to 100 microseconds, as long as many a kernel. So a thread that has nothing to do
looks for work for about a millisecond before it goes to sleep: inside a training step, or between the tokens of a
text, it is there at once. Work is a Python function (`each`) or compiled code (`each_compiled`), which starts and ends
without Python's global lock.

BLAS is told to compute on the thread that calls it for as long as parts run, not longer: what another part of the
program does with BLAS is not changed. Two pools would fight, as the threads of both look for work on the same cores.
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
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from tinygrad2 import threads

# A worker's letter box, in 64-bit words: what the caller writes, and on a cache line of its own what the worker writes.
TICKET, FUNCTION, ARGUMENTS, START, STOP = range(5)
DONE, ASLEEP = 16, 17
WORDS = 32
PYTHON = 0  # as the function: the worker's task is a Python function
PATIENCE = 1e-3  # seconds that a worker looks for work before it sleeps


@intrinsic
def _load(typing_context, address):
    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(word, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(typing_context, address, value):
    def generate(context, builder, signature, arguments):
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], word, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pointer(typing_context, address, like):
    """In compiled code: an address as a pointer to numbers of the type of `like`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


def task(function: Callable) -> Any:
    """Compile function(arguments, start, stop) for each_compiled; `arguments` is the address of 64-bit words."""
    signature = types.void(types.int64, types.int64, types.int64)
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # no place for a cache
        return cfunc(signature)(function)


@intrinsic
def _pause(typing_context):
    """Tell the processor that this thread only looks: the other one on its core, if there is one, gets the units."""

    def generate(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _call(typing_context, function, arguments_, start, stop):
    """function(arguments, start, stop), by its address."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _compiled(function: Callable) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no place for a cache
        return njit(nogil=True)(function)


@_compiled
def _look(count):
    for _ in range(count):
        _pause()


@cache
def _looks() -> int:
    """How many looks take PATIENCE: processors pause for very different times."""
    _look(1)
    spent = []
    for _ in range(10):  # the least counts: in the others, other threads may have had the lock or the core
        started = time.perf_counter()
        _look(1000)
        spent.append(time.perf_counter() - started)
    return max(1000, int(1000 * PATIENCE / min(spent)))


@_compiled
def _serve(box, finished, patience):
    """Compute what comes into the box. Returns the ticket of a Python task, or 0 where none came for long.

    finished  the ticket of the Python task that was made, which is announced only here, without Python's lock.
    """
    _store(box + 8 * ASLEEP, 0)
    if finished:
        _store(box + 8 * DONE, finished)
    last = _load(box + 8 * DONE)
    looks = 0
    while True:
        ticket = _load(box + 8 * TICKET)
        if ticket != last:
            function = _load(box + 8 * FUNCTION)
            if function == PYTHON:
                return ticket
            _call(function, _load(box + 8 * ARGUMENTS), _load(box + 8 * START), _load(box + 8 * STOP))
            _store(box + 8 * DONE, ticket)
            last = ticket
            looks = 0
        _pause()
        looks += 1
        if looks > patience:
            _store(box + 8 * ASLEEP, 1)
            if _load(box + 8 * TICKET) == last:
                return 0
            _store(box + 8 * ASLEEP, 0)
            looks = 0


@_compiled
def _wait(boxes, count, patience):
    """Until all workers have answered, or for about a millisecond; whether they have."""
    for worker in range(count):
        box = boxes + 8 * WORDS * worker
        looks = 0
        while _load(box + 8 * DONE) != _load(box + 8 * TICKET):
            _pause()
            looks += 1
            if looks > patience:
                return False
    return True


@_compiled
def _begin(boxes, count):
    """Tell `count` workers that there is work in their boxes."""
    for worker in range(count):
        box = boxes + 8 * WORDS * worker
        _store(box + 8 * TICKET, _load(box + 8 * TICKET) + 1)


@_compiled
def _call_and_wait(boxes, count, function, arguments, start, stop, patience):
    """The same, then compute the part start ... stop - 1 here, and wait as above."""
    _begin(boxes, count)
    _call(function, arguments, start, stop)
    return _wait(boxes, count, patience)


class _Worker:
    """A thread and its letter box."""

    def __init__(self, box: np.ndarray):
        self.box = box
        self.task: Callable[[], None] | None = None
        self.error: BaseException | None = None
        self.wake = threading.Lock()  # which the thread waits for (an interrupted threading.Event can stay locked)
        self.wake.acquire()
        self.thread = threading.Thread(target=self._work, name="tinygrad2", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        _state.inside = True
        ticket = 0
        while True:
            ticket = _serve(self.box.ctypes.data, ticket, _looks())
            if not ticket:
                self.wake.acquire()
            elif self.task is None:
                return
            else:
                try:
                    self.task()
                except BaseException as error:  # the caller raises it
                    self.error = error
                self.task = None

    def wake_up(self) -> None:
        """Have the thread look again, if it sleeps. Only the thread itself says that it is awake: who is interrupted
        here has not told anything wrong."""
        if self.box[ASLEEP] and self.wake.locked():
            self.wake.release()


_state = threading.local()  # inside: whether this thread is a worker
_busy = threading.Lock()  # the workers serve one caller at a time; another one computes alone
_boxes = np.zeros((0, WORDS), dtype=np.int64)
_workers: list[_Worker] = []


def _staff(count: int) -> list[_Worker]:
    """The first `count` workers. Where there are fewer, all are hired anew, and known only when all are there.

    An interrupt between a caller's last step and its waiting leaves a part behind, which is waited for here: a worker
    that gets its next task too early would lose it, and whoever waits for that would wait for ever.
    """
    global _boxes, _workers
    _await(_workers)
    if count > len(_workers):
        _dismiss()
        boxes = np.zeros((max(count, threads.count() - 1), WORDS), dtype=np.int64)
        _workers, _boxes = [_Worker(box) for box in boxes], boxes
    return _workers[:count]


def _dismiss() -> None:
    """End the threads."""
    global _workers
    workers, _workers = _workers, []
    for worker in workers:
        worker.box[FUNCTION], worker.task = PYTHON, None
    _begin(_boxes.ctypes.data, len(workers))
    for worker in workers:
        while worker.thread.is_alive():
            worker.wake_up()
            worker.thread.join(PATIENCE)


@atexit.register
def _close() -> None:
    """At exit: what still computes afterwards does so alone. A thread that is in the midst of it is not waited for."""
    if _busy.acquire(timeout=1):
        _dismiss()


def _forget() -> None:
    """In a forked process, where the threads do not exist."""
    global _busy, _workers
    _busy, _workers = threading.Lock(), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def each(task: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """Call task(start, stop) for every range, at the same time; the first range on the calling thread.

    A part that calls `each` again has its parts computed in place. The first error of a part is raised when all ended.
    """
    if len(ranges) == 1 or getattr(_state, "inside", False) or not _busy.acquire(blocking=False):
        for start, stop in ranges:
            task(start, stop)
        return
    try:
        workers = _staff(len(ranges) - 1)
        with threads.blas_on_one_thread():
            try:
                for worker, (start, stop) in zip(workers, ranges[1:], strict=True):
                    # Each part sees the caller's context: NumPy keeps there which floating-point errors are reported.
                    worker.task, worker.error = partial(copy_context().run, task, start, stop), None
                    worker.box[FUNCTION] = PYTHON
                _begin(_boxes.ctypes.data, len(workers))
                for worker in workers:
                    worker.wake_up()
                task(*ranges[0])
            finally:
                _await(workers)
        for worker in workers:
            if worker.error is not None:
                raise worker.error
    finally:
        _busy.release()


def each_compiled(function: Any, arguments: np.ndarray, ranges: list[tuple[int, int]]) -> None:
    """The same for a compiled function(arguments, start, stop), made by numba.cfunc; `arguments` are 64-bit words."""
    address = arguments.ctypes.data
    if len(ranges) == 1 or getattr(_state, "inside", False) or not _busy.acquire(blocking=False):
        for start, stop in ranges:
            function.ctypes(address, start, stop)
        return
    try:
        workers, patience, ended = _staff(len(ranges) - 1), _looks(), False
        for worker, (start, stop) in zip(workers, ranges[1:], strict=True):
            worker.box[FUNCTION : STOP + 1] = function.address, address, start, stop
            worker.wake_up()
        try:
            ended = _call_and_wait(_boxes.ctypes.data, len(workers), function.address, address, *ranges[0], patience)
        finally:
            if not ended:
                _await(workers)
    finally:
        _busy.release()


def _await(workers: list[_Worker]) -> None:
    """Wait until all have answered. An interrupt is raised only then: they write to the caller's memory until then."""
    try:
        while not _wait(_boxes.ctypes.data, len(workers), _looks()):
            for worker in workers:
                worker.wake_up()
            time.sleep(0)  # where there are more threads than cores
    except BaseException:
        _await(workers)
        raise
