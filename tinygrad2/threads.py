"""How many threads compute on the CPU, and how work is cut for them. The threads themselves: kernels/pool.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


def available() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_count = available()
_blas: ThreadpoolController | None = None


def count() -> int:
    """How many threads compute."""
    return _count


def set_count(n: int) -> None:
    """Compute on n threads from now on."""
    global _count
    if n < 1:
        raise ValueError(f"threads: {n} asked for; expected at least 1")
    _count = n


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """0 ... n-1 in at most count() contiguous parts (start, stop) of nearly equal size, each of at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """BLAS computes each call on the thread that makes it."""
    global _blas
    if _blas is None:
        _blas = ThreadpoolController()
    with _blas.limit(limits=1, user_api="blas"):
        yield
