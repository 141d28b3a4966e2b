"""bfloat16 in compiled code: the upper half of a float32, in arrays of uint16, which Numba knows.

A kernel reads each number by `wide` and writes it by `narrow`. With other types they do nothing, so that one source
serves float32, float64 and bfloat16: what is computed between reading and writing is float32 or wider.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import types
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from tinygrad2 import memory, threads
from tinygrad2.kernels import pool

GRAIN = 1 << 18  # minimum number of elements per thread


def bits(x: np.ndarray) -> np.ndarray:
    """The array for compiled code: bfloat16 as uint16, others as they are."""
    return x.view(np.uint16) if x.dtype == bfloat16 else x


@intrinsic
def wide(typing_context: Context, number: types.Type) -> pool.Intrinsic:
    """A number that is read: bfloat16 as float32, exactly; others as they are."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        if number != types.uint16:
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())

    return (types.float32 if number == types.uint16 else number)(number), generate


@intrinsic
def narrow(typing_context: Context, number: types.Type, into: types.Type) -> pool.Intrinsic:
    """A float32 as an element of the array `into`: rounded to the nearest bfloat16 (ties to even) if that is uint16.

    NaN stays NaN. What is written to other arrays is unchanged.
    """

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        if into.dtype != types.uint16:
            return arguments[0]
        word = ir.IntType(32)
        given = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(given, word(16)), word(1))
        rounded = builder.add(given, builder.add(odd, word(0x7FFF)))
        is_nan = builder.icmp_unsigned(">", builder.and_(given, word(0x7FFFFFFF)), word(0x7F800000))
        quiet = builder.or_(given, word(0x00400000))  # so that the upper half is not that of an infinity
        result = builder.select(is_nan, quiet, rounded)
        return builder.trunc(builder.lshr(result, word(16)), ir.IntType(16))

    if into.dtype == types.uint16:
        return types.uint16(types.float32, into), generate
    return number(number, into), generate


@pool.compiled
def _convert(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        y[i] = narrow(wide(x[i]), y)


def convert(x: np.ndarray, y: np.ndarray) -> None:
    """y = x, of float32 or bfloat16 each, rounded to the nearest; both contiguous."""
    flat, out = bits(x).reshape(-1), bits(y).reshape(-1)
    pool.each(lambda a, b: _convert(flat[a:b], out[a:b]), threads.parts(len(flat), GRAIN))


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A float32 or bfloat16 array in the other of these dtypes, its rows or columns contiguous as before; or the array
    itself if it has this dtype."""
    if x.dtype == dtype:
        return x
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return cast(x.T, dtype).T
    y = memory.empty(x.shape, dtype)
    convert(np.ascontiguousarray(x), y)
    return y


def as_float32(x: np.ndarray) -> np.ndarray:
    """A bfloat16 array as float32; others as they are."""
    return cast(x, np.dtype(np.float32)) if x.dtype == bfloat16 else x
