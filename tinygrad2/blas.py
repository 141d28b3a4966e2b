"""Matrix products through the C interface of a BLAS library: the one that NumPy has loaded, or Intel MKL if the
package `mkl` is installed and measurably faster.

numpy.matmul cannot accumulate into a gradient (that would take a temporary matrix and another pass), and it cannot be
called from compiled code. cblas_sgemm computes C = alpha A B + beta C, and compiled code can call it by its address. If
no library with this interface is found, numpy.matmul is used.

Which library is faster depends on the processor: MKL on Intel, OpenBLAS on AMD. Both are therefore measured on first
use, and the results are cached on disk, by processor and version. TINYGRAD2_BLAS=numpy or mkl overrides the choice.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from tinygrad2 import machine, memory, threads
from tinygrad2.files import atomic_write

Gemm = Any  # a ctypes function, whose class has no public name
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # the constants of cblas.h

# Prefix and suffix of the function names, and whether integers are 64-bit. NumPy's own OpenBLAS comes first.
_SPELLINGS = (("scipy_", "64_", True), ("", "64_", True), ("scipy_", "", False), ("", "", False))


@dataclass(frozen=True)
class Library:
    """A BLAS library.

    name        the value of TINYGRAD2_BLAS that selects the library.
    title       name and version, such as "OpenBLAS 0.3.31 (SkylakeX)".
    functions   cblas_?gemm by dtype; empty if the library has no C interface.
    wide        whether the functions take 64-bit integers.
    calls       (address of the function, wide) by dtype, for compiled code.
    """

    name: str
    title: str
    functions: dict[str, Gemm]
    wide: bool
    calls: dict[np.dtype, tuple[int, bool]] = field(init=False)

    def __post_init__(self) -> None:
        addresses = {dtype: ctypes.cast(f, ctypes.c_void_p).value or 0 for dtype, f in self.functions.items()}
        object.__setattr__(self, "calls", {np.dtype(d): (address, self.wide) for d, address in addresses.items()})


def _numpys() -> Library:
    """The library that NumPy has loaded."""
    loaded = [library for library in ThreadpoolController().info() if library["user_api"] == "blas"]
    for library in sorted(loaded, key=lambda library: "numpy" not in library["filepath"]):
        functions, wide = _functions_of(ctypes.CDLL(library["filepath"]))
        if functions:
            kind = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS"}.get(library["internal_api"], "BLAS")
            built_for = f" ({library['architecture']})" if library.get("architecture") else ""
            return Library("numpy", f"{kind} {library['version'] or ''}{built_for}", functions, wide)
    return Library("numpy", "NumPy's matmul", {}, False)


def _mkl() -> Library | None:
    """MKL, or None if it is not installed. It computes on the calling thread; kernels/pool.py provides the threads."""
    try:
        files = metadata.files("mkl") or []
        library = ctypes.CDLL(str(next(file.locate() for file in files if "mkl_rt" in file.name)))
        library.MKL_Set_Threading_Layer(1)  # MKL_THREADING_SEQUENTIAL
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    return Library("mkl", f"MKL {metadata.version('mkl')}", *_functions_of(library))


def _functions_of(library: ctypes.CDLL) -> tuple[dict[str, Gemm], bool]:
    """Return cblas_?gemm by dtype (empty if the library has none), and whether they take 64-bit integers."""
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


# Choice of the library -----------------------------------------------------------------------------------------------

NUMPYS = _numpys()
GAIN = 1.1  # minimum speedup over NumPy's library that justifies using another one
# (m, k, n) of the products to time: a linear layer forward and backward, and a block of attention scores.
SHAPES = ((256, 768, 768), (768, 256, 768), (128, 64, 512))
REPEATS = 5

_chosen: Library | None = None
_lock = threading.RLock()


def _reset_after_fork() -> None:
    """Replace the lock, since another thread may have held it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def chosen() -> Library:
    """The library in use, chosen on the first call: the one named by TINYGRAD2_BLAS, or else the fastest."""
    global _chosen
    if _chosen is None:
        with _lock:
            _chosen = _chosen or _forced() or _fastest()
    return _chosen


def use(name: str) -> bool:
    """Switch to the library of this name, unless TINYGRAD2_BLAS is set. Returns whether it is now in use."""
    global _chosen
    if not os.environ.get("TINYGRAD2_BLAS") and (_chosen is None or name != _chosen.name):
        found = NUMPYS if name == "numpy" else _mkl() if name == "mkl" else None
        _chosen = found if found and found.functions else _chosen
    return chosen().name == name


