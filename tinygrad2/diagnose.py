"""Diagnostics for gpt2/doctor.py: the BLAS library, the compiled kernels, the GPU.

Each function may crash or hang in another library's code, so call it in a separate process. The results can be
serialized as JSON.
"""

from __future__ import annotations

import os
import sys
import timeit
from importlib import metadata
from typing import Any

import numpy
import threadpoolctl


def blas() -> dict[str, Any]:
    """The BLAS library: FLOP/s in float32 on all threads and on one thread, threadpoolctl's description of NumPy's
    libraries, the version of MKL if it is used, and a description of the chosen library."""
    libraries = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    from tinygrad2 import backend, blas  # imported late, since it may load MKL

    compiled = backend.get_backend("cpu").kernels.linear_forward.__module__ == "tinygrad2.kernels.cpu"
    mkl = metadata.version("mkl") if blas.chosen().name == "mkl" and compiled else None
    multiply = blas.gemm if mkl else numpy.matmul
    x, y = numpy.ones((2, 1024, 1024), dtype="float32")

    def speed() -> float:
        return 2 * 1024**3 / min(timeit.repeat(lambda: multiply(x, x, y), number=1, repeat=4))

    with threadpoolctl.threadpool_limits(1):
        alone = speed()
    return {"speed": speed(), "on_one_thread": alone, "libraries": libraries, "mkl": mkl, "chosen": blas.description()}


def compiled_kernels() -> dict[str, Any]:
    """The version of Numba, the number of compiled kernels, their cache folder, and the number of files in it."""
    import numba

    from tinygrad2.backend import get_backend

    table = vars(get_backend("cpu").kernels).values()
    compiled = sum(kernel.__module__ == "tinygrad2.kernels.cpu" for kernel in table)
    functions = vars(sys.modules["tinygrad2.kernels.cpu"]).values() if compiled else ()
    folder = next(filter(None, (f.stats.cache_path for f in functions if hasattr(f, "stats"))), None)
    files = os.listdir(folder) if folder and os.path.isdir(folder) else []
    kept = sum(file.endswith(".nbc") for file in files)
    return {"version": numba.__version__, "compiled": compiled, "folder": folder, "kept": kept}


def gpu() -> dict[str, Any]:
    """The version of CuPy, whether a matrix product is correct, and the name and memory (bytes) of the GPU."""
    from tinygrad2.backend import get_backend

    cupy = get_backend("cuda").np
    x = cupy.ones((64, 64), dtype="float32")
    right = float((x @ x + 1).sum()) == 64 * 64 * 65
    free, total = cupy.cuda.runtime.memGetInfo()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {"version": cupy.__version__, "right": right, "name": name, "free": free, "total": total}
