"""The number of CPU threads, and how work is divided among them. The thread pool is in kernels/pool.py."""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Protocol

from threadpoolctl import ThreadpoolController

from tinygrad2 import machine


class BlasLibrary(Protocol):
    """A loaded BLAS library, as controlled by threadpoolctl."""

    def get_num_threads(self) -> int: ...
    def set_num_threads(self, num_threads: int) -> None: ...


MAX_COUNT = 1024
_count = machine.usable_threads()
_lock = threading.Lock()
# An interrupt can arrive at any time. So BLAS's old setting is recorded before it is changed, and kept until it has
# been restored.
_before: list[
    tuple[BlasLibrary, int]
] = []  # the libraries and their thread counts, while BLAS is limited to one thread
_users: weakref.WeakSet[blas_on_one_thread] = weakref.WeakSet()


def count() -> int:
    """The number of threads to compute with."""
    return _count


def set_count(n: int) -> None:
    """Use n threads from now on, including in BLAS. Raises ValueError unless 1 <= n <= MAX_COUNT."""
    global _count
    if not 1 <= n <= MAX_COUNT:
        raise ValueError(f"threads: the number of threads is {n:,}; expected 1 to {MAX_COUNT:,}")
    with _lock:
        if not _users:
            _restore()
        _count = n
        for library in _blas():
            library.set_num_threads(n)


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """Divide 0 ... n-1 into at most count() contiguous parts (start, stop) of nearly equal size, at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


class blas_on_one_thread:  # noqa: N801 - used as a function
    """A context manager in which BLAS uses only the calling thread. The last active one restores the old setting."""

    def __enter__(self) -> None:
        global _before
        with _lock:
            if not _users:
                _restore()
                _before = [(library, library.get_num_threads()) for library in _blas()]
                for library, _ in _before:
                    library.set_num_threads(1)
            _users.add(self)

    def __exit__(self, *_: object) -> None:
        with _lock:
            _users.discard(self)
            if not _users:
                _restore()


def _restore() -> None:
    """Restore the thread counts that BLAS had before it was limited to one thread."""
    global _before
    for library, count in _before:
        library.set_num_threads(count)
    _before = []


@cache
def _blas() -> list[BlasLibrary]:
    """The loaded BLAS libraries."""
    return ThreadpoolController().select(user_api="blas").lib_controllers
