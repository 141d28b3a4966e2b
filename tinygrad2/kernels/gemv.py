"""Products of a few rows with a large matrix, y += x w. They are memory-bound and take most of the generation time.

BLAS is optimized for matrices whose elements are reused many times. Here each weight is read once, for all rows of x,
so the run time is the time to read w. Only sequential reads reach the full memory bandwidth, so each thread reads a
contiguous part of w: rows of a row-major matrix, whose partial sums are added in a second step, or columns of a
column-major one.

The two vectorized loops are LLVM IR, built with llvmlite, since the compiler does not generate them from plain loops.
Weights are float32 or bfloat16 (the upper half of a float32).
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import binding, ir
from ml_dtypes import bfloat16
from numba import carray, types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from tinygrad2 import blas, threads
from tinygrad2.kernels import pool
from tinygrad2.kernels.bfloat16 import wide

_WIDE = binding.get_host_cpu_features().get("avx512f", False)
LANES, ROWS = (16, 6) if _WIDE else (8, 2)  # elements per vector; rows of x per pass, limited by the registers
VECTORS = 4  # vectors of columns per pass, for a row-major w
DEPTH, COLUMN_DEPTH = 8, 2  # rows of a row-major w, or columns of a column-major one, per pass
CHUNKS = 4  # parts of the rows of a row-major w with separate sums; more parts would write and read more sums
PADDING = 16  # numbers between rows of sums; rows 4096 bytes apart would evict each other from the cache
GRAIN = 1 << 16  # minimum number of weights per thread
SUMS_GRAIN = 1 << 11  # minimum number of elements of y per thread, to add the sums

_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)


def vector_type() -> ir.VectorType:
    return ir.VectorType(_FLOAT, LANES)


def at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, size: int, kind: ir.Type) -> ir.Value:
    """A pointer of type `kind` to element `index` of an array at an address, with elements of `size` bytes."""
    return builder.inttoptr(builder.add(address, builder.mul(index, _WORD(size))), kind.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, bits: int) -> ir.Value:
    """LANES weights from `index` on, as a float32 vector."""
    if bits == 32:
        return builder.load(at(builder, address, index, 4, vector_type()), align=4)
    halves = builder.load(at(builder, address, index, 2, ir.VectorType(ir.IntType(16), LANES)), align=2)
    integers = ir.VectorType(ir.IntType(32), LANES)
    return builder.bitcast(
        builder.shl(builder.zext(halves, integers), ir.Constant(integers, [16] * LANES)), vector_type()
    )


def _prefetch(builder: ir.IRBuilder, address: ir.Value, nbytes: int) -> None:
    """Prefetch `nbytes` bytes, from an address on, into the second-level cache."""
    byte, flag = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for offset in range(0, nbytes, 64):
        pointer = builder.inttoptr(builder.add(address, _WORD(offset)), byte.as_pointer())
        builder.call(prefetch, [pointer, flag(0), flag(2), flag(1)])  # for reading, second level, data


def spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """Broadcast a number to a vector."""
    undefined, first = ir.Constant(vector_type(), ir.Undefined), ir.IntType(32)(0)
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(undefined, number, first), undefined, order)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    kind = ir.FunctionType(vector_type(), [vector_type()] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def lane_sum(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of a vector's elements, by pairwise halving."""
    kind = ir.FunctionType(_FLOAT, [_FLOAT, vector_type()])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(add, [_FLOAT(0.0), vector], fastmath=("reassoc",))


