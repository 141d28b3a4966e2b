"""Memory for NumPy arrays that is used again: what one step computes in, the next one finds warm.

The system gives a large array page by page at its first touch, zeroed, and takes it back when the array dies. For a
training step that costs as much time as many of its kernels. Here an array stands on a block of memory that goes back
to a pool when the last view of the array is gone: NumPy's own reference counts say when. (CuPy has such a pool.)
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

SMALL = 1 << 16  # bytes; below this the system's allocator is as quick
GRANULE = 1 << 16  # bytes; sizes are rounded up to whole granules, so that nearly equal arrays share blocks
LINE = 64  # bytes of a cache line, where arrays begin
SLACK = 2.0  # how much more memory than was ever in use at once the pool may hold


class Pool:
    """Blocks of memory, in use or free.

    held       bytes of all blocks.
    used       bytes of those that arrays stand on;  most_used  the most there have been at once.
    """

    def __init__(self) -> None:
        self.held = self.used = self.most_used = 0
        self._free: dict[int, list[np.ndarray]] = {}  # by size
        self._lock = threading.RLock()  # (an array may die, and give its block back, while its thread holds the lock)

    def take(self, nbytes: int) -> np.ndarray:
        """A block of at least `nbytes`, to be given back."""
        size = -(-nbytes // GRANULE) * GRANULE + LINE
        with self._lock:
            blocks = self._free.get(size)
            block = blocks.pop() if blocks else self._new(size)
            self.used += size
            self.most_used = max(self.most_used, self.used)
        return block

    def _new(self, size: int) -> np.ndarray:
        if self.held + size > SLACK * max(self.most_used, self.used + size):
            self.trim()  # the sizes have changed: what is free serves no more
        try:
            block = np.empty(size, dtype=np.uint8)
        except MemoryError:
            self.trim()
            block = np.empty(size, dtype=np.uint8)
        self.held += size
        return block

    def give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self.used -= block.size
            self._free.setdefault(block.size, []).append(block)

    def trim(self) -> None:
        """Return the memory that no array uses to the system."""
        with self._lock:
            free, self._free = self._free, {}  # (meanwhile an array may die)
            self.held -= sum(size * len(blocks) for size, blocks in free.items())
            self.most_used = self.used


class _Lease:
    """Holds a block for one array, whose base it is: when no view of the array is left, it gives the block back."""

    __slots__ = ("_block", "_pool", "__array_interface__")

    def __init__(self, pool: Pool, block: np.ndarray, shape: tuple[int, ...], dtype: np.dtype):
        self._pool, self._block = pool, block
        address = self._block.ctypes.data
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (address + -address % LINE, False),
        }

    def __del__(self) -> None:
        self._pool.give_back(self._block)


pool = Pool()


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of arbitrary contents, like numpy.empty; a large one stands on a block of the pool."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return np.empty(shape, dtype=dtype)
    return np.asarray(_Lease(pool, pool.take(nbytes), shape, dtype))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The same, filled with zeros."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
