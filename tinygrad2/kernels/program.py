"""A sequence of kernels on fixed arrays, such as a model's forward pass for one token, run by a single compiled call.

No Python code runs between two kernels; it would cost as much time as reading several megabytes. The kernels are those
of cpu.py, for float32 activations with few rows, so the results are bitwise identical.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from tinygrad2 import blas, threads
from tinygrad2.kernels import cached_attention, cpu, gemv, pool

FLOAT = np.float32(0)
GELU_GRAIN = 1 << 10  # minimum number of columns per thread


@functools.cache
def _layernorm_task(add: bool) -> pool.CompiledTask:
    """Compile the LayerNorm task, for one thread. Its arguments are the addresses of x, delta, weight, bias, epsilon,
    y, mean and 1 / standard deviation, then the shape of x. With `add`, it first computes x += delta."""

    def task(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (10,))
        rows, C = a[8], a[9]
        x, y = carray(pool.pointer(a[0], FLOAT), (rows, C)), carray(pool.pointer(a[5], FLOAT), (rows, C))
        weight, bias = carray(pool.pointer(a[2], FLOAT), (C,)), carray(pool.pointer(a[3], FLOAT), (C,))
        mean, rstd = carray(pool.pointer(a[6], FLOAT), (rows,)), carray(pool.pointer(a[7], FLOAT), (rows,))
        if add:
            cpu._add(x, carray(pool.pointer(a[1], FLOAT), (rows, C)), x)
        cpu._layernorm(x, weight, bias, carray(pool.pointer(a[4], FLOAT), (1,))[0], y, mean, rstd)

    return pool.task(task)


@functools.cache
def _linear_task() -> pool.CompiledTask:
    """Compile the task y = x w + bias, for columns start ... stop - 1 of y. Its arguments are those of gemv.py's tasks,
    then the address of the last of these tasks, then the address of the bias, or 0 for None."""

    def task(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (9,))
        rows, N = a[4], a[6]
        y = carray(pool.pointer(a[2], FLOAT), (rows, N))
        for i in range(rows):
            if a[8]:
                y[i, start:stop] = carray(pool.pointer(a[8], FLOAT), (N,))[start:stop]
            else:
                y[i, start:stop] = FLOAT
        pool.call(a[7], arguments, start, stop)

    return pool.task(task)


@functools.cache
def _gelu_task() -> pool.CompiledTask:
    """Compile the task y = GELU(x + bias), for columns start ... stop - 1. Its arguments are the addresses of x, bias
    and y, then the shape of x."""

    def task(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (5,))
        bias = carray(pool.pointer(a[1] + 4 * start, FLOAT), (stop - start,))
        for i in range(a[3]):
            first = 4 * (i * a[4] + start)
            x = carray(pool.pointer(a[0] + first, FLOAT), (1, stop - start))
            cpu._gelu(x, bias, carray(pool.pointer(a[2] + first, FLOAT), (1, stop - start)))

    return pool.task(task)


class Program:
    """A sequence of operations. Each method appends one, with the arrays that it reads and writes; `run` executes all.

    Arrays are float32 and contiguous; activations have few rows (see supports). Matrices may also be bfloat16.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, list[tuple[int, int]]]] = []  # the address of each task, and its parts
        self._arguments: list[np.ndarray] = []
        self._kept: list[Any] = []  # references that keep the arrays alive
        self._sums: dict[tuple[int, ...], np.ndarray] = {}  # by the sizes of the product
        self._at_position: list[np.ndarray] = []  # arguments that contain the position
        self._table: np.ndarray | None = None

    @staticmethod
    def supports(rows: int, head_size: int) -> bool:
        """Whether programs support this number of rows and attention heads of this size."""
        return rows <= cpu.GEMV_ROWS and cached_attention.supports(head_size)

    def layernorm(
        self, x: np.ndarray, delta: np.ndarray | None, weight: np.ndarray, bias: np.ndarray, eps: float, y: np.ndarray
    ) -> None:
        """x += delta, unless it is None; then y = layernorm(x)."""
        epsilon, statistics = np.array([eps], np.float32), np.empty((2, len(x)), np.float32)
        arrays = x, x if delta is None else delta, weight, bias, epsilon, y, statistics[0], statistics[1]
        self._add(_layernorm_task(delta is not None), arrays, x.shape, [(0, 1)])

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
        """y = x weight + bias."""
        sums = self._sums.setdefault((len(x), *weight.shape), gemv.new_sums(x, weight))
        arrays, sizes = (x, weight, y, sums), (len(x), *weight.shape)
        *before, (last, columns) = gemv.tasks(x, weight)
        for task, ranges in before:
            self._add(task, arrays, sizes, ranges)
        self._add(_linear_task(), arrays, (*sizes, last.address, 0 if bias is None else blas.address(bias)), columns)
        self._kept.append(bias)

    def gelu(self, x: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
        """y = GELU(x + bias), the tanh form."""
        self._add(_gelu_task(), (x, bias, y), x.shape, threads.parts(x.shape[1], GELU_GRAIN))

    def attention_cached(self, qkv: np.ndarray, cache: np.ndarray, n_head: int, out: np.ndarray) -> None:
        """out = attention for one new token per sequence, whose keys and values are added to the cache."""
        B, capacity, D = len(qkv), cache.shape[3], cache.shape[4]
        partial = np.empty((B, n_head, -(-capacity // cpu.CACHE_BLOCK), D + 2), np.float32)
        parts = len(threads.parts(B * n_head * capacity, max(1, cpu.CACHE_GRAIN // D)))
        attend, combine = cpu.cached_attention_tasks(32, D)
        numbers = B, n_head, capacity, 0, parts
        self._at_position.append(
            self._add(attend, (qkv, cache, partial, out), numbers, [(i, i + 1) for i in range(parts)])
        )
        self._at_position.append(self._add(combine, (qkv, cache, partial, out), numbers, [(0, parts)]))

    def _add(
        self, task: pool.CompiledTask, arrays: tuple[np.ndarray, ...], numbers: Any, ranges: list[tuple[int, int]]
    ) -> np.ndarray:
        arguments = np.array([*map(blas.address, arrays), *numbers], dtype=np.int64)
        self._steps.append((task.address, ranges))
        self._arguments.append(arguments)
        self._kept.append((task, arrays))
        return arguments

    def run(self, position: int) -> None:
        """Execute all operations, for tokens at this position of their sequences."""
        if self._table is None:
            steps = zip(self._steps, self._arguments, strict=True)
            self._table = pool.table([(address, arguments, ranges) for (address, ranges), arguments in steps])
        for arguments in self._at_position:
            arguments[7] = position
        pool.run_table(self._table)
