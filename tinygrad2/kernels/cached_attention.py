"""The two loops of attention from one query to a key-value cache. Both are memory-bound.

They are LLVM IR, like the loops of gemv.py, since the compiler does not keep a head's query, or the sum of its values,
in registers. Keys and values are float32 or bfloat16, each a row of D elements; sums are float32. (Rows are read in
order, so the processor prefetches them; explicit prefetch instructions made the loops slower.)
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from tinygrad2.kernels import pool
from tinygrad2.kernels.gemv import LANES, at, fma, lane_sum, load, spread, vector_type

GROUP = 4  # keys per pass, whose scores are summed across lanes together
MAX_VECTORS = 8  # per row, limited by the registers

_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)


def supports(D: int) -> bool:
    """Whether the loops support heads of this size."""
    return D % LANES == 0 and D <= MAX_VECTORS * LANES


def _row(builder: ir.IRBuilder, rows: ir.Value, j: ir.Value, D: int, bits: int) -> list[ir.Value]:
    """Row j of keys or values, as vectors."""
    first = builder.mul(j, _WORD(D))
    return [load(builder, rows, builder.add(first, _WORD(d)), bits) for d in range(0, D, LANES)]


def _dot(builder: ir.IRBuilder, a: list[ir.Value], b: list[ir.Value]) -> ir.Value:
    """The dot product of two rows, as partial sums in the lanes of one vector."""
    result = builder.fmul(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        result = fma(builder, x, y, result)
    return result


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _totals(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The sum of each of GROUP vectors, as a vector of GROUP numbers. Each step adds the halves of two vectors."""
    width = LANES
    while len(vectors) > 1:
        width //= 2
        low = [i for i in range(2 * LANES) if i % (2 * width) < width]
        high = [i + width for i in low]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high)) for a, b in pairs]
    (found,) = vectors
    while width > 1:
        width //= 2
        order = [(i + width) % LANES for i in range(LANES)]
        found = builder.fadd(found, _shuffle(builder, found, found, order))
    return _shuffle(builder, found, found, list(range(0, LANES, LANES // GROUP)))


@intrinsic(prefer_literal=True)
def scores(
    typing_context: Context,
    bits: types.Type,
    D: types.Type,
    query: types.Type,
    keys: types.Type,
    n: types.Type,
    out: types.Type,
) -> pool.Intrinsic:
    """out[j] = sum of query[d] keys[j, d] over d, for j < n. Arrays are given by address; query and out are float32."""
    width, size = bits.literal_value, D.literal_value

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        query, keys, n, out = arguments[2:]
        q = [load(builder, query, _WORD(d), 32) for d in range(0, size, LANES)]
        whole = builder.and_(n, _WORD(-GROUP))
        with cgutils.for_range_slice(builder, _WORD(0), whole, _WORD(GROUP), inc=True) as (j, _):
            rows = [_row(builder, keys, builder.add(j, _WORD(r)), size, width) for r in range(GROUP)]
            found = _totals(builder, [_dot(builder, q, row) for row in rows])
            builder.store(found, at(builder, out, j, 4, ir.VectorType(_FLOAT, GROUP)), align=4)
        with cgutils.for_range_slice(builder, whole, n, _WORD(1), inc=True) as (j, _):
            row = _row(builder, keys, j, size, width)
            builder.store(lane_sum(builder, _dot(builder, q, row)), at(builder, out, j, 4, _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(bits, D, *[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def weighted_sum(
    typing_context: Context,
    bits: types.Type,
    D: types.Type,
    weights: types.Type,
    values: types.Type,
    n: types.Type,
    out: types.Type,
) -> pool.Intrinsic:
    """out[d] = sum of weights[j] values[j, d] over j < n. Arrays are given by address; weights and out are float32."""
    width, size = bits.literal_value, D.literal_value

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        weights, values, n, out = arguments[2:]
        zero = ir.Constant(vector_type(), [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(0, size, LANES)]
        for pointer in sums:
            builder.store(zero, pointer)
        with cgutils.for_range_slice(builder, _WORD(0), n, _WORD(1), inc=True) as (j, _):
            weight = spread(builder, builder.load(at(builder, weights, j, 4, _FLOAT)))
            for pointer, value in zip(sums, _row(builder, values, j, size, width), strict=True):
                builder.store(fma(builder, weight, value, builder.load(pointer)), pointer)
        for i, pointer in enumerate(sums):
            builder.store(builder.load(pointer), at(builder, out, _WORD(i * LANES), 4, vector_type()), align=4)
        return context.get_dummy_value()

    return types.void(bits, D, *[types.int64] * 4), generate
