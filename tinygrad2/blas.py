"""Matrix products by the C interface of a BLAS library: Intel's MKL if the package `mkl` is installed, else the library
that NumPy has loaded.

numpy.matmul cannot accumulate into a gradient, which would need a temporary matrix and another pass, and it cannot be
called from compiled code. cblas_sgemm computes C = alpha A B + beta C, and compiled code can call it by its address. If
no library with this interface is found, numpy.matmul is used. TINYGRAD2_BLAS=numpy disables MKL.
"""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from tinygrad2 import memory

Gemm = Any  # a cblas_?gemm of ctypes, whose class has no public name
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # the constants of cblas.h

# Prefix and suffix of the names, and whether integers have 64 bits: NumPy's own OpenBLAS first.
_SPELLINGS = (("scipy_", "64_", True), ("", "64_", True), ("scipy_", "", False), ("", "", False))


def _mkl() -> ctypes.CDLL | None:
    """MKL, set to compute on the calling thread, since kernels/pool.py has the threads; None if it is not installed or
    disabled."""
    if os.environ.get("TINYGRAD2_BLAS") == "numpy":
        return None
    try:
        files = metadata.files("mkl") or []
        library = ctypes.CDLL(str(next(file.locate() for file in files if "mkl_rt" in file.name)))
        library.MKL_Set_Threading_Layer(1)  # MKL_THREADING_SEQUENTIAL
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    return library


def _find(mkl: ctypes.CDLL | None) -> tuple[dict[str, Gemm], bool]:
    """The functions by dtype, and whether their integers have 64 bits; an empty dict if there is no such library."""
    paths = [library["filepath"] for library in ThreadpoolController().info() if library["user_api"] == "blas"]
    for library in [mkl] if mkl else map(ctypes.CDLL, sorted(paths, key=lambda path: "numpy" not in path)):
        for prefix, suffix, wide in _SPELLINGS:
            if hasattr(library, f"{prefix}cblas_sgemm{suffix}"):
                found = {
                    dtype: _declared(library[f"{prefix}cblas_{letter}gemm{suffix}"], number, wide)
                    for dtype, letter, number in (("float32", "s", ctypes.c_float), ("float64", "d", ctypes.c_double))
                }
                return found, wide
    return {}, False


def _declared(function: Gemm, number: type[ctypes.c_float | ctypes.c_double], wide: bool) -> Gemm:
    enum, size, pointer = ctypes.c_int, ctypes.c_int64 if wide else ctypes.c_int32, ctypes.c_void_p
    function.restype = None
    function.argtypes = [enum] * 3 + [size] * 3 + [number, pointer, size, pointer, size, number, pointer, size]
    return function


_library = _mkl()
USES_MKL = _library is not None
_functions, WIDE = _find(_library)
ADDRESSES = {dtype: ctypes.cast(function, ctypes.c_void_p).value or 0 for dtype, function in _functions.items()}


def gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False) -> None:
    """out = a b, or out += a b: matrices (m, k), (k, n), (m, n) of one dtype."""
    function = _functions.get(out.dtype.name)
    left, right, result = layout(a), layout(b), layout(out)
    if function is None or left is None or right is None or result is None or result[0] != PLAIN or a.shape[1] == 0:
        _product(a, b, out, accumulate)
        return
    (m, n), k = out.shape, a.shape[1]
    beta = 1.0 if accumulate else 0.0
    function(
        ROW_MAJOR, left[0], right[0], m, n, k,
        1.0, address(a), left[1], address(b), right[1],
        beta, address(out), result[1],
    )  # fmt: skip


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool) -> None:
    if accumulate:
        product = memory.empty(out.shape, out.dtype)
        np.matmul(a, b, out=product)
        out += product
    else:
        np.matmul(a, b, out=out)


def layout(matrix: np.ndarray) -> tuple[int, int] | None:
    """How BLAS reads the matrix: PLAIN or TRANSPOSED, and its leading dimension; None if it cannot."""
    if not matrix.dtype.isnative or any(stride % matrix.itemsize for stride in matrix.strides):
        return None
    rows, columns = (stride // matrix.itemsize for stride in matrix.strides)
    if columns == 1 and rows >= matrix.shape[1]:
        return PLAIN, rows
    if rows == 1 and columns >= matrix.shape[0]:
        return TRANSPOSED, columns
    return None


def address(array: np.ndarray) -> int:
    """The address of an array's first element."""
    return array.__array_interface__["data"][0]