def _forced() -> Library | None:
    """The library named by TINYGRAD2_BLAS, or None if it is not set. Raises ValueError if there is no such library."""
    name = os.environ.get("TINYGRAD2_BLAS")
    if not name:
        return None
    if name not in ("numpy", "mkl"):
        raise ValueError(f"TINYGRAD2_BLAS is {name!r}; expected numpy or mkl")
    found = _mkl() if name == "mkl" else NUMPYS
    if found is None:
        raise ValueError(f"TINYGRAD2_BLAS is mkl, which is not installed; {machine.install_command('mkl')}")
    return found


def _fastest() -> Library:
    """NumPy's library, or MKL if it is at least GAIN times as fast."""
    cached = [_cached_rates().get(title, math.inf) for title in _titles()]
    if len(cached) == 1 or cached[1] < GAIN * cached[0] < math.inf:
        return NUMPYS  # without loading MKL
    mkl = _mkl()
    if mkl is None or not NUMPYS.functions:
        return mkl or NUMPYS
    found = rates([NUMPYS, mkl])
    return mkl if found[mkl.title] >= GAIN * found[NUMPYS.title] else NUMPYS


def rates(libraries: Sequence[Library]) -> dict[str, float]:
    """FLOP/s of each library in float32 on one thread, by title; measured once, then cached on disk."""
    cached = _cached_rates()
    if any(library.title not in cached for library in libraries):
        cached |= measure(libraries)  # all of them, interleaved, since their rates will be compared
        _cache_rates(cached)
    return {library.title: cached[library.title] for library in libraries}


def measure(libraries: Sequence[Library]) -> dict[str, float]:
    """FLOP/s of each library by title, for the products of SHAPES: the best of REPEATS runs, interleaved between
    libraries. This takes about 50 milliseconds."""
    best = {(library.title, shape): float("inf") for library in libraries for shape in SHAPES}
    with threads.blas_on_one_thread():
        for shape in SHAPES:
            m, k, n = shape
            a, b, out = (np.ones(size, np.float32) for size in ((m, k), (k, n), (m, n)))
            for _ in range(REPEATS):
                for library in libraries:
                    started = time.perf_counter()
                    gemm(a, b, out, library=library)
                    seconds = time.perf_counter() - started
                    best[library.title, shape] = min(best[library.title, shape], seconds)
    flops = sum(2 * m * k * n for m, k, n in SHAPES)
    return {library.title: flops / sum(best[library.title, shape] for shape in SHAPES) for library in libraries}


def considered() -> dict[str, float]:
    """FLOP/s on one thread, by title, of the library in use and of any library that it was compared with."""
    return rates([chosen()]) | {title: rate for title, rate in _cached_rates().items() if title in _titles()}


def _titles() -> list[str]:
    """The titles of the installed libraries."""
    with suppress(metadata.PackageNotFoundError):
        return [NUMPYS.title, f"MKL {metadata.version('mkl')}"]
    return [NUMPYS.title]


def description() -> str:
    """One line: the library in use and its measured rate, then the rates of the other installed libraries."""
    first, *others = sorted(considered().items(), key=lambda item: item[0] != chosen().title)
    rest = "".join(f"; {title}: {rate / 1e9:,.0f}" for title, rate in others)
    return f"{first[0]}, {first[1] / 1e9:,.0f} GFLOP/s in float32 on one thread{rest}"


def _cached_rates() -> dict[str, float]:
    """The rates cached on disk for this processor, by title."""
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        cached = json.loads(_file().read_text(encoding="utf-8"))[machine.processor_model()]
        return {title: float(rate) for title, rate in cached.items()}
    return {}


def _cache_rates(found: dict[str, float]) -> None:
    """Cache rates on disk. If the folder is not writable, each process measures them again."""
    cached = {}
    with suppress(OSError, ValueError, TypeError):
        cached = dict(json.loads(_file().read_text(encoding="utf-8")))
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(_file(), suffix=str(os.getpid())) as partial:
            partial.write_text(json.dumps({**cached, machine.processor_model(): found}, indent=1), encoding="utf-8")


def _file() -> Path:
    return machine.cache_folders()["TINYGRAD2_CACHE_DIR"] / "blas.json"


# Products ------------------------------------------------------------------------------------------------------------


def gemm(
    a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False, library: Library | None = None
) -> None:
    """out = a b, or out += a b if `accumulate`, for matrices (m, k), (k, n) and (m, n) of the same dtype.

    library  the library to use instead of the chosen one.
    """
    function = (library or chosen()).functions.get(out.dtype.name)
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
    """Return PLAIN or TRANSPOSED and the leading dimension, or None if BLAS cannot read the matrix in place."""
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
