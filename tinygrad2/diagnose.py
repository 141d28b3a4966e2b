"""What computes on this machine: the BLAS library, the compiled kernels, the GPU. For gpt2/doctor.py.

Each function may crash or hang in foreign code: call it in a process of its own. The results can be written as JSON.
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
    """The library that multiplies matrices: FLOP/s in float32, what threadpoolctl knows of NumPy's, MKL's version."""
    libraries = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    from tinygrad2 import backend, blas  # (after that: importing it may load MKL)

    compiled = backend.get_backend("cpu").kernels.linear_forward.__module__ == "tinygrad2.kernels.cpu"
    mkl = metadata.version("mkl") if blas.USES_MKL and compiled else None
    multiply = blas.gemm if mkl else numpy.matmul
    x, y = numpy.ones((2, 1024, 1024), dtype="float32")
    seconds = min(timeit.repeat(lambda: multiply(x, x, y), number=1, repeat=4))
    return {"speed": 2 * 1024**3 / seconds, "libraries": libraries, "mkl": mkl}


def compiled_kernels() -> dict[str, Any]:
    """Numba's version, how many of the kernels are compiled, the folder that keeps them, and how many are there."""
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
    """CuPy's version, whether a product comes out right, the GPU's name and its memory in bytes."""
    from tinygrad2.backend import get_backend

    cupy = get_backend("cuda").np
    x = cupy.ones((64, 64), dtype="float32")
    right = float((x @ x + 1).sum()) == 64 * 64 * 65
    free, total = cupy.cuda.runtime.memGetInfo()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {"version": cupy.__version__, "right": right, "name": name, "free": free, "total": total}
