"""Products of a few rows with a large matrix, y += x w. They are memory-bound and take most of the time of generation.

BLAS is optimized for matrices whose elements are reused many times. Here each weight is read once, for all rows of x,
so the run time is the time to read w. The two vectorized loops are LLVM IR, built with llvmlite, since the compiler
does not generate them from plain loops. Weights are float32 or bfloat16 (the upper half of a float32).
"""

from __future__ import annotations

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
DEPTH = 4  # rows of w, or of its transpose, per pass
COLUMNS = 1024  # columns of w per pass, so that DEPTH rows of them stay in the L1 cache for all rows of x
GRAIN = 1 << 16  # minimum number of weights per thread

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


def _weights(
    builder: ir.IRBuilder, address: ir.Value, distance: ir.Value, index: ir.Value, bits: int, depth: int
) -> list[ir.Value]:
    """LANES weights from each of `depth` rows. With several rows, the weights of the next rows are prefetched; with
    one, the access is sequential, and the processor's own prefetcher does better."""
    byte, flag = ir.IntType(8), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    vectors = []
    for d in range(depth):
        if depth > 1:
            later = builder.add(builder.mul(_WORD(depth + d), distance), index)
            place = at(builder, address, later, bits // 8, byte)
            builder.call(prefetch, [place, flag(0), flag(3), flag(1)])  # read, high temporal locality, data cache
        vectors.append(load(builder, address, builder.add(builder.mul(_WORD(d), distance), index), bits))
    return vectors


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
    """y[r, j] += sum over d < depth of x[r, d] w[d, j], for r < rows and j < n; n is a multiple of LANES."""
    indices = [[builder.add(builder.mul(_WORD(r), ldx), _WORD(d)) for d in range(depth)] for r in range(rows)]
    numbers = [[builder.load(at(builder, x, index, 4, _FLOAT)) for index in row] for row in indices]
    factors = [[spread(builder, number) for number in row] for row in numbers]
    with cgutils.for_range_slice(builder, _WORD(0), n, _WORD(LANES), inc=True) as (j, _):
        weights = _weights(builder, w, ldw, j, bits, depth)
        for r in range(rows):
            place = at(builder, y, builder.add(builder.mul(_WORD(r), ldy), j), 4, vector_type())
            total = builder.load(place, align=4)
            for factor, weight in zip(factors[r], weights, strict=True):
                total = fma(builder, factor, weight, total)
            builder.store(total, place, align=4)


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
    """y[r, d] += sum over j < n of x[r, j] w[d, j], for r < rows and d < depth; n is a multiple of LANES."""
    zero = ir.Constant(vector_type(), [0.0] * LANES)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(depth)] for _ in range(rows)]
    with cgutils.for_range_slice(builder, _WORD(0), n, _WORD(LANES), inc=True) as (j, _):
        weights = _weights(builder, w, ldw, j, bits, depth)
        for r in range(rows):
            numbers = load(builder, x, builder.add(builder.mul(_WORD(r), ldx), j), 32)
            for d in range(depth):
                place = totals[r][d]
                builder.store(fma(builder, numbers, weights[d], builder.load(place)), place)
    for r in range(rows):
        for d in range(depth):
            place = at(builder, y, builder.add(builder.mul(_WORD(r), ldy), _WORD(d)), 4, _FLOAT)
            builder.store(builder.fadd(builder.load(place), lane_sum(builder, builder.load(totals[r][d]))), place)


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
    """Compile the task for columns start ... stop - 1 of w. Its arguments: the addresses of x, w, y, then M, K, N."""
    # Numba's disk cache is keyed by the values of closure variables. Only numbers compare equal across processes.
    size, zero = bits // 8, np.float32(0) if bits == 32 else np.uint16(0)

    def rows_of_w(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (6,))
        x, w, y, M, K, N = a[0], a[1], a[2], a[3], a[4], a[5]
        xs, ys = carray(pool.pointer(x, np.float32(0)), (M, K)), carray(pool.pointer(y, np.float32(0)), (M, N))
        ws = carray(pool.pointer(w, zero), (K, N))
        columns = COLUMNS if M > 2 else 4 * COLUMNS  # with one or two rows of x, longer runs of w are read faster
        whole, ld = K - K % DEPTH, columns + LANES
        # Accumulate in a buffer, since rows of y may be a multiple of 4096 bytes apart. They would evict each other
        # from the cache, and a load from w would stall on a store to y with the same low 12 bits (4K aliasing).
        sums = np.empty((M, ld), dtype=np.float32)
        for first in range(start, stop, columns):
            last = min(first + columns, stop)
            n = (last - first) // LANES * LANES
            sums[:] = 0
            for k in range(0, whole, DEPTH):
                m = 0
                while m < M:
                    rows, weights = x + 4 * (m * K + k), w + size * (k * N + first)
                    m += _multiply(bits, False, DEPTH, M - m, rows, K, weights, N, sums.ctypes.data + 4 * m * ld, ld, n)
            for m in range(M):
                for j in range(n):
                    ys[m, first + j] += sums[m, j]
                for j in range(first + n, last):  # remainders at the edges
                    for k in range(whole):
                        ys[m, j] += xs[m, k] * wide(ws[k, j])
                for k in range(whole, K):
                    for j in range(first, last):
                        ys[m, j] += xs[m, k] * wide(ws[k, j])

    def columns_of_w(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (6,))
        x, w, y, M, K, N = a[0], a[1], a[2], a[3], a[4], a[5]
        xs, ys = carray(pool.pointer(x, np.float32(0)), (M, K)), carray(pool.pointer(y, np.float32(0)), (M, N))
        ws = carray(pool.pointer(w, zero), (N, K))
        # Process DEPTH rows of w per pass, so that each load from x is used DEPTH times; one row if x has few rows.
        whole, n = start if M <= ROWS else start + (stop - start) // DEPTH * DEPTH, K // LANES * LANES
        for j in range(start, whole, DEPTH):
            m, weights = 0, w + size * j * K
            while m < M:
                m += _multiply(bits, True, DEPTH, M - m, x + 4 * m * K, K, weights, K, y + 4 * (m * N + j), N, n)
        for j in range(whole, stop):
            m, weights = 0, w + size * j * K
            while m < M:
                m += _multiply(bits, True, 1, M - m, x + 4 * m * K, K, weights, K, y + 4 * (m * N + j), N, n)
        for m in range(M):
            for j in range(start, stop):
                for k in range(n, K):
                    ys[m, j] += xs[m, k] * wide(ws[j, k])

    return pool.task(columns_of_w if by_columns else rows_of_w)


