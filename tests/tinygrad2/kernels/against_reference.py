"""Compare simulated CUDA kernels on NumPy arrays with reference.py in float64."""

import types

import ml_dtypes
import numpy as np

from tests.stand_ins import cudasim
from tinygrad2 import reference
from tinygrad2.kernels import cuda

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
TOLERANCE = {BF16: 6e-3, F32: 3e-6}  # relative to the largest element: one rounding to each type, and a margin


def empty(shape, dtype):
    """A new array, filled with NaN so that missing writes are detected."""
    return np.full(shape, np.nan, dtype)


class Array(np.ndarray):
    """An array that provides its address as CuPy's arrays do."""

    data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))


def kernels():
    library = types.SimpleNamespace(
        RawModule=cudasim.RawModule,
        empty=empty,
        ascontiguousarray=lambda x: np.ascontiguousarray(x).view(Array),
        float32=np.float32,
    )
    return cuda.CudaKernels(library, reference)


def wide(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x


def check(k, name, args, added=0):
    """Call a kernel and the reference on the same values, and compare their results.

    The results include the last `added` arguments, to which the function adds. The other arguments must be unchanged.
    Returns all results of the kernel.
    """
    ours = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    theirs = [wide(a) for a in args]
    got, expected = getattr(k, name)(*ours), getattr(reference, name)(*theirs)
    got, expected = (list(r) if isinstance(r, tuple) else [r] for r in (got, expected))
    first_added = len(args) - added
    for before, after in zip(args[:first_added], ours[:first_added], strict=True):
        assert not isinstance(before, np.ndarray) or before.tobytes() == after.tobytes()
    for i in range(first_added, len(args)):
        if ours[i] is not None:
            got.append(ours[i])
            expected.append(theirs[i])
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        error = np.max(np.abs(wide(g) - e), initial=0) / max(np.max(np.abs(e), initial=0), 1e-3)
        assert error < TOLERANCE[g.dtype], f"{name}: {error}"
    return got


def normal(*shape, dtype=F32, seed=0, scale=1.0):
    return (scale * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(dtype)


def unaligned(array):
    """A copy of a matrix whose address is one element past a 16-byte boundary; other values are returned unchanged."""
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        return array
    memory = np.empty(array.size + 1, array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


def check_unaligned(cases):
    """Check that unaligned matrices give the same bits as aligned ones."""
    k = kernels()
    for name, args, _ in cases:
        aligned, misaligned = ([a.copy() if isinstance(a, np.ndarray) else a for a in args] for _ in range(2))
        results = [getattr(k, name)(*given) for given in (aligned, map(unaligned, misaligned))]
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert a.tobytes() == b.tobytes()


def check_fallback(cases):
    """Check that in float64, the kernels are the functions of reference.py."""
    for name, args, added in cases:
        args = [wide(a) for a in args]
        theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        got, expected = getattr(kernels(), name)(*args), getattr(reference, name)(*theirs)
        for g, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, expected)), strict=True):
            assert g.dtype == np.float64
            assert np.array_equal(g, e)
        for g, e in zip(args[len(args) - added :], theirs[len(args) - added :], strict=True):
            assert np.array_equal(g, e)


def bits_in(schedule, run):
    """The bits of the arrays that `run` returns with one of the simulator's schedules."""
    cudasim.schedule = schedule
    try:
        return [result.tobytes() for result in run()]
    finally:
        cudasim.schedule = 0


def fault_is_caught(inject, run):
    """Whether a fault changes bits or fails a check with at least one schedule."""
    correct = bits_in(0, run)
    inject()

    def caught(schedule):
        try:
            return bits_in(schedule, run) != correct
        except (AssertionError, RuntimeError):
            return True

    return any(caught(schedule) for schedule in range(4))