def _plain(
    builder: ir.IRBuilder,
    rows: int,
    bits: int,
    depth: int,
    x: ir.Value,
    ldx: ir.Value,
    w: ir.Value,
    ldw: ir.Value,
    y: ir.Value,
    ldy: ir.Value,
    n: ir.Value,
) -> None:
    """y[r, j] += sum over d < depth of x[r, d] w[d, j], for r < rows and j < n; n is a multiple of VECTORS LANES.

    With several rows, the reads are not sequential, so the next `depth` rows of w are prefetched in the order of their
    addresses. With one row, they are sequential, and the hardware prefetcher does better.
    """
    size, width = bits // 8, VECTORS * LANES
    ahead = cgutils.alloca_once_value(builder, w)
    builder.store(builder.add(w, builder.mul(ldw, _WORD(depth * size))), ahead)
    column = cgutils.alloca_once_value(builder, _WORD(0))
    builder.store(_WORD(0), column)
    gap = builder.mul(builder.sub(ldw, n), _WORD(size))  # from the end of one row's part to the start of the next
    sums = [[cgutils.alloca_once(builder, vector_type()) for _ in range(VECTORS)] for _ in range(rows)]
    with cgutils.for_range_slice(builder, _WORD(0), n, _WORD(width), inc=True) as (j, _):
        pointers = [
            [at(builder, y, builder.add(row, _WORD(v * LANES)), 4, vector_type()) for v in range(VECTORS)]
            for row in (builder.add(builder.mul(_WORD(r), ldy), j) for r in range(rows))
        ]
        for r in range(rows):
            for total, pointer in zip(sums[r], pointers[r], strict=True):
                builder.store(builder.load(pointer, align=4), total)
        with cgutils.for_range_slice(builder, _WORD(0), _WORD(depth), _WORD(1), inc=True) as (d, _):
            if rows > 1 and depth > 1:
                _prefetch(builder, builder.load(ahead), width * size)
                reached = builder.add(builder.load(column), _WORD(width))
                ends = builder.icmp_signed("==", reached, n)
                step = builder.add(_WORD(width * size), builder.select(ends, gap, _WORD(0)))
                builder.store(builder.add(builder.load(ahead), step), ahead)
                builder.store(builder.select(ends, _WORD(0), reached), column)
            first = builder.add(builder.mul(d, ldw), j)
            weights = [load(builder, w, builder.add(first, _WORD(v * LANES)), bits) for v in range(VECTORS)]
            for r in range(rows):
                index = builder.add(builder.mul(_WORD(r), ldx), d)
                factor = spread(builder, builder.load(at(builder, x, index, 4, _FLOAT)))
                for total, weight in zip(sums[r], weights, strict=True):
                    builder.store(fma(builder, factor, weight, builder.load(total)), total)
        for r in range(rows):
            for total, pointer in zip(sums[r], pointers[r], strict=True):
                builder.store(builder.load(total), pointer, align=4)


