"""The number of CPU threads, and how work is divided among them. The thread pool is in kernels/pool.py."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from threadpoolctl import ThreadpoolController

from tinygrad2 import forks, machine


class BlasLibrary(NamedTuple):
    """How to read and change the number of threads of a loaded BLAS library."""

    get_num_threads: Callable[[], int]
    set_num_threads: Callable[[int], None]


MAX_COUNT = 1024
_count = machine.usable_threads()
# An interrupt can arrive at any time. So BLAS's old setting is recorded before it is changed, and kept until it has
# been restored.
_before: list[
    tuple[BlasLibrary, int]
] = []  # the libraries and their thread counts, while BLAS is limited to one thread


def count() -> int:
    """The number of threads to use."""
    return _count


def set_count(n: int) -> None:
    """Use n threads from now on, including in BLAS. Raises ValueError unless 1 <= n <= MAX_COUNT."""
    global _count
    if not 1 <= n <= MAX_COUNT:
        raise ValueError(f"threads: the number of threads is {n:,}; expected 1 to {MAX_COUNT:,}")
    with forks.lock:
        if not blas_on_one_thread.open:
            _restore()
        _count = n
        for library in _blas():
            library.set_num_threads(n)


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """Divide 0 ... n-1 into at most count() contiguous parts (start, stop) of nearly equal size, at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


class blas_on_one_thread(forks.computing):  # noqa: N801 - used as a function
    """A context manager in which BLAS uses only the calling thread, and no other thread forks. When the last active
    one exits, it restores the old setting."""

    def __enter__(self) -> None:
        global _before
        with forks.lock:
            super().__enter__()
            if not _before:
                _before = [(library, library.get_num_threads()) for library in _blas()]
                for library, _ in _before:
                    library.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        with forks.lock:
            super().__exit__()
            if not self.open:
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
    return [_openblas(found) for found in ThreadpoolController().select(user_api="blas").lib_controllers]


def _openblas(found: Any) -> BlasLibrary:
    """The functions of a library that threadpoolctl has found; those of OpenBLAS itself if it has threads of its own.

    Since version 3.8, threadpoolctl lets only one Python thread change OpenBLAS's number of threads. A second thread
    that trains would then use OpenBLAS's threads, which compete with the pool's, and be 10 to 50 times slower.
    PyDLL keeps the GIL during these calls, which take nanoseconds.
    """
    if found.internal_api == "openblas" and found.threading_layer != "openmp":
        library = ctypes.PyDLL(found.filepath)
        for prefix, suffix in itertools.product(("", "scipy_"), ("", "64_", "_64")):
            name = f"{prefix}openblas_{{}}_num_threads{suffix}"
            if hasattr(library, name.format("get")) and hasattr(library, name.format("set")):
                return BlasLibrary(library[name.format("get")], library[name.format("set")])
    return BlasLibrary(found.get_num_threads, found.set_num_threads)
