"""How many threads compute on the CPU, and how work is cut for them. The threads themselves: kernels/pool.py."""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

from tinygrad2 import machine

_count = machine.usable_threads()
_lock = threading.Lock()
# An interrupt may come at any step: what BLAS was told is noted before it is told, and who asked is forgotten with it.
_before: list[tuple[Any, int]] = []  # the BLAS libraries and how many threads each had, while somebody asks for one
_asking: weakref.WeakSet[blas_on_one_thread] = weakref.WeakSet()


def count() -> int:
    """How many threads compute."""
    return _count


def set_count(n: int) -> None:
    """Compute on n threads from now on, BLAS too."""
    global _count
    if n < 1:
        raise ValueError(f"threads: {n} asked for; expected at least 1")
    with _lock:
        if not _asking:
            _put_back()
        _count = n
        for library in _blas():
            library.set_num_threads(n)


def parts(n: int, grain: int) -> list[tuple[int, int]]:
    """0 ... n-1 in at most count() contiguous parts (start, stop) of nearly equal size, each of at least `grain`."""
    pieces = max(1, min(_count, n // max(1, grain)))
    return [(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]


class blas_on_one_thread:  # noqa: N801 - used as a function
    """BLAS computes each call on the thread that makes it. Of several that ask for it, the last puts back what was."""

    def __enter__(self) -> None:
        global _before
        with _lock:
            if not _asking:
                _put_back()
                _before = [(library, library.get_num_threads()) for library in _blas()]
                for library, _ in _before:
                    library.set_num_threads(1)
            _asking.add(self)

    def __exit__(self, *_: object) -> None:
        with _lock:
            _asking.discard(self)
            if not _asking:
                _put_back()


def _put_back() -> None:
    """BLAS as it was before somebody asked for one thread."""
    global _before
    for library, count in _before:
        library.set_num_threads(count)
    _before = []


@cache
def _blas() -> list[Any]:
    """The BLAS libraries that are loaded."""
    return ThreadpoolController().select(user_api="blas").lib_controllers
