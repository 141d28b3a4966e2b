"""kernels/dropout.cu on the simulator gives the same bits as reference.dropout_scale."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tests.stand_ins.faults import inject_in
from tinygrad2 import Key, reference
from tinygrad2.kernels import cuda

KEY = Key(0x1234_5678_9ABC_DEF0, step=7, first_sample=0, site=5)


def make_kernels():
    def poisoned(shape, dtype):
        size = int(np.prod(shape))
        return np.full(size + 16, np.nan, dtype)[:size].reshape(shape)  # 16 more, to detect writes past the end

    library = SimpleNamespace(RawModule=cudasim.RawModule, empty=poisoned, ascontiguousarray=np.ascontiguousarray)
    return cuda.CudaKernels(library, reference)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(cudasim, "schedule", 0)
    return make_kernels()


def check(kernels, dtype, shape, first_sample, rate=0.3, offset=0):
    """offset  number of elements between a 16-byte boundary and the start of x."""
    raw = np.random.default_rng(0).normal(size=int(np.prod(shape)) + 16).astype(dtype)
    start = -raw.ctypes.data % 16 // raw.itemsize + offset
    x = raw[start : start + int(np.prod(shape))].reshape(shape)
    before, key = x.copy(), Key(KEY.seed, KEY.step, first_sample, KEY.site)
    first = first_sample * (x.size // x.shape[0])
    factor = reference.dropout_scale(key, first, x.size, rate, np.float32).reshape(shape)
    for kernel in (kernels.dropout_forward, kernels.dropout_backward):
        y = kernel(x, rate, key)
        assert (y.dtype, y.shape) == (x.dtype, shape)
        assert np.isnan(y.base[y.size :].astype(np.float32)).all()
        np.testing.assert_array_equal(y, (x.astype(np.float32) * factor).astype(dtype))
    np.testing.assert_array_equal(x, before)


# The first element is at every position in a group of four random numbers, and its index exceeds 32 bits.
@pytest.mark.parametrize("first_sample", [0, 1, 2, 3, 2**40 + 1])
@pytest.mark.parametrize("shape", [(3, 16), (3, 5), (1, 2, 1031), (2, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_dropout_agrees_with_the_reference(kernels, dtype, shape, first_sample):
    check(kernels, dtype, shape, first_sample)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.999, 1 - 2**-40])
def test_dropout_with_extreme_rates(kernels, rate):
    check(kernels, np.float32, (2, 1000), 1, rate)


@pytest.mark.parametrize("offset", [1, 4])
def test_an_unaligned_slice(kernels, offset):
    check(kernels, bfloat16, (2, 24), 1, offset=offset)


def test_nonfinite_values_propagate_as_in_the_reference(kernels):
    x = np.full((1, 40), np.nan, np.float32)
    x[0, 20:] = np.inf
    with np.errstate(invalid="ignore"):
        expected = reference.dropout_forward(x, 0.5, KEY)
    np.testing.assert_array_equal(kernels.dropout_forward(x, 0.5, KEY), expected)


def test_float64_uses_the_reference(kernels):
    x = np.ones((2, 9))
    np.testing.assert_array_equal(kernels.dropout_forward(x, 0.3, KEY), reference.dropout_forward(x, 0.3, KEY))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_do_not_depend_on_the_order_of_the_threads(kernels, monkeypatch, order):
    monkeypatch.setattr(cudasim, "schedule", order)
    check(kernels, bfloat16, (2, 2048), 1)


FAULTS = [
    ("dropout", "i + 8 <= n &&", "i < n &&"),  # the last access is out of bounds
    ("dropout", "group + 1)", "group)"),
    ("dropout", "first + i) / 4", "first) / 4 + i / 4 % 256"),
    ("dropout", "offset = first % 4", "offset = 0"),
    ("dropout", "k < offset", "k < 1"),
    ("dropout", "= c.y", "= c.z"),
    ("dropout", ">= threshold", ">= (unsigned)threshold"),  # a rate close to 1 would keep all elements
    ("dropout", "factor(k * N + j)", "factor(k * N)"),
    ("philox", "key.step", "0"),
    ("philox", "group >> 32", "0"),
    ("philox", "round < 10", "round < 9"),
]


def check_all():
    kernels = make_kernels()
    for first_sample in (0, 1, 3, 2**40 + 1):
        check(kernels, bfloat16, (3, 5), first_sample)
        check(kernels, bfloat16, (2, 2051), first_sample)
    check(kernels, bfloat16, (2, 100), 0, 1 - 2**-40)


@pytest.mark.slow  # each fault is compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(kernels, monkeypatch, fault):
    inject_in(monkeypatch, "dropout", fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_all()
