"""Fused kernels for NumPy arrays, compiled by Numba: faster versions of the functions in reference.py, with the same
names and signatures.

They are faster because they make fewer passes over memory: GELU in NumPy reads its array a dozen times, but the kernel
reads it once. The formulas are those of reference.py; comments note where the arithmetic differs. Each function splits
its rows into parts, one per thread (see threads.py). Sums over rows are computed as partial sums of fixed-size chunks,
added in order, so that they do not depend on the number of threads. A matrix product is split into parts; BLAS computes
each part on one thread.

Arrays are float32, float64 or bfloat16; compiled code converts bfloat16 to float32 when reading (see bfloat16.py).
Activations, their gradients and the copies of the parameters may be bfloat16. Statistics, sums and the gradients of
parameters are then float32. oneDNN computes products of bfloat16 matrices if the processor has bfloat16 instructions;
otherwise they are computed in float32 and rounded.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import carray, njit, types
from numba.core import event
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic, overload
from numba.np.numpy_support import from_dtype

from tinygrad2 import blas, forks, memory, random, reference, threads
from tinygrad2.array import Array
from tinygrad2.kernels import cached_attention, gemv, onednn, pool
from tinygrad2.kernels.bfloat16 import as_float32, bits, cast, convert, narrow, wide
from tinygrad2.kernels.token_runs import token_runs
from tinygrad2.precision import sum_dtype
from tinygrad2.reference import MAX_RUN, row_sum, split_heads


def _compiled(function: F, nogil: bool = True, inline: bool = False) -> F:
    """Compile on the first call with each combination of argument types. The result is cached on disk if possible.

    inline  required for a function with loops that compiled functions call. Otherwise the process that compiles it may
            use another copy of its code than the processes that read the cache, with sums in another order.
    """
    # The compiler may reorder sums to vectorize them, but may not assume that there are no NaNs or infinities.
    options: dict[str, Any] = {
        "nogil": nogil,
        "forceinline": inline,
        "fastmath": {"reassoc", "contract", "arcp", "nsz"},
        "error_model": "numpy",
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this file's folder nor the user's cache folder is writable
        return njit(**options)(function)


class _Notice(event.Listener):
    """Prints a notice, once per process, when compilation starts, since that takes seconds. Functions cached on disk
    are not compiled."""

    said = False

    def on_start(self, compiling: event.Event) -> None:
        if not self.said and compiling.data["dispatcher"].py_func.__module__ == __name__:
            self.said = True
            print("compiling kernels for this processor (first run only, 10 to 60 s) ...", file=sys.stderr, flush=True)

    def on_end(self, compiling: event.Event) -> None:
        pass


notice = _Notice()
event.register("numba:compile", notice)

F = TypeVar("F", bound=Callable)
Library = tuple[int, bool]  # the address of a BLAS library's gemm, and whether its integers are 64-bit
PhiloxKey = tuple[np.uint64, np.uint64, np.uint64, np.uint64]  # seed, site, step, threshold: see _dropout
ROW_CHUNK = 64  # rows per partial sum of a parameter's gradient
FLAT = 1 << 15  # elements of a flat buffer processed at a time
GRAIN = 1 << 18  # minimum number of elements per thread


# ---------------------------------------------------------------------------------------------------------------------
# exp and the maximum of a row, written so that the compiler vectorizes them. (They have no annotations, because Numba
# compares the parameters of an overload, including annotations, with those of its implementation.)
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def _float_from_bits(typing_context: Context, bits: types.Type) -> pool.Intrinsic:
    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_from_float(typing_context: Context, x: types.Type) -> pool.Intrinsic:
    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


def _exp(x: float) -> float:
    raise AssertionError("call this only from compiled functions")


@overload(_exp, inline="always")
def _exp_overload(x):
    """float32: e^x = 2^n e^r, where n is the nearest integer to x / ln 2 and e^r, |r| <= ln 2 / 2, is approximated by a
    polynomial (expf of the Cephes library, with a relative error of 1e-7). float64: math.exp."""
    if x != types.float32:
        return lambda x: math.exp(x)
    f = np.float32

    def exp32(x):
        c = min(max(x, f(-87.3)), f(88.7))  # float32 exp underflows or overflows beyond these limits
        n = np.floor(c * f(1.44269504) + f(0.5))
        r = c - n * f(0.693359375) + n * f(2.12194440e-4)  # ln 2 in two parts, so that n ln 2 is exact
        p = f(1.9875691500e-4) * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        y = (p * r * r + r + f(1)) * _float_from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
        return y if x == x else x  # NaN stays NaN

    return exp32


def _largest(row: np.ndarray, n: int) -> float:
    raise AssertionError("call this only from compiled functions")


@overload(_largest)
def _largest_overload(row, n):
    """The maximum of row[:n]. The compiler does not vectorize a maximum of floats, because of NaN. So float32 and
    bfloat16 are compared as integers, after flipping the bits of negative numbers, which preserves their order. NaN
    compares as the largest number or, if its sign bit is set, as the smallest; then exp(row - largest) is NaN."""
    if row.dtype not in (types.float32, types.uint16):

        def largest64(row, n):
            best = row[0]
            for j in range(n):
                best = max(best, row[j]) if row[j] == row[j] else row[j]
            return best

        return largest64
    sign, rest = np.int32(31), np.int32(0x7FFFFFFF)

    def largest32(row, n):
        best = np.int32(-(2**31))
        for j in range(n):
            word = _bits_from_float(wide(row[j]))
            best = max(best, word ^ ((word >> sign) & rest))
        return _float_from_bits(best ^ ((best >> sign) & rest))

    return largest32


def _rows(x: np.ndarray) -> np.ndarray:
    """x as a contiguous matrix."""
    return np.ascontiguousarray(x).reshape(-1, x.shape[-1])


def _row_parts(n: int, width: int) -> list[tuple[int, int]]:
    """Split the rows 0 ... n-1 among the threads, at multiples of ROW_CHUNK."""
    chunks = -(-n // ROW_CHUNK)
    return [
        (a * ROW_CHUNK, min(b * ROW_CHUNK, n)) for a, b in threads.parts(chunks, max(1, GRAIN // (ROW_CHUNK * width)))
    ]


def _partial(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros for the partial sums over the rows of a matrix, one row per chunk."""
    return memory.zeros((-(-shape[0] // ROW_CHUNK), shape[1]), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Linear
# ---------------------------------------------------------------------------------------------------------------------


def _gemm_with_integers_of(bits: int) -> Callable[..., None]:
    @intrinsic
    def call(
        typing_context: Context,
        address: types.Type,
        ta: types.Type,
        tb: types.Type,
        m: types.Type,
        n: types.Type,
        k: types.Type,
        alpha: types.Type,
        a: types.Type,
        lda: types.Type,
        b: types.Type,
        ldb: types.Type,
        beta: types.Type,
        c: types.Type,
        ldc: types.Type,
    ) -> pool.Intrinsic:
        """Call cblas_?gemm by its address, with the addresses of row-major matrices."""
        enum, size, place = types.int32, types.int64, types.intp

        def generate(
            context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
        ) -> ir.Value:
            number, i32, integer = context.get_value_type(alpha), ir.IntType(32), ir.IntType(bits)
            pointer = number.as_pointer()
            kinds = [i32] * 3 + [integer] * 3 + [number, pointer, integer, pointer, integer, number, pointer, integer]
            function = ir.FunctionType(ir.VoidType(), kinds)
            values = [i32(blas.ROW_MAJOR), *arguments[1:]]
            for i, kind in enumerate(kinds):
                if kind is pointer:
                    values[i] = builder.inttoptr(values[i], pointer)
                elif kind is integer and bits < 64:
                    values[i] = builder.trunc(values[i], integer)
            builder.call(builder.inttoptr(arguments[0], function.as_pointer()), values)
            return context.get_dummy_value()

        kinds = (place, enum, enum, size, size, size, alpha, place, size, place, size, alpha, place, size)
        return types.void(*kinds), generate

    return call


_gemm64, _gemm32 = _gemm_with_integers_of(64), _gemm_with_integers_of(32)
_PLAIN, _TRANSPOSED = np.int32(blas.PLAIN), np.int32(blas.TRANSPOSED)


@njit(inline="always")
def _gemm(
    library: Library,
    ta: np.int32,
    tb: np.int32,
    m: int,
    n: int,
    k: int,
    alpha: np.floating,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    beta: np.floating,
    c: int,
    ldc: int,
) -> None:
    address, wide = library
    if wide:
        _gemm64(address, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
    else:
        _gemm32(address, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)


GEMM_FLOPS = 1 << 23  # minimum FLOPs per thread of a matrix product; they take about 50 microseconds


def _product_task() -> pool.CompiledTask:
    """Compile the task of a matrix product, out = a b or out += a b: rows or columns start ... stop - 1 of out."""

    def task(arguments: int, start: int, stop: int) -> None:
        words = carray(pool.pointer(arguments, np.int64(0)), (16,))
        library, is_double, by_rows, add = (words[0], words[1] == 1), words[2] == 1, words[3] == 1, words[4] == 1
        ta, tb, m, n, k = np.int32(words[5]), np.int32(words[6]), words[7], words[8], words[9]
        a, lda, b, ldb = words[10], words[11], words[12], words[13]
        c, ldc = words[14], words[15]
        size = 8 if is_double else 4
        if by_rows:
            m = stop - start
            a += start * (lda if ta == _PLAIN else 1) * size
            c += start * ldc * size
        else:
            n = stop - start
            b += start * (1 if tb == _PLAIN else ldb) * size
            c += start * size
        if is_double:
            beta = np.float64(1) if add else np.float64(0)
            _gemm(library, ta, tb, m, n, k, np.float64(1), a, lda, b, ldb, beta, c, ldc)
        else:
            factor = np.float32(1) if add else np.float32(0)
            _gemm(library, ta, tb, m, n, k, np.float32(1), a, lda, b, ldb, factor, c, ldc)

    return pool.task(task)


_product_tasks: list[pool.CompiledTask] = []  # at most one, compiled on first use

SMALL_PRODUCT = 1 << 18  # OpenBLAS computes products with up to this number of multiplications on one thread


@_compiled
def _small_product(address, wide, a, b, out, add):
    """out = a @ b, or out += a @ b, on this thread. Returns False if BLAS cannot use the arrays in place."""
    size = out.itemsize
    (m, n), k = out.shape, a.shape[1]
    if a.strides[1] == size and a.strides[0] >= k * size:
        ta, lda = _PLAIN, a.strides[0]
    elif a.strides[0] == size and a.strides[1] >= m * size:
        ta, lda = _TRANSPOSED, a.strides[1]
    else:
        return False
    if b.strides[1] == size and b.strides[0] >= n * size:
        tb, ldb = _PLAIN, b.strides[0]
    elif b.strides[0] == size and b.strides[1] >= k * size:
        tb, ldb = _TRANSPOSED, b.strides[1]
    else:
        return False
    if out.strides[1] != size or out.strides[0] < n * size or (lda | ldb | out.strides[0]) % size != 0:
        return False
    one, library, place = out.dtype.type(1), (address, wide), out.ctypes.data
    beta, lda, ldb, ldc = one if add else out.dtype.type(0), lda // size, ldb // size, out.strides[0] // size
    _gemm(library, ta, tb, m, n, k, one, a.ctypes.data, lda, b.ctypes.data, ldb, beta, place, ldc)
    return True


@functools.partial(_compiled, nogil=False)
def _small_product_with_gil(address, wide, a, b, out, add):
    """_small_product, keeping the GIL for its few microseconds, so that no other thread forks."""
    return _small_product(address, wide, a, b, out, add)


@functools.cache
def _compiled_for_any_layout(dispatcher: Any) -> Callable[..., bool]:
    """One of the two functions above, compiled once per dtype, for arrays of any memory layout. Otherwise Numba would
    compile it for each combination of layouts."""
    for dtype in blas.chosen().calls:
        read, written = (types.Array(from_dtype(dtype), 2, "A", readonly=readonly) for readonly in (True, False))
        dispatcher.compile((types.int64, types.boolean, read, read, written, types.boolean))
    dispatcher.disable_compile()
    return dispatcher


def _matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, split along the longer axis of out. BLAS computes each part on one thread, since
    its own threads would compete for cores with the pool's threads."""
    if a.dtype == bfloat16:
        _bfloat16_product(a, b, out, add)
        return
    (m, n), k, library = out.shape, a.shape[1], blas.chosen()
    gemm = library.calls.get(out.dtype)
    grain = max(16, GEMM_FLOPS // (2 * k * min(m, n) + 1))
    in_one_part = max(m, n) < 2 * grain or threads.count() == 1
    if in_one_part and gemm and m and n and k and a.flags.aligned and b.flags.aligned:
        if m * n * k <= SMALL_PRODUCT:
            done = _compiled_for_any_layout(_small_product_with_gil)(*gemm, a, b, out, add)
        else:
            with threads.blas_on_one_thread():
                done = _compiled_for_any_layout(_small_product)(*gemm, a, b, out, add)
        if done:
            return
    left, right, result = blas.layout(a), blas.layout(b), blas.layout(out)
    if gemm is None or left is None or right is None or result is None or result[0] != blas.PLAIN or not k:
        with forks.computing():
            blas.gemm(a, b, out, add)
        return
    if not _product_tasks:
        _product_tasks.append(_product_task())
    address, wide = gemm
    matrices = (blas.address(a), left[1], blas.address(b), right[1], blas.address(out), result[1])
    flags = (wide, out.itemsize == 8, m >= n, add)
    arguments = np.array([address, *flags, left[0], right[0], m, n, k, *matrices], dtype=np.int64)
    with threads.blas_on_one_thread():
        pool.each_compiled(_product_tasks[0], arguments, threads.parts(max(m, n), grain))


BF16_ROWS = 16  # minimum number of rows per part of a bfloat16 product


def _bfloat16_product(
    a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False, bias: np.ndarray | None = None
) -> None:
    """out = a @ b, or out += a @ b, with `bias` added to each row. a and b are bfloat16; out and bias are bfloat16
    or float32. Sums are float32, and are rounded once."""
    if onednn.library() is None:
        total = out if out.dtype == np.float32 else memory.empty(out.shape, np.float32)
        if bias is not None:
            total[...] = as_float32(bias) if bias.dtype == bfloat16 else bias
        _matmul(as_float32(a), as_float32(b), total, add or bias is not None)
        if total is not out:
            convert(total, out)
        return
    a, b = (x if blas.layout(x) else np.ascontiguousarray(x) for x in (a, b))
    bias = None if bias is None else np.ascontiguousarray(bias)
    (m, n), k = out.shape, a.shape[1]
    # oneDNN uses a different algorithm if a is the transpose of a contiguous matrix. A slice of it is not contiguous,
    # so computing the product in one part would give different bits. Therefore there are always at least two parts.
    in_two = m >= 2 * BF16_ROWS and a.strides[1] == m * a.itemsize and m > 1

    def rows(start: int, stop: int) -> None:
        start, stop = start * BF16_ROWS, m if stop == m // BF16_ROWS else stop * BF16_ROWS
        middle = (start + stop) // 2 if in_two and stop - start == m else stop
        for first, last in ((start, middle), (middle, stop)):
            if first < last:
                onednn.product(a[first:last], b, out[first:last], add, bias)

    grain = max(1, GEMM_FLOPS // (2 * k * n * BF16_ROWS + 1))
    pool.each(rows, threads.parts(m // BF16_ROWS, grain) if m >= 2 * BF16_ROWS else [(0, m // BF16_ROWS)])


@_compiled
def _sum_rows(x: np.ndarray, partial: np.ndarray, first: int) -> None:
    for i in range(x.shape[0]):
        chunk = (first + i) // ROW_CHUNK
        for j in range(x.shape[1]):
            partial[chunk, j] += wide(x[i, j])


def _add_row_sum(x: np.ndarray, total: np.ndarray) -> None:
    """total += sum of the rows of x."""
    partial, rows = _partial(x.shape, sum_dtype(x.dtype)), bits(x)
    pool.each(lambda a, b: _sum_rows(rows[a:b], partial, a), _row_parts(*x.shape))
    total += row_sum(partial)


GEMV_ROWS = 32  # with at most this number of rows of x, a product takes as long as reading the weights


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    x2 = x.reshape(-1, x.shape[-1])
    y = memory.empty((len(x2), weight.shape[1]), x.dtype)
    if x.dtype == bfloat16 and len(x2) > GEMV_ROWS:
        _bfloat16_product(x2, weight, y, bias=bias)
        return y.reshape(*x.shape[:-1], weight.shape[1])
    if x.dtype == bfloat16:
        wider = linear_forward(as_float32(x2), weight, None if bias is None else as_float32(bias))
        return cast(wider, x.dtype).reshape(*x.shape[:-1], weight.shape[1])
    few = len(x2) <= GEMV_ROWS and gemv.supports(x2, weight)
    if not few and x.dtype == np.float32 and weight.dtype == bfloat16 and onednn.library() is not None:  # a prompt
        _bfloat16_product(cast(x2, weight.dtype), weight, y, bias=bias)
        return y.reshape(*x.shape[:-1], weight.shape[1])
    y[...] = 0 if bias is None else bias
    if few:
        gemv.add_product(np.ascontiguousarray(x2), weight, y)
    else:
        _matmul(x2, weight.astype(x.dtype, copy=False), y, add=True)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def linear_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, dweight: np.ndarray | None, dbias: np.ndarray | None
) -> np.ndarray:
    dy2 = dy.reshape(-1, dy.shape[-1])
    if dweight is not None:
        _matmul(x.reshape(-1, x.shape[-1]).T, dy2, dweight, add=True)
    if dbias is not None:
        _add_row_sum(_rows(dy), dbias)
    dx = memory.empty((len(dy2), weight.shape[0]), dy.dtype)
    _matmul(dy2, weight.T, dx)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _sum_runs(
    dy: np.ndarray, order: np.ndarray, first: np.ndarray, ids: np.ndarray, dwte: np.ndarray, start: int, stop: int
) -> None:
    for run in range(start, stop):
        end = first[run + 1] if run + 1 < len(first) else len(order)
        total = dwte[ids[run]]
        if end - first[run] <= MAX_RUN:
            for i in range(first[run], end):
                for j in range(dy.shape[1]):
                    total[j] += wide(dy[order[i], j])
            continue
        for block in range(first[run], end, MAX_RUN):  # so that rounding errors do not grow with the run
            partial = np.zeros(dy.shape[1], dwte.dtype)
            for i in range(block, min(block + MAX_RUN, end)):
                for j in range(dy.shape[1]):
                    partial[j] += wide(dy[order[i], j])
            total += partial


def embedding_forward(tokens: np.ndarray, wte: np.ndarray, wpe: np.ndarray | None, first_position: int) -> Array:
    if wte.dtype == bfloat16:
        return reference.embedding_forward(tokens, wte, wpe, first_position)
    y = memory.empty((*tokens.shape, wte.shape[1]), wte.dtype)
    np.take(wte, tokens, axis=0, out=y, mode="clip")  # (the tokens were checked earlier; "raise" would copy)
    if wpe is not None:
        y += wpe[first_position : first_position + tokens.shape[-1]]
    return y


def embedding_backward(
    dy: np.ndarray, tokens: np.ndarray, first_position: int, dwte: np.ndarray | None, dwpe: np.ndarray | None
) -> None:
    rows = _rows(dy)
    if dwte is not None:
        order, first, ids = token_runs(tokens)
        numbers = bits(rows)
        pool.each(
            lambda a, b: _sum_runs(numbers, order, first, ids, dwte, a, b),
            threads.parts(len(first), max(1, GRAIN // rows.shape[1])),
        )
    if dwpe is not None:
        T = dy.shape[-2]
        dwpe[first_position : first_position + T] += row_sum(as_float32(dy).reshape(-1, T, dy.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------

_philox = njit(inline="always")(random.philox4x32)
_WORD, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@_compiled
def _dropout(
    x: np.ndarray,
    y: np.ndarray,
    first: np.uint64,
    seed: np.uint64,
    site: np.uint64,
    step: np.uint64,
    threshold: np.uint64,
    scale: np.floating,
) -> None:
    """y = x * mask * scale, for elements of the global batch from index `first` on. Four elements share one counter."""
    n, zero = len(x), scale - scale
    group = first >> np.uint64(2)
    i = -np.int64(first & np.uint64(3))
    while i < n:
        w = _philox(group & _WORD, group >> _SHIFT, site, step, seed & _WORD, seed >> _SHIFT)
        for j in range(4):
            if 0 <= i + j < n:
                y[i + j] = narrow(wide(x[i + j]) * (scale if w[j] >= threshold else zero), y)
        group += np.uint64(1)
        i += 4


def _philox_key(rate: float, key: random.Key) -> PhiloxKey:
    return np.uint64(key.seed), np.uint64(key.site), np.uint64(key.step), np.uint64(round(rate * 2**32))


def dropout_forward(x: np.ndarray, rate: float, key: random.Key) -> np.ndarray:
    flat = np.ascontiguousarray(x).reshape(-1)
    y = memory.empty(flat.shape, flat.dtype)
    base = key.first_sample * (x.size // x.shape[0])
    philox_key, scale = _philox_key(rate, key), sum_dtype(x.dtype).type(1 / (1 - rate))
    read, written = bits(flat), bits(y)
    pool.each(
        lambda a, b: _dropout(read[a:b], written[a:b], np.uint64(base + a), *philox_key, scale),
        threads.parts(x.size, GRAIN),
    )
    return y.reshape(x.shape)


def dropout_backward(dy: np.ndarray, rate: float, key: random.Key) -> np.ndarray:
    return dropout_forward(dy, rate, key)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _layernorm(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    eps: np.floating,
    y: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
) -> None:
    C = x.shape[1]
    for i in range(x.shape[0]):
        total = mean.dtype.type(0)
        for j in range(C):
            total += wide(x[i, j])
        m = total / C
        total = mean.dtype.type(0)
        for j in range(C):
            total += (wide(x[i, j]) - m) * (wide(x[i, j]) - m)
        r = mean.dtype.type(1) / np.sqrt(total / C + eps)
        for j in range(C):
            y[i, j] = narrow((wide(x[i, j]) - m) * r * weight[j] + bias[j], y)
        mean[i] = m
        rstd[i] = r


@_compiled
def _add(x: np.ndarray, delta: np.ndarray, s: np.ndarray) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            s[i, j] = narrow(wide(x[i, j]) + wide(delta[i, j]), s)


@_compiled
def _layernorm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    ds: np.ndarray,
    has_ds: bool,
    dx: np.ndarray,
    dweight: np.ndarray,
    dbias: np.ndarray,
    first: int,
) -> None:
    C = x.shape[1]
    for i in range(x.shape[0]):
        m, r, chunk = mean[i], rstd[i], (first + i) // ROW_CHUNK
        a = mean.dtype.type(0)
        b = mean.dtype.type(0)
        for j in range(C):
            xhat = (wide(x[i, j]) - m) * r
            g = wide(dy[i, j]) * weight[j]
            a += g
            b += g * xhat
            dweight[chunk, j] += wide(dy[i, j]) * xhat
            dbias[chunk, j] += wide(dy[i, j])
        a /= C
        b /= C
        for j in range(C):
            value = r * (wide(dy[i, j]) * weight[j] - a - (wide(x[i, j]) - m) * r * b)
            dx[i, j] = narrow(wide(ds[i, j]) + value if has_ds else value, dx)


def layernorm_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = _rows(x)
    y, (mean, rstd) = memory.empty(rows.shape, x.dtype), np.empty((2, len(rows)), sum_dtype(x.dtype))
    epsilon, read, written = mean.dtype.type(eps), bits(rows), bits(y)

    def part(a: int, b: int) -> None:
        _layernorm(read[a:b], weight, bias, epsilon, written[a:b], mean[a:b], rstd[a:b])

    pool.each(part, _row_parts(*rows.shape))
    kept = (*x.shape[:-1], 1)
    return y.reshape(x.shape), mean.reshape(kept), rstd.reshape(kept)


def layernorm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dweight: np.ndarray | None,
    dbias: np.ndarray | None,
) -> np.ndarray:
    return _any_layernorm_backward(None, dy, x, weight, mean, rstd, dweight, dbias)


def add_layernorm_forward(
    x: np.ndarray, delta: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows, more = _rows(x), _rows(delta)
    s, y = memory.empty(rows.shape, x.dtype), memory.empty(rows.shape, x.dtype)
    mean, rstd = np.empty((2, len(rows)), sum_dtype(x.dtype))
    epsilon, (x2, delta2, s2, y2) = mean.dtype.type(eps), map(bits, (rows, more, s, y))

    def part(a: int, b: int) -> None:
        _add(x2[a:b], delta2[a:b], s2[a:b])
        _layernorm(s2[a:b], weight, bias, epsilon, y2[a:b], mean[a:b], rstd[a:b])

    pool.each(part, _row_parts(*rows.shape))
    kept = (*x.shape[:-1], 1)
    return s.reshape(x.shape), y.reshape(x.shape), mean.reshape(kept), rstd.reshape(kept)


def add_layernorm_backward(
    ds: np.ndarray,
    dy: np.ndarray,
    s: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dweight: np.ndarray | None,
    dbias: np.ndarray | None,
) -> np.ndarray:
    return _any_layernorm_backward(ds, dy, s, weight, mean, rstd, dweight, dbias)


def _any_layernorm_backward(
    ds: np.ndarray | None,
    dy: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dweight: np.ndarray | None,
    dbias: np.ndarray | None,
) -> np.ndarray:
    dy2, x2 = bits(_rows(dy)), bits(_rows(x))
    ds2 = dy2 if ds is None else bits(_rows(ds))
    m, r, dx = mean.reshape(-1), rstd.reshape(-1), memory.empty(x2.shape, x.dtype)
    partial_w, partial_b = _partial(x2.shape, mean.dtype), _partial(x2.shape, mean.dtype)
    dx2 = bits(dx)

    def part(a: int, b: int) -> None:
        _layernorm_backward(
            dy2[a:b], x2[a:b], weight, m[a:b], r[a:b], ds2[a:b], ds is not None, dx2[a:b], partial_w, partial_b, a
        )

    pool.each(part, _row_parts(*x2.shape))
    if dweight is not None:
        dweight += row_sum(partial_w)
    if dbias is not None:
        dbias += row_sum(partial_b)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Causal softmax attention
# ---------------------------------------------------------------------------------------------------------------------


ATTENTION_FLOPS = 1 << 24  # minimum FLOPs of q k^T per thread; chosen by timing attention including the softmax


@functools.partial(_compiled, inline=True)
def _attention_row(
    row: np.ndarray, seen: int, has_dropout: bool, element: np.uint64, philox_key: PhiloxKey, keep: np.floating
) -> float:
    """Replace the first `seen` scores by their softmax, with dropout; returns log(sum(exp(scores)))."""
    largest = _largest(row, seen)
    total = row.dtype.type(0)
    for j in range(seen):
        row[j] = _exp(row[j] - largest)
        total += row[j]
    factor = row.dtype.type(1) / total
    for j in range(seen):
        row[j] *= factor
    if has_dropout:
        _dropout(row[:seen], row[:seen], element, *philox_key, keep)
    return largest + np.log(total)


@_compiled
def _attention(
    library: Library, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray, p: np.ndarray,
    first_head: int, last_head: int, scale: np.floating, has_dropout: bool, philox_key: PhiloxKey, first_sample: int,
    keep: np.floating,
) -> None:  # fmt: skip
    """Attention for heads first_head ... last_head - 1 of the B H heads. q, k, v, o: (B, H, T, D); lse: (B, H, T).

    Heads are read and written in place, as matrices with any row stride. The last query attends to the last key. If
    there are more keys than queries, the first keys belong to earlier tokens.
    """
    H, T, D = q.shape[1:]
    before = k.shape[2] - T
    R, ld = p.shape
    size, zero, one = q.itemsize, q.dtype.type(0), q.dtype.type(1)
    ldq, ldk, ldv, ldo = q.strides[2] // size, k.strides[2] // size, v.strides[2] // size, o.strides[2] // size
    scores = p.ctypes.data
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        keys, values = k[b, h].ctypes.data, v[b, h].ctypes.data
        for start in range(0, T, R):
            rows = min(R, T - start)
            stop = before + start + rows
            queries, results = q[b, h, start:].ctypes.data, o[b, h, start:].ctypes.data
            _gemm(library, _PLAIN, _TRANSPOSED, rows, stop, D, scale, queries, ldq, keys, ldk, zero, scores, ld)
            for i in range(rows):
                row, seen = p[i], before + start + i + 1
                element = np.uint64((((first_sample + b) * H + h) * T + start + i) * T)
                lse[b, h, start + i] = _attention_row(row, seen, has_dropout, element, philox_key, keep)
                for j in range(seen, stop):
                    row[j] = zero
            _gemm(library, _PLAIN, _PLAIN, rows, D, stop, one, scores, ld, values, ldv, zero, results, ldo)


@_compiled
def _exp_in_place(row: np.ndarray, n: int) -> float:
    """Replace row[:n] by its exponentials, and return their sum."""
    total = row.dtype.type(0)
    for j in range(n):
        row[j] = _exp(row[j])
        total += row[j]
    return total


@functools.partial(_compiled, inline=True)
def _attention_row_backward(
    row: np.ndarray, drow: np.ndarray, weights: np.ndarray, seen: int, lse: np.floating, delta: np.floating,
    has_dropout: bool, element: np.uint64, philox_key: PhiloxKey, keep: np.floating,
) -> None:  # fmt: skip
    """Replace the first `seen` scores in `row` by P, and dP in `drow` by dS = P (dP - delta). With dropout, `row`
    becomes P M, and dP is multiplied by M first. `weights` is a buffer for P.

    P = exp(S - lse), as long as its rows sum to 1. At scores of about 100 and more they do not, since lse is rounded;
    then P is computed as in the forward pass."""
    one = row.dtype.type(1)
    tolerance = row.dtype.type(3.8e-6 if row.itemsize == 4 else 7.1e-15)  # 32 units in the last place of 1
    for j in range(seen):
        weights[j] = row[j] - lse
    total = _exp_in_place(weights, seen)
    if not abs(total - one) <= tolerance:  # lse is large, and so is its rounding error
        largest = _largest(row, seen)
        for j in range(seen):
            weights[j] = row[j] - largest
        factor = one / _exp_in_place(weights, seen)
        for j in range(seen):
            weights[j] *= factor
    for j in range(seen):
        row[j] = weights[j]
    if has_dropout:
        _dropout(row[:seen], row[:seen], element, *philox_key, keep)
        _dropout(drow[:seen], drow[:seen], element, *philox_key, keep)
    for j in range(seen):
        drow[j] = weights[j] * (drow[j] - delta)


@_compiled
def _attention_backward(
    library: Library, do: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray,
    dq: np.ndarray, dk: np.ndarray, dv: np.ndarray, p: np.ndarray, dp: np.ndarray, first_head: int, last_head: int,
    scale: np.floating, has_dropout: bool, philox_key: PhiloxKey, first_sample: int, keep: np.floating,
) -> None:  # fmt: skip
    """Compute the gradients in blocks of rows, from the last to the first. The last block attends to every key, so it
    writes dk and dv; the other blocks add to them."""
    H, T, D = q.shape[1:]
    R, ld = p.shape
    size, zero, one = q.itemsize, q.dtype.type(0), q.dtype.type(1)
    ldq, lddo, lddq = q.strides[2] // size, do.strides[2] // size, dq.strides[2] // size
    weights = np.empty(ld, dtype=q.dtype)
    s, ds = p.ctypes.data, dp.ctypes.data
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        keys, values = k[b, h].ctypes.data, v[b, h].ctypes.data
        dkeys, dvalues = dk[b, h].ctypes.data, dv[b, h].ctypes.data
        for block in range((T + R - 1) // R - 1, -1, -1):
            start = block * R
            stop = min(start + R, T)
            rows = stop - start
            queries, results = q[b, h, start:].ctypes.data, do[b, h, start:].ctypes.data
            _gemm(library, _PLAIN, _TRANSPOSED, rows, stop, D, scale, queries, ldq, keys, ldq, zero, s, ld)
            _gemm(library, _PLAIN, _TRANSPOSED, rows, stop, D, one, results, lddo, values, ldq, zero, ds, ld)
            for i in range(rows):
                row, drow, seen = p[i], dp[i], start + i + 1
                delta = zero
                for j in range(D):
                    delta += do[b, h, start + i, j] * o[b, h, start + i, j]
                element = np.uint64((((first_sample + b) * H + h) * T + start + i) * T)
                shift = lse[b, h, start + i]
                _attention_row_backward(
                    row, drow, weights, seen, shift, delta, has_dropout, element, philox_key, keep
                )  # fmt: skip
                for j in range(seen, stop):
                    row[j] = zero
                    drow[j] = zero
            add = zero if stop == T else one
            queries_gradient = dq[b, h, start:].ctypes.data
            _gemm(library, _TRANSPOSED, _PLAIN, stop, D, rows, one, s, ld, results, lddo, add, dvalues, lddq)
            _gemm(library, _TRANSPOSED, _PLAIN, stop, D, rows, scale, ds, ld, queries, ldq, add, dkeys, lddq)
            _gemm(library, _PLAIN, _PLAIN, rows, D, stop, scale, ds, ld, keys, ldq, zero, queries_gradient, lddq)


BF16_BLOCK = 128  # rows of a block of scores, and the keys are rounded up to a multiple of it


@_compiled
def _row(x: np.ndarray, i: int) -> np.ndarray:
    """Row i of a matrix, as an array that the compiler knows to be contiguous."""
    return carray(pool.pointer(x[i].ctypes.data, x.dtype.type(0)), (x.shape[1],))


@_compiled
def _convert_matrix(x: np.ndarray, y: np.ndarray) -> None:
    """y = x; rows of y that x does not have become zero."""
    for i in range(x.shape[0]):
        source, destination = _row(x, i), _row(y, i)
        for j in range(len(source)):
            destination[j] = narrow(wide(source[j]), destination)
    y[len(x) :] = 0


@_compiled
def _attention_onednn(
    plans: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray, heads: np.ndarray,
    p: np.ndarray, narrowed: np.ndarray, first_head: int, last_head: int, scale: np.floating, has_dropout: bool,
    philox_key: PhiloxKey, first_sample: int, keep: np.floating,
) -> np.int32:  # fmt: skip
    """_attention for bfloat16, with products by oneDNN: of blocks of R rows and a multiple of R keys, so that a few
    plans suffice for texts of every length. Heads are copied to `heads` (3, keys, D), with zeros after the last key.

    plans     addresses, of plans (2, keys / R) for the products q k^T and p v.
    p         a float32 buffer of R rows of keys, and `narrowed` the same in bfloat16.
    """
    H, T, D = q.shape[1:]
    before, R = k.shape[2] - T, BF16_BLOCK
    result, status = np.empty((R, D), dtype=np.float32), np.int32(0)
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        _convert_matrix(q[b, h], heads[0])
        _convert_matrix(k[b, h], heads[1])
        _convert_matrix(v[b, h], heads[2])
        for start in range(0, T, R):
            rows = min(R, T - start)
            blocks = (before + start + rows + R - 1) // R
            keys = blocks * R
            scores, weights = p[: R * keys].reshape(R, keys), narrowed[: R * keys].reshape(R, keys)
            status |= onednn.execute(
                plans[0, blocks - 1], heads[0, start:].ctypes.data, heads[1].ctypes.data, p.ctypes.data
            )
            for i in range(rows):
                row, weight, seen = scores[i], weights[i], before + start + i + 1
                for j in range(seen):
                    row[j] *= scale
                element = np.uint64((((first_sample + b) * H + h) * T + start + i) * T)
                lse[b, h, start + i] = _attention_row(row, seen, has_dropout, element, philox_key, keep)
                for j in range(seen):
                    weight[j] = narrow(row[j], weight)
                weight[seen:] = 0
            weights[rows:] = 0
            status |= onednn.execute(
                plans[1, blocks - 1], narrowed.ctypes.data, heads[2].ctypes.data, result.ctypes.data
            )
            _convert_matrix(result[:rows], o[b, h, start : start + rows])
    return status


@_compiled
def _attention_backward_onednn(
    plans: np.ndarray, do: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray,
    dq: np.ndarray, dk: np.ndarray, dv: np.ndarray, heads: np.ndarray, sums: np.ndarray, p: np.ndarray, dp: np.ndarray,
    narrowed: np.ndarray, first_head: int, last_head: int, scale: np.floating, has_dropout: bool,
    philox_key: PhiloxKey, first_sample: int, keep: np.floating,
) -> np.int32:  # fmt: skip
    """_attention_backward for bfloat16, with products by oneDNN, as in _attention_onednn.

    plans     addresses, of plans (3, keys / R) for the products q k^T, p v, and p^T do, which is added.
    heads     do, q, k and v (4, keys, D);  sums  the gradients of k and v in float32 (2, keys, D).
    p, dp     float32 buffers of R rows of keys, and `narrowed` (2, ...) the same in bfloat16.
    """
    H, T, D = q.shape[1:]
    R = BF16_BLOCK
    buffer, result = np.empty(heads.shape[1], dtype=np.float32), np.empty((R, D), dtype=np.float32)
    status = np.int32(0)
    dos, queries, keys_, values = heads[0], heads[1], heads[2], heads[3]
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        _convert_matrix(do[b, h], dos)
        _convert_matrix(q[b, h], queries)
        _convert_matrix(k[b, h], keys_)
        _convert_matrix(v[b, h], values)
        sums[:] = 0
        for start in range(0, T, R):
            rows, blocks = min(R, T - start), start // R + 1
            n, at = blocks * R, blocks - 1
            block_q, block_do = queries[start:].ctypes.data, dos[start:].ctypes.data
            scores, dscores = p[: R * n].reshape(R, n), dp[: R * n].reshape(R, n)
            weights, dweights = narrowed[0, : R * n].reshape(R, n), narrowed[1, : R * n].reshape(R, n)
            status |= onednn.execute(plans[0, at], block_q, keys_.ctypes.data, p.ctypes.data)
            status |= onednn.execute(plans[0, at], block_do, values.ctypes.data, dp.ctypes.data)
            for i in range(rows):
                row, drow, weight, dweight, seen = scores[i], dscores[i], weights[i], dweights[i], start + i + 1
                results, gradients, delta = _row(o[b, h], start + i), dos[start + i], scale - scale
                for j in range(D):
                    delta += wide(gradients[j]) * wide(results[j])
                for j in range(seen):
                    row[j] *= scale
                element = np.uint64((((first_sample + b) * H + h) * T + start + i) * T)
                shift = lse[b, h, start + i]
                _attention_row_backward(row, drow, buffer, seen, shift, delta, has_dropout, element, philox_key, keep)
                for j in range(seen):
                    weight[j] = narrow(row[j], weight)
                    dweight[j] = narrow(drow[j] * scale, dweight)
                weight[seen:] = 0
                dweight[seen:] = 0
            weights[rows:] = 0
            dweights[rows:] = 0
            status |= onednn.execute(plans[2, at], narrowed[0].ctypes.data, block_do, sums[1].ctypes.data)
            status |= onednn.execute(plans[2, at], narrowed[1].ctypes.data, block_q, sums[0].ctypes.data)
            status |= onednn.execute(plans[1, at], narrowed[1].ctypes.data, keys_.ctypes.data, result.ctypes.data)
            _convert_matrix(result[:rows], dq[b, h, start : start + rows])
        _convert_matrix(sums[0, :T], dk[b, h])
        _convert_matrix(sums[1, :T], dv[b, h])
    return status


@_compiled
def _attention_bfloat16(
    library: Library, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray, p: np.ndarray,
    heads: np.ndarray, first_head: int, last_head: int, scale: np.floating, has_dropout: bool, philox_key: PhiloxKey,
    first_sample: int, keep: np.floating,
) -> None:  # fmt: skip
    """_attention for bfloat16: each head is converted to float32, in the buffers `heads` (3, 1, 1, keys, D)."""
    H, T = q.shape[1:3]
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        _convert_matrix(q[b, h], heads[0, 0, 0])
        _convert_matrix(k[b, h], heads[1, 0, 0])
        _convert_matrix(v[b, h], heads[2, 0, 0])
        queries = heads[0][:, :, :T]
        _attention(
            library, queries, heads[1], heads[2], queries, lse[b : b + 1, h : h + 1], p, 0, 1, scale, has_dropout,
            philox_key, (first_sample + b) * H + h, keep,
        )  # fmt: skip
        _convert_matrix(queries[0, 0], o[b, h])


@_compiled
def _attention_backward_bfloat16(
    library: Library, do: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray,
    dq: np.ndarray, dk: np.ndarray, dv: np.ndarray, p: np.ndarray, dp: np.ndarray, heads: np.ndarray, first_head: int,
    last_head: int, scale: np.floating, has_dropout: bool, philox_key: PhiloxKey, first_sample: int, keep: np.floating,
) -> None:  # fmt: skip
    """_attention_backward for bfloat16: each head is converted to float32, in the buffers `heads` (8, 1, 1, T, D)."""
    H = q.shape[1]
    for head in range(first_head, last_head):
        b, h = head // H, head % H
        _convert_matrix(do[b, h], heads[0, 0, 0])
        _convert_matrix(q[b, h], heads[1, 0, 0])
        _convert_matrix(k[b, h], heads[2, 0, 0])
        _convert_matrix(v[b, h], heads[3, 0, 0])
        _convert_matrix(o[b, h], heads[4, 0, 0])
        _attention_backward(
            library, heads[0], heads[1], heads[2], heads[3], heads[4], lse[b : b + 1, h : h + 1], heads[5], heads[6],
            heads[7], p, dp, 0, 1, scale, has_dropout, philox_key, (first_sample + b) * H + h, keep,
        )  # fmt: skip
        _convert_matrix(heads[5, 0, 0], dq[b, h])
        _convert_matrix(heads[6, 0, 0], dk[b, h])
        _convert_matrix(heads[7, 0, 0], dv[b, h])


def _attention_plans(keys: int, D: int, backward: bool) -> onednn.Plans:
    """Plans (kinds, keys / R) for the products of blocks: q k^T, p v and, for the backward pass, p^T do."""
    R, sizes = BF16_BLOCK, range(BF16_BLOCK, keys + 1, BF16_BLOCK)
    products = [onednn.Product((R, n, D), ((D, 1), (1, D), (n, 1))) for n in sizes]
    products += [onednn.Product((R, D, n), ((n, 1), (D, 1), (D, 1))) for n in sizes]
    if backward:
        products += [onednn.Product((n, D, R), ((1, n), (D, 1), (D, 1)), add=True) for n in sizes]
    return onednn.Plans(products)


def _each_head(task: Callable[..., None], q: np.ndarray, keys: int, blocks: int) -> None:
    """Call task(first head, last head, *score blocks) on the threads. A block has shape (rows of queries, keys)."""
    B, H, T, D = q.shape
    # With fewer rows the products are slower; with more rows, more of the computed scores are masked out.
    shape = (min(T, 128 if T >= 512 else 64), keys)

    def part(start: int, stop: int) -> None:
        task(start, stop, *(memory.empty(shape, sum_dtype(q.dtype)) for _ in range(blocks)))

    flops = 2 * B * H * T * keys * D
    with threads.blas_on_one_thread():  # even for one part: the products are too small for multithreaded BLAS
        pool.each(part, threads.parts(B * H, max(1, B * H * ATTENTION_FLOPS // max(1, flops))))


def _dropout_arguments(
    dtype: np.dtype, rate: float, key: random.Key | None
) -> tuple[bool, PhiloxKey, int, np.floating]:
    """The last arguments of the kernels: has_dropout, philox_key, first_sample, keep."""
    number = sum_dtype(dtype).type
    if key is None:
        zero = np.uint64(0)
        return False, (zero, zero, zero, zero), 0, number(0)
    return True, _philox_key(rate, key), key.first_sample, number(1 / (1 - rate))


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, *dropout: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return out (B, T, C) and lse (B, H, T) for queries (B, H, T, D) and at least as many keys and values."""
    B, H, T, D = q.shape
    number = sum_dtype(q.dtype)
    out, lse = memory.empty((B, T, H * D), q.dtype), memory.empty((B, H, T), number)
    (o,) = split_heads(out, 1, H)
    library, scale = blas.chosen().calls[number], number.type(1 / math.sqrt(D))

    kernel: Any = _attention_bfloat16 if q.dtype == bfloat16 else _attention
    run: Any = _attention_onednn

    def heads(start: int, stop: int, p: np.ndarray) -> None:
        buffers = [memory.empty((3, 1, 1, k.shape[2], D), number)] * (q.dtype == bfloat16)
        kernel(library, *map(bits, (q, k, v, o)), lse, p, *buffers, start, stop, scale, *dropout)

    def heads_by_onednn(start: int, stop: int) -> None:
        keys = -(-k.shape[2] // BF16_BLOCK) * BF16_BLOCK
        plans = _attention_plans(keys, D, backward=False)
        copies, p = memory.empty((3, keys, D), np.uint16), memory.empty((BF16_BLOCK * keys,), number)
        arrays = [bits(array) for array in (q, k, v, o)]
        buffers = (copies, p, memory.empty(p.shape, np.uint16))
        addresses = plans.addresses.reshape(2, -1)
        onednn.check(run(addresses, *arrays, lse, *buffers, start, stop, scale, *dropout))

    if q.dtype == bfloat16 and onednn.library() is not None:
        _each_head(heads_by_onednn, q, k.shape[2], blocks=0)
    else:
        _each_head(heads, q, k.shape[2], blocks=1)
    return out, lse


def attention_forward(
    qkv: np.ndarray, n_head: int, rate: float, key: random.Key | None
) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = split_heads(np.ascontiguousarray(qkv), 3, n_head)
    return _attend(q, k, v, *_dropout_arguments(qkv.dtype, rate, key))


def attention_backward(
    dout: np.ndarray,
    qkv: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    n_head: int,
    rate: float,
    key: random.Key | None,
) -> np.ndarray:
    dqkv = memory.empty(qkv.shape, qkv.dtype)
    q, k, v = split_heads(np.ascontiguousarray(qkv), 3, n_head)
    dq, dk, dv = split_heads(dqkv, 3, n_head)
    (do,), (o,) = (split_heads(np.ascontiguousarray(array), 1, n_head) for array in (dout, out))
    number = sum_dtype(qkv.dtype)
    library, scale = blas.chosen().calls[number], number.type(1 / math.sqrt(q.shape[3]))
    dropout = _dropout_arguments(qkv.dtype, rate, key)

    kernel: Any = _attention_backward_bfloat16 if q.dtype == bfloat16 else _attention_backward
    run: Any = _attention_backward_onednn

    def heads(start: int, stop: int, p: np.ndarray, dp: np.ndarray) -> None:
        buffers = [memory.empty((8, 1, 1, *q.shape[2:]), number)] * (q.dtype == bfloat16)
        before, after = map(bits, (do, q, k, v, o)), map(bits, (dq, dk, dv))
        kernel(library, *before, lse, *after, p, dp, *buffers, start, stop, scale, *dropout)

    def heads_by_onednn(start: int, stop: int) -> None:
        T, D = q.shape[2:]
        keys = -(-T // BF16_BLOCK) * BF16_BLOCK
        plans = _attention_plans(keys, D, backward=True)
        copies, sums = memory.empty((4, keys, D), np.uint16), memory.empty((2, keys, D), number)
        p, dp = memory.empty((2, BF16_BLOCK * keys), number)
        before, after = map(bits, (do, q, k, v, o)), map(bits, (dq, dk, dv))
        buffers = (copies, sums, p, dp, memory.empty((2, len(p)), np.uint16))
        addresses = plans.addresses.reshape(3, -1)
        onednn.check(run(addresses, *before, lse, *after, *buffers, start, stop, scale, *dropout))

    if q.dtype == bfloat16 and onednn.library() is not None:
        _each_head(heads_by_onednn, q, q.shape[2], blocks=0)
    else:
        _each_head(heads, q, q.shape[2], blocks=2)
    return dqkv


CACHE_BLOCK = 512  # cache positions per unit of work, so that a few heads can be divided among many threads
CACHE_GRAIN = 1 << 15  # minimum number of key elements per thread


@_compiled
def _exponentials(scores: np.ndarray, n: int, scale: np.floating) -> tuple[float, float]:
    """Replace the first n scores s by exp(scale s - m), where m is the maximum of scale s. Returns their sum, and m."""
    for j in range(n):
        scores[j] *= scale
    largest = _largest(scores, n)
    shift = scores.dtype.type(0) if largest == -np.inf else largest
    for j in range(n):
        scores[j] -= shift
    return _exp_in_place(scores, n), largest


@_compiled
def _combine_blocks(partial: np.ndarray, out: np.ndarray) -> None:
    """Combine the results for the blocks of a cache, (blocks, D + 2), into the attention output, (D,). Each row holds
    the sum of the values weighted by w = exp(score - m), then the sum of w, then m, the block's largest score."""
    D = len(out)
    largest, total = partial[0, D + 1], partial.dtype.type(0)
    for i in range(1, len(partial)):
        largest = max(largest, partial[i, D + 1])
    for i in range(len(partial)):
        factor = _exp(partial[i, D + 1] - largest)
        total += factor * partial[i, D]
        for d in range(D):
            partial[i, d] *= factor
    for d in range(D):
        value = partial.dtype.type(0)
        for i in range(len(partial)):
            value += partial[i, d]
        out[d] = narrow(value / total, out)


@functools.cache
def cached_attention_tasks(bits: int, D: int) -> tuple[pool.CompiledTask, pool.CompiledTask]:
    """Compile the two tasks of attention_cached for one new token per text, for parts start ... stop - 1 of the work.
    Both take the same arguments: the addresses of qkv (B, 3 C), cache, the results per block (B, H, blocks, D + 2), and
    out (B, C); then B, H, the capacity of the cache, the position of the token, and the number of parts."""
    zero = np.float32(0) if bits == 32 else np.uint16(0)

    def attend(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (9,))
        B, H, capacity, position, parts = a[4], a[5], a[6], a[7], a[8]
        qkv = carray(pool.pointer(a[0], zero), (B, 3, H, D))
        cache = carray(pool.pointer(a[1], zero), (2, B, H, capacity, D))
        blocks = position // CACHE_BLOCK + 1
        partial = carray(pool.pointer(a[2], np.float32(0)), (B, H, blocks, D + 2))
        q, scores, scale = np.empty(D, np.float32), np.empty(CACHE_BLOCK, np.float32), np.float32(1 / math.sqrt(D))
        for unit in range(B * H * blocks * start // parts, B * H * blocks * stop // parts):
            head, block = unit // blocks, unit % blocks
            b, h, first, last = head // H, head % H, block * CACHE_BLOCK, min((block + 1) * CACHE_BLOCK, position + 1)
            for d in range(D):
                q[d] = wide(qkv[b, 0, h, d])
            if last == position + 1:
                cache[0, b, h, position] = qkv[b, 1, h]
                cache[1, b, h, position] = qkv[b, 2, h]
            result, n = partial[b, h, block], last - first
            keys, values = cache[0, b, h, first:].ctypes.data, cache[1, b, h, first:].ctypes.data
            cached_attention.scores(bits, D, q.ctypes.data, keys, n, scores.ctypes.data)
            result[D], result[D + 1] = _exponentials(scores, n, scale)
            cached_attention.weighted_sum(bits, D, scores.ctypes.data, values, n, result.ctypes.data)

    def combine(arguments: int, start: int, stop: int) -> None:
        a = carray(pool.pointer(arguments, np.int64(0)), (9,))
        B, H, position, parts = a[4], a[5], a[7], a[8]
        blocks = position // CACHE_BLOCK + 1
        partial = carray(pool.pointer(a[2], np.float32(0)), (B * H, blocks, D + 2))
        out = carray(pool.pointer(a[3], zero), (B * H, D))
        for head in range(B * H * start // parts, B * H * stop // parts):
            _combine_blocks(partial[head], out[head])

    return pool.task(attend), pool.task(combine)


def attention_cached(qkv: np.ndarray, cache: np.ndarray, length: int, n_head: int) -> np.ndarray:
    qkv = np.ascontiguousarray(qkv)
    _, B, H, capacity, D = cache.shape
    end = length + qkv.shape[1]
    vectors = cache.dtype in (np.float32, bfloat16) and cached_attention.supports(D) and cache.flags.c_contiguous
    if qkv.shape[1] > 1 or not vectors:
        q, k, v = split_heads(qkv, 3, n_head)
        _, *new = split_heads(cast(qkv, cache.dtype), 3, n_head)
        for i, part in enumerate(new):
            cache[i, :, :, length:end] = part
        if length:
            k, v = (cast(cache[i, :, :, :end], qkv.dtype) for i in range(2))
        return _attend(q, k, v, *_dropout_arguments(qkv.dtype, 0, None))[0]
    out = memory.empty((B, 1, H * D), qkv.dtype)
    partial = memory.empty((B, H, length // CACHE_BLOCK + 1, D + 2), np.float32)
    parts = len(threads.parts(B * H * end, max(1, CACHE_GRAIN // D)))
    addresses = (blas.address(array) for array in (qkv, cache, partial, out))
    arguments = np.array([*addresses, B, H, capacity, length, parts], dtype=np.int64)
    attend, combine = cached_attention_tasks(8 * qkv.itemsize, D)
    pool.each_compiled(attend, arguments, [(i, i + 1) for i in range(parts)])
    pool.each_compiled(combine, arguments, [(0, parts)])
    return out


if not (blas.NUMPYS.calls or blas.chosen().calls):  # no BLAS library with a C interface: use the reference
    del attention_forward, attention_backward, attention_cached


# ---------------------------------------------------------------------------------------------------------------------
# GELU
# ---------------------------------------------------------------------------------------------------------------------

# (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)), so the tanh form is u s, where s is the logistic function of 2 z. This takes
# one exponential, and loses no precision where tanh z is near -1.
_TWICE_SCALE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715
# Beyond this limit the result is exactly u or 0, and its derivative 1 or 0. The powers of a larger u could overflow.
_LIMIT = 40.0


@_compiled
def _gelu(x: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
    one, c, k = bias.dtype.type(1), bias.dtype.type(_TWICE_SCALE), bias.dtype.type(_CUBIC)
    limit = bias.dtype.type(_LIMIT)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            u = wide(x[i, j]) + bias[j]
            u = -limit if -np.inf < u < -limit else u  # (-inf stays -inf, so that it is not hidden)
            y[i, j] = narrow(u / (one + _exp(-c * u * (one + k * u * u))), y)


@_compiled
def _gelu_backward(
    dy: np.ndarray, x: np.ndarray, bias: np.ndarray, dx: np.ndarray, partial: np.ndarray, first: int
) -> None:
    one, c, k = bias.dtype.type(1), bias.dtype.type(_TWICE_SCALE), bias.dtype.type(_CUBIC)
    three, limit = bias.dtype.type(3), bias.dtype.type(_LIMIT)
    for i in range(x.shape[0]):
        chunk = (first + i) // ROW_CHUNK
        for j in range(x.shape[1]):
            u = wide(x[i, j]) + bias[j]
            u = -limit if u < -limit else (limit if u > limit else u)  # (NaN stays NaN)
            s = one / (one + _exp(-c * u * (one + k * u * u)))
            value = wide(dy[i, j]) * (s + u * s * (one - s) * c * (one + three * k * u * u))
            dx[i, j] = narrow(value, dx)
            partial[chunk, j] += value


def _gelu_bias(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return np.zeros(x.shape[-1], dtype=sum_dtype(x.dtype)) if bias is None else as_float32(bias)


def gelu_forward(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    rows = _rows(x)
    y, b = memory.empty(rows.shape, x.dtype), _gelu_bias(x, bias)
    read, written = bits(rows), bits(y)
    pool.each(lambda start, stop: _gelu(read[start:stop], b, written[start:stop]), _row_parts(*rows.shape))
    return y.reshape(x.shape)


def gelu_backward(dy: np.ndarray, x: np.ndarray, bias: np.ndarray | None, dbias: np.ndarray | None) -> np.ndarray:
    rows, dy2 = bits(_rows(x)), bits(_rows(dy))
    dx, partial = memory.empty(rows.shape, x.dtype), _partial(rows.shape, sum_dtype(x.dtype))
    b, dx2 = _gelu_bias(x, bias), bits(dx)

    def part(start: int, stop: int) -> None:
        _gelu_backward(dy2[start:stop], rows[start:stop], b, dx2[start:stop], partial, start)

    pool.each(part, _row_parts(*rows.shape))
    if dbias is not None:
        dbias += row_sum(partial)
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy, and the language-model head
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _cross_entropy_rows(logits, targets, picked, log_total):
    """Compute, per row, log_total and `picked`, the target logit minus the largest logit. The caller computes the loss,
    since the compiler could reorder the subtractions here, losing precision if all logits share a large offset."""
    V = logits.shape[1]
    for i in range(logits.shape[0]):
        row = logits[i]
        largest = _largest(row, V)
        total = log_total.dtype.type(0)
        for j in range(V):
            total += _exp(wide(row[j]) - largest)
        log_total[i] = np.log(total)
        picked[i] = wide(row[targets[i]]) - largest


@_compiled
def _cross_entropy_rows_backward(logits, targets, log_total, factor, dlogits):
    V, zero = logits.shape[1], factor - factor
    for i in range(logits.shape[0]):
        row = logits[i]
        largest, share = _largest(row, V), factor / np.exp(log_total[i])
        for j in range(V):
            less = factor if j == targets[i] else zero
            dlogits[i, j] = narrow(_exp(wide(row[j]) - largest) * share - less, dlogits)


def cross_entropy_forward(logits: np.ndarray, targets: np.ndarray) -> tuple[np.floating, np.ndarray]:
    rows, target = bits(_rows(logits)), np.ascontiguousarray(targets).reshape(-1)
    picked, log_total = np.empty((2, len(rows)), dtype=sum_dtype(logits.dtype))
    pool.each(
        lambda a, b: _cross_entropy_rows(rows[a:b], target[a:b], picked[a:b], log_total[a:b]), _row_parts(*rows.shape)
    )
    return np.mean(log_total - picked), log_total.reshape(*targets.shape, 1)


def cross_entropy_backward(
    dloss: np.ndarray, logits: np.ndarray, targets: np.ndarray, log_total: np.ndarray
) -> np.ndarray:
    dlogits = memory.empty(logits.shape, logits.dtype)
    rows, written = bits(_rows(logits)), bits(_rows(dlogits))
    target, totals, factor = targets.reshape(-1), log_total.reshape(-1), log_total.dtype.type(dloss / targets.size)
    pool.each(
        lambda a, b: _cross_entropy_rows_backward(rows[a:b], target[a:b], totals[a:b], factor, written[a:b]),
        _row_parts(*rows.shape),
    )
    return dlogits


@_compiled
def _cross_entropy(
    logits: np.ndarray, targets: np.ndarray, loss: np.ndarray, count: np.floating, buffer: np.ndarray
) -> None:
    """Replace each row of logits by its gradient, (softmax - onehot) / count. `loss` receives the loss of each row.

    buffer  has the size of a row and contains its exponentials in float32, so that a bfloat16 row is rounded once."""
    V, one = logits.shape[1], buffer.dtype.type(1)
    for i in range(logits.shape[0]):
        row = logits[i]
        largest = _largest(row, V)
        picked = wide(row[targets[i]]) - largest
        total = buffer.dtype.type(0)
        for j in range(V):
            buffer[j] = _exp(wide(row[j]) - largest)
            total += buffer[j]
        factor = one / (total * count)
        for j in range(V):
            buffer[j] *= factor
        buffer[targets[i]] -= one / count
        for j in range(V):
            row[j] = narrow(buffer[j], row)
        loss[i] = np.log(total) - picked


def lm_head_forward(x: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> tuple[np.floating, np.ndarray]:
    rows, target = x.reshape(-1, x.shape[-1]), np.ascontiguousarray(targets).reshape(-1)
    logits, number = memory.empty((len(rows), len(weight)), x.dtype), sum_dtype(x.dtype)
    _matmul(rows, weight.astype(x.dtype, copy=False).T, logits)
    loss, count, written = np.empty(len(rows), number), number.type(len(rows)), bits(logits)

    def part(a: int, b: int) -> None:
        _cross_entropy(written[a:b], target[a:b], loss[a:b], count, memory.empty((len(weight),), number))

    pool.each(part, threads.parts(len(rows), max(1, GRAIN // len(weight))))
    return np.mean(loss), logits


def lm_head_backward(
    dloss: np.floating, dlogits: np.ndarray, x: np.ndarray, weight: np.ndarray, dweight: np.ndarray | None
) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == bfloat16:
        if dweight is not None:
            scaled = rows if dloss == 1 else cast(as_float32(rows) * dloss, x.dtype)
            _matmul(dlogits.T, scaled, dweight, add=True)
        total = memory.empty(rows.shape, np.float32)
        _matmul(dlogits, weight, total)
        total *= dloss
        return cast(total, x.dtype).reshape(x.shape)
    dx = memory.empty(rows.shape, x.dtype)
    if dweight is not None:
        np.multiply(rows, dloss, out=dx)
        _matmul(dlogits.T, dx, dweight, add=True)
    _matmul(dlogits, weight, dx)
    dx *= dloss
    return dx.reshape(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _square_chunks(x, sums, start, stop):
    smallest, largest = x.dtype.type(1e-30), x.dtype.type(3e38)
    for chunk in range(start, stop):
        part = x[chunk * FLAT : (chunk + 1) * FLAT]  # (the compiler knows that indices from 0 are not negative)
        total = x.dtype.type(0)
        for i in range(len(part)):
            total += part[i] * part[i]
        sums[chunk] = total  # in float64 from here on
        if not smallest < total < largest:  # squares have overflowed or underflowed
            sums[chunk] = 0
            for i in range(len(part)):
                sums[chunk] += np.float64(part[i]) * np.float64(part[i])


def squared_norm(x: np.ndarray) -> np.ndarray:
    sums = np.zeros(-(-len(x) // FLAT))
    pool.each(lambda a, b: _square_chunks(x, sums, a, b), threads.parts(len(sums), 1))
    with np.errstate(over="ignore", under="ignore"):
        return (sums.sum() * np.array([1, 2.0**-128, 2.0**128])).astype(x.dtype)


@_compiled
def _adamw(value, grad, m, v, scale, lr, keep1, keep2, eps, shrink, root2):
    one = value.dtype.type(1)
    for i in range(len(value)):
        g = grad[i] * scale
        first = m[i] * keep1 + (one - keep1) * g
        second = v[i] * keep2 + (one - keep2) * g * g
        m[i] = first
        v[i] = second
        value[i] = value[i] * shrink - lr * first / (np.sqrt(second) * root2 + eps)


def adamw_step(
    value: np.ndarray, grad: np.ndarray, m: np.ndarray, v: np.ndarray, scale: np.ndarray, lr: np.ndarray,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: np.ndarray,
) -> None:  # fmt: skip
    if np.isnan(scale):
        return
    factor, rate, count = float(scale), float(lr), float(step)
    # The bias corrections are hoisted out of the loop: they are folded into the step size and the square root.
    correction, root = 1 - beta1**count, (1 - beta2**count) ** -0.5
    numbers = (factor, rate / correction, beta1, beta2, eps, 1 - rate * weight_decay, root)
    scalars = [value.dtype.type(number) for number in numbers]
    pool.each(lambda a, b: _adamw(value[a:b], grad[a:b], m[a:b], v[a:b], *scalars), threads.parts(len(value), FLAT))


def _by_chunks(function: Callable[..., None], *arrays: np.ndarray | None) -> None:
    """Call an elementwise function on FLAT elements at a time, so that its temporary arrays stay in cache."""

    def part(start: int, stop: int) -> None:
        for first in range(start, stop, FLAT):
            run = slice(first, min(first + FLAT, stop))
            function(*(None if array is None else array[run] for array in arrays))

    assert arrays[0] is not None
    pool.each(part, threads.parts(len(arrays[0]), FLAT))


def sgd_step(
    value: np.ndarray, grad: np.ndarray, buffer: np.ndarray | None, scale: np.ndarray, lr: np.ndarray,
    momentum: float, nesterov: bool, weight_decay: float,
) -> None:  # fmt: skip
    def step(value: np.ndarray, grad: np.ndarray, buffer: np.ndarray | None) -> None:
        reference.sgd_step(value, grad, buffer, scale, lr, momentum, nesterov, weight_decay)

    _by_chunks(step, value, grad, buffer)


def muon_momentum(grad: np.ndarray, buffer: np.ndarray, scale: np.ndarray, momentum: float) -> np.ndarray:
    direction = memory.empty(grad.shape, grad.dtype)

    def step(grad: np.ndarray, buffer: np.ndarray, direction: np.ndarray) -> None:
        direction[...] = reference.muon_momentum(grad, buffer, scale, momentum)

    _by_chunks(step, grad, buffer, direction)
    return direction


def orthogonalize(*matrices: np.ndarray) -> None:
    """Orthogonalize each matrix on one thread, so that its result does not depend on the number of threads."""
    n = max(1, min(threads.count(), len(matrices)))
    with threads.blas_on_one_thread():
        pool.each(lambda i, _: reference.orthogonalize(*matrices[i::n]), [(i, i + 1) for i in range(n)])


@_compiled
def _muon(value, direction, rate, shrink):
    for i in range(value.shape[0]):
        for j in range(value.shape[1]):
            value[i, j] = value[i, j] * shrink - rate * direction[i, j]


def muon_step(value: np.ndarray, direction: np.ndarray, scale: np.ndarray, lr: np.ndarray, weight_decay: float) -> None:
    if np.isnan(scale):
        return
    factors = float(lr) * 0.2 * math.sqrt(max(value.shape)), 1 - float(lr) * weight_decay
    rate, shrink = (value.dtype.type(factor) for factor in factors)
    ranges = threads.parts(len(value), -(-FLAT // value.shape[1]))
    pool.each(lambda a, b: _muon(value[a:b], direction[a:b], rate, shrink), ranges)


# ---------------------------------------------------------------------------------------------------------------------
# Operations without a bfloat16 kernel: computed by the reference in float32
# ---------------------------------------------------------------------------------------------------------------------


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of reference.py: convert bfloat16 arguments to float32, and round its results to bfloat16."""

    @functools.wraps(function)
    def call(x: np.ndarray, *more: Any) -> Any:
        if x.dtype != bfloat16:
            return function(x, *more)
        found = function(*(as_float32(y) if isinstance(y, np.ndarray) else y for y in (x, *more)))
        return tuple(cast(y, x.dtype) for y in found) if isinstance(found, tuple) else cast(found, x.dtype)

    return call


gelu_exact_forward = _in_float32(reference.gelu_exact_forward)
gelu_exact_backward = _in_float32(reference.gelu_exact_backward)
softmax_forward = _in_float32(reference.softmax_forward)
softmax_backward = _in_float32(reference.softmax_backward)
matmul_forward = _in_float32(forks.guarded(reference.matmul_forward))
matmul_backward = _in_float32(forks.guarded(reference.matmul_backward))
