"""Helpers for tests of the attention kernels: simulated kernels on NumPy arrays, and random activations."""

import math
import types

import numpy as np
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tinygrad2.kernels import cuda

BOUND = {"bfloat16": 4e-3, "float32": 1e-6}
rng = np.random.default_rng(0)


def poisoned(shape, dtype):
    return np.full(shape, np.nan, dtype=dtype)


def no_reference(*arguments):
    raise AssertionError("the reference was called for a case that has a kernel")


H200 = cuda.Multiprocessor(228 << 10, 2048)
A100 = cuda.Multiprocessor(164 << 10, 2048)
L4 = cuda.Multiprocessor(100 << 10, 1536)  # compute capability 8.6, 8.9 and 12.0


def kernels(reference=None, processor=H200):
    """The launchers on NumPy arrays and simulated kernels; new arrays contain NaN."""
    library = types.SimpleNamespace(RawModule=cudasim.RawModule, empty=poisoned, ascontiguousarray=np.ascontiguousarray)
    table = cuda.CudaKernels(library, reference or types.SimpleNamespace(attention_forward=no_reference))
    table.processor = processor
    return table


def activations(*shape, dtype=bfloat16, scale=1.5):
    """Random numbers, followed by NaN in memory, so that reads past the end are detected."""
    count = math.prod(shape)
    memory = poisoned(count + 256, dtype)
    memory[:count] = scale * rng.standard_normal(count)
    return memory[:count].reshape(shape)


def error(result, expected):
    assert np.isfinite(result.astype("d")).all()
    return np.linalg.norm(result.astype("d") - expected) / np.linalg.norm(expected)


def in_every_schedule(call, monkeypatch):
    """The results of a call, which must be bit-identical for any order of the threads."""
    results = []
    for schedule in range(4):
        monkeypatch.setattr(cudasim, "schedule", schedule)
        results.append(call())
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes(), "the result depends on the schedule"
    return results[0]
