"""kernels/optimizer.cu on the simulator, compared with reference.py in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim, strict_cupy
from tests.stand_ins.faults import inject_in
from tests.tinygrad2.copies import copy_of, with_copies
from tests.tinygrad2.optim.test_optimizer import Model
from tinygrad2 import optim, reference
from tinygrad2.backend import get_backend
from tinygrad2.kernels import cuda


def poisoned(shape, dtype):
    return np.full(shape, np.nan, dtype)


@pytest.fixture
def kernels():
    return make_kernels()


def make_kernels():
    library = SimpleNamespace(RawModule=cudasim.RawModule, empty=poisoned, ascontiguousarray=np.ascontiguousarray)
    return cuda.CudaKernels(library, reference)


@pytest.fixture(autouse=True)
def schedule(monkeypatch):
    monkeypatch.setattr(cudasim, "schedule", 0)


def flat(n, offset=0, dtype=np.float32, seed=0):
    """n random values, `offset` elements past a 16-byte boundary. The memory around them contains 7."""
    raw = np.full(n + 32, 7, dtype)
    start = -raw.ctypes.data % 16 // raw.itemsize + offset
    raw[start : start + n] = np.random.default_rng(seed).normal(size=n)
    return raw[start : start + n]


# Sizes: empty, less than one access, one more than a block processes, more than all blocks process at once.
@pytest.mark.parametrize("n", [0, 3, 1024, 4097, 70_001, 4096 * 1024 + 4099])
def test_squared_norm_agrees_with_the_reference(kernels, n):
    x = flat(n)
    total = kernels.squared_norm(x)
    assert (total.shape, total.dtype) == ((3,), np.float32)
    np.testing.assert_allclose(total[:2], reference.squared_norm(x.astype("d"))[:2], rtol=3e-7)
    np.testing.assert_array_equal(kernels.squared_norm(flat(n, offset=1)), total)
    np.testing.assert_array_equal(x, flat(n))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_squared_norm_of_nonfinite_values_is_not_finite(kernels, bad):
    x = flat(5000)
    x[4999] = bad
    assert not np.isfinite(reference.norm(kernels.squared_norm(x)))


def stepped(kernels, n, offset=0, scale=0.7, step=3, betas=(0.9, 0.999), dtype=np.float32):
    """Return [value, m, v] after a step on slices that start at `offset`, and the value before it."""
    value, grad, m, v = (flat(n, offset, dtype, seed) for seed in range(4))
    for array in (value, grad, m, v):
        array[...] = array.astype(np.float32)
    v *= v
    before = value.copy()
    numbers = (np.full((), number, dtype) for number in (scale, 1e-2))
    kernels.adamw_step(value, grad, m, v, *numbers, *betas, 1e-8, 0.1, np.full((), step, dtype))
    return [value, m, v], before


@pytest.mark.parametrize("n", [1, 6, 1024, 2503])
@pytest.mark.parametrize("step", [1, 3, 20_000])
def test_adamw_step_agrees_with_the_reference(kernels, n, step):
    after, before = stepped(kernels, n, step=step)
    expected, _ = stepped(reference, n, step=step, dtype=np.float64)
    # Rounding is relative to the change, which can be far larger than the value, since the moments are arbitrary.
    bound = 1e-6 * (np.abs(expected[0] - before) + np.abs(before))
    assert (np.abs(after[0] - expected[0]) <= bound).all()
    np.testing.assert_allclose(after[1], expected[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(after[2], expected[2], rtol=1e-6)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0)])
def test_adamw_without_moments(kernels, betas):
    after, _ = stepped(kernels, 100, step=1, betas=betas)
    expected, _ = stepped(reference, 100, step=1, betas=betas, dtype=np.float64)
    np.testing.assert_allclose(after[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_slices_give_the_same_bits_and_memory_around_them_is_unchanged(kernels, offset):
    for array, correct in zip(stepped(kernels, 1030, offset)[0], stepped(kernels, 1030)[0], strict=True):
        np.testing.assert_array_equal(array, correct)
        first = (array.ctypes.data - array.base.ctypes.data) // array.itemsize
        assert (np.delete(array.base, np.arange(first, first + 1030)) == 7).all()


def test_adamw_changes_nothing_if_scale_is_nan(kernels):
    after, value = stepped(kernels, 100, scale=np.nan)
    np.testing.assert_array_equal(after[0], value)
    for array, old in zip(after, stepped(SimpleNamespace(adamw_step=lambda *_: None), 100)[0], strict=True):
        np.testing.assert_array_equal(array, old)


def test_adamw_of_empty_arrays(kernels):
    stepped(kernels, 0)


def test_float64_uses_the_reference(kernels):
    after, expected = (stepped(table, 20, dtype=np.float64)[0] for table in (kernels, reference))
    np.testing.assert_array_equal(after[0], expected[0])
    assert kernels.squared_norm(np.full(3, 2.0))[0] == 12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_results_do_not_depend_on_the_order_of_the_threads(kernels, monkeypatch, order):
    first = [*stepped(kernels, 2503)[0], kernels.squared_norm(flat(70_001))]
    monkeypatch.setattr(cudasim, "schedule", order)
    for array, correct in zip([*stepped(kernels, 2503)[0], kernels.squared_norm(flat(70_001))], first, strict=True):
        np.testing.assert_array_equal(array, correct)


def test_training_with_bfloat16_copies_on_the_device():
    """AdamW with these kernels updates the copies, never blocks the host, and gives the same values as on the CPU."""
    on_cpu = Model("float32")
    with strict_cupy.registered() as counters:
        backend, library = get_backend("cuda"), strict_cupy.library
        with_simulator = SimpleNamespace(
            RawModule=cudasim.RawModule, empty=library.empty, ascontiguousarray=library.ascontiguousarray
        )
        table = cuda.CudaKernels(with_simulator, backend.kernels)
        backend.kernels.adamw_step, backend.kernels.squared_norm = table.adamw_step, table.squared_norm
        on_device = with_copies(Model("float32").to("cuda"))
        optimizers = [optim.AdamW(model, lr=0.01) for model in (on_cpu, on_device)]
        R = np.random.default_rng(1)
        for _ in range(3):
            for p, q in zip(on_cpu.parameters(), on_device.parameters(), strict=True):
                p.grad = R.normal(size=p.shape).astype(np.float32)
                q.grad = p.grad
            syncs = counters.syncs
            norms = [optimizer.step(1.0) for optimizer in optimizers]
            assert counters.syncs == syncs
            np.testing.assert_allclose(norms[1].get(), norms[0], rtol=1e-6)
        for p, q in zip(on_cpu.parameters(), on_device.parameters(), strict=True):
            np.testing.assert_allclose(q.data.get(), p.data, rtol=1e-5)
            np.testing.assert_array_equal(copy_of(q), q.data.get().astype(bfloat16))


FAULTS = [
    ("load4", "i + 4 <= n) return", "i < n) return"),  # the last access is out of bounds
    ("store4", "if (i + j < n) p", "p"),
    ("block_sum", "__syncthreads();", ""),
    ("block_sum", "threadIdx.x < WARPS ? sums", "threadIdx.x < WARPS - 1 ? sums"),
    ("square_partials", "gridDim.x * 4096", "gridDim.x * 8192"),
    ("square_partials", "k * 1024 + thr", "k * 512 + thr"),
    ("sum_partials", "i += 256", "i += 128"),
    ("adamw", "|| isnan(scale)", ""),
    ("adamw", "g.v[j] * scale", "g.v[j]"),
    ("adamw", "1.0f - *lr * weight_decay", "1.0f"),
    ("adamw", "-expm1f(*step * log_beta1)", "rest1"),
    ("adamw", "* root + eps", "+ eps"),
    ("adamw", "store4(v, i, n, whole, second);", ""),
]


def check(monkeypatch):
    kernels = make_kernels()
    for n in (3, 1024, 4097):
        test_squared_norm_agrees_with_the_reference(kernels, n)
    for n in (6, 1024):
        test_adamw_step_agrees_with_the_reference(kernels, n, 3)
    test_adamw_changes_nothing_if_scale_is_nan(kernels)
    test_unaligned_slices_give_the_same_bits_and_memory_around_them_is_unchanged(kernels, 1)
    test_results_do_not_depend_on_the_order_of_the_threads(kernels, monkeypatch, 2)
    test_squared_norm_agrees_with_the_reference(kernels, 4096 * 1024 + 4099)


@pytest.mark.slow  # each fault is compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(monkeypatch, fault):
    inject_in(monkeypatch, "optimizer", fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check(monkeypatch)
