"""One pool of threads for everything that is computed on the CPU.

Two pools fight: a matrix product that uses BLAS's own threads leaves them spinning for a while, and whoever runs next
on those cores waits for them. So there is one pool, this one. A large matrix product is cut into parts that BLAS
computes on one thread each, and BLAS is told so for as long as the parts run, not longer: what another part of the
program does with BLAS is not changed. Waking a thread takes a tenth of a millisecond, so small work is not cut: it
stays on the calling thread, and a small product is left to BLAS and its threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

from threadpoolctl import ThreadpoolController


def available() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_count = available()
_pool: ThreadPoolExecutor | None = None
_blas: ThreadpoolController | None = None
_state = threading.local()


def count() -> int:
    """How many threads compute."""
    return _count


def set_count(n: int) -> None:
    """Compute on n threads from now on."""
    global _count, _pool
    if n < 1:
        raise ValueError(f"threads: {n} asked for; expected at least 1")
    _count = n
    _pool = None


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """0 ... n-1 in at most count() contiguous parts (start, stop) of nearly equal size, each of at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


def each(task: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    """Call task(start, stop) for every range, at the same time; the first range on the calling thread."""
    global _pool
    if len(ranges) == 1 or getattr(_state, "inside", False):
        for start, stop in ranges:
            task(start, stop)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, _count - 1), "tinygrad2")
    pool = _pool
    with blas_on_one_thread():
        # Each part sees the caller's context: NumPy keeps there which floating-point errors are reported.
        futures = [pool.submit(copy_context().run, _inside, task, start, stop) for start, stop in ranges[1:]]
        try:
            task(*ranges[0])
        finally:
            for future in futures:
                future.result()


def _inside(task: Callable[[int, int], None], start: int, stop: int) -> None:
    _state.inside = True
    task(start, stop)


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """BLAS computes each call on the thread that makes it."""
    global _blas
    if _blas is None:
        _blas = ThreadpoolController()
    with _blas.limit(limits=1, user_api="blas"):
        yield
