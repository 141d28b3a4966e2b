"""The stand-in for CuPy: bfloat16, kernels and streams. (For the rest, see test_backend.py.)"""

import ctypes

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import strict_cupy
from tests.stand_ins.strict_cupy import device, library
from tinygrad2 import Key
from tinygrad2.kernels.cuda import _philox_key

SCALE = """
extern "C" __global__ void scale(float* y, const float* x, float factor, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = WIDER * factor * x[i];
}
extern "C" __global__ void shared(float* y) {
  DYN_SMEM(float, kept);
  kept[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
"""


def on_device(values, dtype=bfloat16):
    return library.asarray(np.asarray(values, dtype=dtype))


@pytest.fixture
def scale():
    module = library.RawModule(code=SCALE, options=("-std=c++17", "-DWIDER=2"))
    return module.get_function("scale")


def test_a_kernel_runs_on_device_arrays_and_counts_as_a_launch(scale):
    x, y = on_device(np.arange(5), np.float32), library.empty(5, np.float32)
    device.reset()
    scale((2,), (4,), (y, x, np.float32(1.5), np.int32(5)))
    assert (device.launches, device.syncs, device.float64) == (1, 0, 0)
    np.testing.assert_array_equal(y.get(), 3 * np.arange(5))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (lambda y, x: (y, x, 1.5, np.int32(5)), "argument 2"),
        (lambda y, x: (y, x, np.float32(1.5), 5), "argument 3"),
        (lambda y, x: (y, x, np.float64(1.5), np.int32(5)), "argument 2"),
        (lambda y, x: (y, x[::2], np.float32(1.5), np.int32(2)), "argument 1"),
        (lambda y, x: (y, np.zeros(5, np.float32), np.float32(1.5), np.int32(5)), "numpy.ndarray"),
        (lambda y, x: (y, x, np.float32(1.5)), "4 arguments"),
    ],
    ids=["Python float", "Python int", "float64", "strides", "host array", "too few arguments"],
)
def test_arguments_that_cupy_would_pass_incorrectly_are_rejected(scale, arguments, error):
    x, y = on_device(np.arange(5), np.float32), library.empty(5, np.float32)
    with pytest.raises(TypeError, match=error):
        scale((2,), (4,), arguments(y, x))


def test_large_shared_memory_must_be_requested():
    kernel = library.RawModule(code=SCALE, options=("-DWIDER=1",)).get_function("shared")
    y = library.empty(8, np.float32)
    with pytest.raises(ValueError, match="max_dynamic_shared_size_bytes"):
        kernel((1,), (8,), (y,), shared_mem=60_000)
    kernel.max_dynamic_shared_size_bytes = 60_000
    kernel((1,), (8,), (y,), shared_mem=60_000)
    np.testing.assert_array_equal(y.get(), np.ones(8))
    with pytest.raises(AttributeError):
        kernel.max_shared = 1
    with pytest.raises(TypeError, match="tuples"):
        kernel(1, (8,), (y,))


def test_new_memory_is_not_zero():
    assert np.isnan(library.empty((2, 3), np.float32).get()).all()
    assert np.isnan(library.empty_like(on_device([1.0])).get().astype(np.float32)).all()


def test_bfloat16_sums_and_products_are_computed_in_float32():
    ones = on_device(np.ones(1000))
    assert float(ones.sum()) == float(library.sum(ones)) == 1000  # in bfloat16, the sum would not exceed 256
    assert ones.sum().dtype == bfloat16
    assert library.sum(ones, dtype=np.float32).dtype == np.float32
    product = ones.reshape(1, 1000) @ ones.reshape(1000, 1)
    assert product.dtype == bfloat16
    assert float(product[0, 0]) == 1000


def test_bfloat16_is_promoted_as_in_cupy_or_raises():
    x = on_device(np.ones((2, 2)))
    assert (x * on_device(np.ones((2, 2)), np.float32)).dtype == np.float32
    assert (x + x).dtype == bfloat16
    assert (x * bfloat16(2)).dtype == bfloat16
    with pytest.raises(TypeError, match="Python number"):
        x * 2.0
    with pytest.raises(TypeError, match="at most two axes"):
        x.reshape(1, 2, 2) @ x.reshape(1, 2, 2)
    with pytest.raises(TypeError, match="a bfloat16 output"):
        library.matmul(x, x, out=library.empty((2, 2), np.float32))
    with pytest.raises(TypeError, match="require bfloat16 operands"):
        x @ on_device(np.ones((2, 2)), np.float32)


def test_pointers_streams_and_device_properties():
    x = on_device(np.arange(6).reshape(2, 3), np.float32)
    assert x[1:].data.ptr == x.data.ptr + 12
    assert x.flags.c_contiguous
    assert not x.T.flags.c_contiguous
    assert library.ascontiguousarray(x.T).flags.c_contiguous
    cuda = library.cuda
    assert cuda.Device(0).compute_capability == "90"
    assert cuda.runtime.getDeviceProperties(0)["major"] == 9
    main, other = cuda.get_current_stream(), cuda.Stream(non_blocking=True)
    assert main.ptr == 0 != other.ptr
    with other:
        assert cuda.get_current_stream() is other
    assert cuda.get_current_stream() is main
    other.wait_event(main.record())
    with pytest.raises(strict_cupy.CUDARuntimeError):
        other.wait_event(cuda.Event())


@pytest.mark.extras("cupy")
def test_assumptions_of_the_kernels_hold_for_the_installed_cupy():
    """Test without a GPU: views of memory that is never accessed, and the bytes of a struct passed to a kernel."""
    cupy = pytest.importorskip("cupy")
    scalar = pytest.importorskip("cupy._core._scalar").CScalar
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 40, 1 << 40, None, device_id=0), 0)
    logits = cupy.ndarray((65536, 50304), dtype=bfloat16, memptr=memory)
    part = logits[:, :50257]
    assert part.base is logits
    assert (part.strides, part.data.ptr) == (logits.strides, logits.data.ptr)
    assert cupy.ascontiguousarray(logits) is logits
    assert logits.astype("bfloat16", copy=False) is logits
    key = scalar(_philox_key(Key((2 << 32) + 1, step=4, site=3)))
    assert np.frombuffer(ctypes.string_at(key.ptr, 16), dtype=np.uint32).tolist() == [1, 2, 3, 4]
