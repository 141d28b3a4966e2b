"""bfloat16 in compiled code: the upper half of a float32, stored as uint16, which Numba supports.

A kernel reads each element with `wide` and writes it with `narrow`. For other types these functions do nothing, so the
same source works for float32, float64 and bfloat16. All arithmetic is in float32 or float64.
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
    """View a bfloat16 array as uint16, for compiled code. Other arrays are returned unchanged."""
    return x.view(np.uint16) if x.dtype == bfloat16 else x


@intrinsic
def wide(typing_context: Context, number: types.Type) -> pool.Intrinsic:
    """Convert a bfloat16 number to float32, exactly, after reading it. Other numbers are unchanged."""

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
    """Round a float32 to the nearest bfloat16 (ties to even) before writing it to the array `into`, if that is uint16.

    NaN stays NaN. For arrays of other types, the number is unchanged.
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
        quiet = builder.or_(given, word(0x00400000))  # otherwise the upper half could be that of an infinity
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
    """y = x, rounded to nearest. Each array is float32 or bfloat16, and contiguous."""
    flat, out = bits(x).reshape(-1), bits(y).reshape(-1)
    pool.each(lambda a, b: _convert(flat[a:b], out[a:b]), threads.parts(len(flat), GRAIN))


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert an array between float32 and bfloat16, keeping its memory order. Returns the array itself if it already
    has this dtype."""
    if x.dtype == dtype:
        return x
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return cast(x.T, dtype).T
    y = memory.empty(x.shape, dtype)
    convert(np.ascontiguousarray(x), y)
    return y


def as_float32(x: np.ndarray) -> np.ndarray:
    """Convert a bfloat16 array to float32. Other arrays are returned unchanged."""
    return cast(x, np.dtype(np.float32)) if x.dtype == bfloat16 else x
