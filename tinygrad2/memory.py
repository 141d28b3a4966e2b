"""A memory pool for NumPy arrays: each step reuses the previous step's memory.

The operating system maps and zeroes the pages of a large array on the first write, and unmaps them when the array is
freed. This would take a large part of a training step. Large arrays therefore use blocks from a pool. A block returns
to the pool when the last view of its array is freed, by NumPy's reference counting. (CuPy has its own pool.)
"""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import DTypeLike

from tinygrad2 import forks

SMALL = 1 << 16  # bytes; for smaller arrays, NumPy's allocator is as fast
GRANULE = 1 << 16  # bytes; sizes are rounded up to a multiple of this, so that arrays of similar size can share blocks
FITS = 1.01  # a free block is also used if it is larger than needed by at most this factor
LINE = 64  # bytes per cache line; arrays are aligned to it
SLACK = 2.0  # the pool keeps at most this multiple of the maximum memory in use


class MemoryPool:
    """Blocks of memory, in use or free.

    held       the number of bytes in all blocks.
    used       the number of bytes in blocks that are in use.
    most_used  the maximum of `used` since the last trim().
    """

    def __init__(self) -> None:
        self.held = self.used = self.most_used = 0
        self._free: dict[int, list[np.ndarray]] = {}  # by size
        self._lock = threading.RLock()  # re-entrant, since an array may be freed while its thread holds the lock

    def take(self, nbytes: int) -> np.ndarray:
        """A block of at least `nbytes`, to be returned with give_back()."""
        size = -(-nbytes // GRANULE) * GRANULE + LINE
        with self._lock:
            fitting = [found for found in self._free if size <= found <= FITS * size and self._free[found]]
            block = self._free[min(fitting)].pop() if fitting else self._new(size)
            self.used += block.size
            self.most_used = max(self.most_used, self.used)
        return block

    def _new(self, size: int) -> np.ndarray:
        if self.held + size > SLACK * max(self.most_used, self.used + size):
            self.trim()  # the sizes have changed, so the free blocks no longer fit
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
        """Return all free blocks to the operating system."""
        with self._lock:
            free, self._free = self._free, {}  # swapped first, since an array may be freed in the meantime
            self.held -= sum(size * len(blocks) for size, blocks in free.items())
            self.most_used = self.used


class _BlockOwner:
    """The base object of an array that uses a block. When the last view of the array is freed, it returns the block."""

    __slots__ = ("_block", "_pool", "__array_interface__")

    def __init__(self, pool: MemoryPool, block: np.ndarray, shape: tuple[int, ...], dtype: np.dtype):
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


memory_pool = MemoryPool()
forks.locks.append(memory_pool._lock)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialized array, like numpy.empty. Large arrays use a block from the pool."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return np.empty(shape, dtype=dtype)
    block = memory_pool.take(nbytes)
    if dtype.kind == "V":  # bfloat16, which the array interface protocol does not support
        return np.asarray(_BlockOwner(memory_pool, block, shape, np.dtype(f"u{dtype.itemsize}"))).view(dtype)
    return np.asarray(_BlockOwner(memory_pool, block, shape, dtype))


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros, like numpy.zeros. Large arrays use a block from the pool."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