def _transposed(
    builder: ir.IRBuilder,
    rows: int,
    bits: int,
    depth: int,
    x: ir.Value,
    ldx: ir.Value,
    w: ir.Value,
    ldw: ir.Value,
    y: ir.Value,
    ldy: ir.Value,
    n: ir.Value,
) -> None:
    """y[r, d] += sum over j < n of x[r, j] w[d, j], for r < rows and d < depth; n is a multiple of LANES.

    With several rows of w, the rows 2 depth ... 3 depth - 1 are prefetched, as in _plain.
    """
    zero = ir.Constant(vector_type(), [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(depth)] for _ in range(rows)]
    after = builder.add(w, builder.mul(ldw, _WORD(2 * depth * bits // 8)))
    with cgutils.for_range_slice(builder, _WORD(0), n, _WORD(LANES), inc=True) as (j, _):
        if depth > 1:
            nbytes = depth * LANES * bits // 8
            _prefetch(builder, builder.add(after, builder.mul(j, _WORD(nbytes // LANES))), nbytes)
        weights = [load(builder, w, builder.add(builder.mul(_WORD(d), ldw), j), bits) for d in range(depth)]
        for r in range(rows):
            numbers = load(builder, x, builder.add(builder.mul(_WORD(r), ldx), j), 32)
            for d in range(depth):
                pointer = totals[r][d]
                builder.store(fma(builder, numbers, weights[d], builder.load(pointer)), pointer)
    for r in range(rows):
        for d in range(depth):
            pointer = at(builder, y, builder.add(builder.mul(_WORD(r), ldy), _WORD(d)), 4, _FLOAT)
            builder.store(builder.fadd(builder.load(pointer), lane_sum(builder, builder.load(totals[r][d]))), pointer)


@intrinsic(prefer_literal=True)
def _multiply(
    typing_context: Context,
    bits: types.Type,
    transposed: types.Type,
    depth: types.Type,
    left: types.Type,
    x: types.Type,
    ldx: types.Type,
    w: types.Type,
    ldw: types.Type,
    y: types.Type,
    ldy: types.Type,
    n: types.Type,
) -> pool.Intrinsic:
    """Run the loop for the next min(left, ROWS) rows of x, where `left` is the number of remaining rows. Returns the
    number of rows processed."""
    loop = _transposed if transposed.literal_value else _plain

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        left, *rest = arguments[3:]
        taken = builder.select(builder.icmp_signed("<", left, _WORD(ROWS)), left, _WORD(ROWS))
        end = builder.append_basic_block()
        choice = builder.switch(taken, end)
        for rows in range(1, ROWS + 1):
            with builder.goto_block(builder.append_basic_block()):
                choice.add_case(_WORD(rows), builder.block)
                loop(builder, rows, bits.literal_value, depth.literal_value, *rest)
                builder.branch(end)
        builder.position_at_end(end)
        return taken

    return types.int64(bits, transposed, depth, *[types.int64] * 8), generate


def _task(bits: int, by_columns: bool) -> pool.CompiledTask:
    """Compile the task that reads a part of w. Its arguments: the addresses of x, w, y, and the partial sums (CHUNKS,
    M, N + PADDING), then M, K, N. For a column-major w the part is columns start ... stop - 1, and their products are
    added to y. The rows of a row-major w are divided into CHUNKS chunks, and each chunk into units of VECTORS LANES
    columns. The part is units start ... stop - 1 of all chunks; their products are the partial sums, for _sums_task."""
    # Numba's disk cache is keyed by the values of closure variables. Only numbers compare equal across processes.
    size, zero = bits // 8, np.float32(0) if bits == 32 else np.uint16(0)

    def rows_of_w(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (7,))
        x, w, M, K, N = a[0], a[1], a[4], a[5], a[6]
        xs, ws = carray(pool.pointer(x, np.float32(0)), (M, K)), carray(pool.pointer(w, zero), (K, N))
        sums, ld = carray(pool.pointer(a[3], np.float32(0)), (CHUNKS, M, N + PADDING)), N + PADDING
        width, units = VECTORS * LANES, max(1, -(-N // (VECTORS * LANES)))
        rows = -(-K // (CHUNKS * DEPTH)) * DEPTH
        for chunk in range(start // units, -(-stop // units)):
            first, last = max(start - chunk * units, 0) * width, min((stop - chunk * units) * width, N)
            whole, found = (last - first) // width * width, sums[chunk]
            found[:, first:last] = 0
            k, end = min(chunk * rows, K), min((chunk + 1) * rows, K)
            while k < end:
                depth = DEPTH if M > 1 and end - k >= DEPTH else 1  # one row of x: sequential reads
                weights, y, m = w + size * (k * N + first), found.ctypes.data + 4 * first, 0
                while m < M:
                    numbers, results = x + 4 * (m * K + k), y + 4 * m * ld
                    if depth == 1:
                        m += _multiply(bits, False, 1, M - m, numbers, K, weights, N, results, ld, whole)
                    else:
                        m += _multiply(bits, False, DEPTH, M - m, numbers, K, weights, N, results, ld, whole)
                for i in range(k, k + depth):  # the columns after the last complete pass
                    for m in range(M):
                        for j in range(first + whole, last):
                            found[m, j] += xs[m, i] * wide(ws[i, j])
                k += depth

    def columns_of_w(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (7,))
        x, w, y, M, K, N = a[0], a[1], a[2], a[4], a[5], a[6]
        xs, ys = carray(pool.pointer(x, np.float32(0)), (M, K)), carray(pool.pointer(y, np.float32(0)), (M, N))
        ws = carray(pool.pointer(w, zero), (N, K))
        # Process several columns of w per pass, so that each load from x is used for all; only one if x has one row.
        whole, n = start if M == 1 else stop - (stop - start) % COLUMN_DEPTH, K // LANES * LANES
        for j in range(start, whole, COLUMN_DEPTH):
            m, weights = 0, w + size * j * K
            while m < M:
                m += _multiply(bits, True, COLUMN_DEPTH, M - m, x + 4 * m * K, K, weights, K, y + 4 * (m * N + j), N, n)
        for j in range(whole, stop):
            m, weights = 0, w + size * j * K
            while m < M:
                m += _multiply(bits, True, 1, M - m, x + 4 * m * K, K, weights, K, y + 4 * (m * N + j), N, n)
        for m in range(M):
            for j in range(start, stop):
                for k in range(n, K):
                    ys[m, j] += xs[m, k] * wide(ws[j, k])

    return pool.task(columns_of_w if by_columns else rows_of_w)


@functools.cache
def _sums_task() -> pool.CompiledTask:
    """Compile the task that adds the partial sums to columns start ... stop - 1 of y, with the arguments of _task."""

    def add_sums(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (7,))
        M, N = a[4], a[6]
        y = carray(pool.pointer(a[2], np.float32(0)), (M, N))
        sums = carray(pool.pointer(a[3], np.float32(0)), (CHUNKS, M, N + PADDING))
        for m in range(M):
            for j in range(start, stop):
                y[m, j] += (sums[0, m, j] + sums[1, m, j]) + (sums[2, m, j] + sums[3, m, j])

    return pool.task(add_sums)


_tasks: dict[tuple[int, bool], pool.CompiledTask] = {}  # compiled on first use


def supports(x: np.ndarray, weight: np.ndarray) -> bool:
    """Whether add_product supports these dtypes and the weight's memory layout."""
    order = weight.flags.c_contiguous or weight.flags.f_contiguous
    return x.dtype == np.float32 and weight.dtype in (np.float32, bfloat16) and order


def add_product(x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """y += x weight: x (M, K) and y (M, N) row-major; weight (K, N), row- or column-major, float32 or bfloat16."""
    arrays = x, weight, y, new_sums(x, weight)
    arguments = np.array([*map(blas.address, arrays), len(x), *weight.shape], dtype=np.int64)
    pool.run_table(pool.table([(task.address, arguments, ranges) for task, ranges in tasks(x, weight)]))


def new_sums(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Memory for the partial sums of the tasks for x and weight. Other products of the same sizes may share it."""
    shape = (CHUNKS, len(x), weight.shape[1] + PADDING) if weight.flags.c_contiguous else (0,)
    return np.empty(shape, np.float32)


def tasks(x: np.ndarray, weight: np.ndarray) -> list[tuple[pool.CompiledTask, list[tuple[int, int]]]]:
    """The tasks of add_product and their ranges; only the last writes to y, and its ranges are columns of y.

    Each thread's part begins at a multiple of the vector length, since a remainder is summed in a different order.
    """
    by_columns = not weight.flags.c_contiguous
    kind = (8 * weight.itemsize, by_columns)
    if kind not in _tasks:
        _tasks[kind] = _task(*kind)
    K, N = weight.shape
    if by_columns:
        pieces = threads.parts(-(-N // LANES), max(64, GRAIN // max(1, K)) // LANES)
        return [(_tasks[kind], [(a * LANES, min(b * LANES, N)) for a, b in pieces])]
    width = VECTORS * LANES
    units = threads.parts(CHUNKS * -(-N // width), GRAIN * CHUNKS // max(1, K * width))
    return [(_tasks[kind], units), (_sums_task(), threads.parts(N, max(1, SUMS_GRAIN // max(1, len(x)))))]
