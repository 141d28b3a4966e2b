"""Helpers for tests of CUDA kernels on the stand-in for CuPy. NumPy computes the matrix products."""

import numpy as np

from tests.stand_ins import cudasim
from tests.stand_ins.strict_cupy import library, ndarray
from tinygrad2 import reference
from tinygrad2.kernels import cuda

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}  # relative to the norm; bfloat16 rounds by up to 2^-9


class Simulated(type(library)):
    """The stand-in for CuPy with simulated kernels. New arrays are filled with NaN."""

    RawModule = cudasim.RawModule

    def empty(self, shape, dtype):
        return ndarray(np.full(shape, np.nan, dtype))


def gemm(a, b, out=None, *, transpose_a=False, transpose_b=False, accumulate=False, scale=None):
    """CudaKernels.gemm, computed by NumPy."""
    dtype = a.dtype
    a, b = (x._a.astype("f4").T if turned else x._a.astype("f4") for x, turned in ((a, transpose_a), (b, transpose_b)))
    with np.errstate(invalid="ignore"):
        product = a @ b * (1 if scale is None else scale._a)
    if out is None:
        return ndarray(product.astype(dtype))
    out._a[...] = product + out._a if accumulate else product
    return out


def make_kernels():
    """The kernels' launchers, with matrix products by NumPy."""
    table = cuda.CudaKernels(Simulated(), reference)
    table.gemm = gemm
    return table


def on_device(*arrays):
    return [ndarray(np.array(array)) for array in arrays]


def wide(array):
    return array._a.astype("d")


def error(array, expected):
    """The error relative to the norm of the correct result; infinite if there is a NaN."""
    distance = np.linalg.norm(wide(array) - expected) / (np.linalg.norm(expected) or 1)
    return distance if np.isfinite(distance) else np.inf


def schedules(compute):
    """The results of `compute`, which must be bit-identical for any order of the threads."""
    results = []
    for cudasim.schedule in range(4):
        results.append(compute())
    cudasim.schedule = 0
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a._a.tobytes() == b._a.tobytes(), "the result depends on the schedule"
    return results[0]