_tasks: dict[tuple[int, bool], pool.CompiledTask] = {}  # compiled at first use


def supports(x: np.ndarray, weight: np.ndarray) -> bool:
    """Whether add_product supports these dtypes and the weight's memory layout."""
    order = weight.flags.c_contiguous or weight.flags.f_contiguous
    return x.dtype == np.float32 and weight.dtype in (np.float32, bfloat16) and order


def add_product(x: np.ndarray, weight: np.ndarray, y: np.ndarray) -> None:
    """y += x weight: x (M, K) and y (M, N) row-major; weight (K, N), row- or column-major, float32 or bfloat16."""
    K, N = weight.shape
    addresses = (blas.address(array) for array in (x, weight, y))
    arguments = np.array([*addresses, len(x), K, N], dtype=np.int64)
    pool.each_compiled(task_for(weight), arguments, ranges(weight))


def task_for(weight: np.ndarray) -> pool.CompiledTask:
    """The task of add_product for weights of this dtype and layout."""
    kind = (8 * weight.itemsize, not weight.flags.c_contiguous)
    if kind not in _tasks:
        _tasks[kind] = _task(*kind)
    return _tasks[kind]


def ranges(weight: np.ndarray) -> list[tuple[int, int]]:
    """Divide the columns of this weight among the threads, at multiples of LANES: the remainder after the last complete
    vector is summed in a different order."""
    K, N = weight.shape
    pieces = threads.parts(-(-N // LANES), max(64, GRAIN // max(1, K)) // LANES)
    return [(a * LANES, min(b * LANES, N)) for a, b in pieces]
