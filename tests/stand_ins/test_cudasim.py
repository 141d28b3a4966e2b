"""The simulator detects the kinds of faults that it is designed for. Each is injected into a small kernel."""

import re

import numpy as np
import pytest

from tests.stand_ins import cudasim
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # about twenty kernels are compiled

COMMON = (cuda.FOLDER / "common.cuh").read_text(encoding="utf-8")
KERNELS = """
extern "C" __global__ void reverse(float* y, const float* x) {  // reverses a block through shared memory
  __shared__ float kept[128], spare;
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
  if (threadIdx.x == 0) spare = 0.0f;
}
template <int N>
__device__ float sum(float v) {
  __shared__ float sums[N];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0f;
  for (int i = 0; i < N; i++) v += sums[i];
  return v;
}
extern "C" __global__ void total(float* y, const float* x) {
  float all = sum<4>(x[128 * blockIdx.x + threadIdx.x]);
  if (threadIdx.x == 0) y[blockIdx.x] = all;
}
extern "C" __global__ void copies(float* y, const float* x) {  // waits for two of four copies
  DYN_SMEM(float, kept);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; i++) {
      cp_async16(kept + 4 * i, x + 4 * i);
      cp_async_commit();
    }
    cp_async_wait<2>();
    for (int i = 0; i < 8; i++) y[i] = kept[i];
    cp_async_wait<0>();
  }
}
extern "C" __global__ void pack(float* y, const float* x) {
  Pack<float> p = *(const Pack<float>*)(x + 4 * threadIdx.x);
  for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = p.v[i];
}
extern "C" __global__ void scalars(float* y, int n, long long m, float a, unsigned u, const float* x) {
  y[0] = x ? -1.0f : n + m + a + u;
}
extern "C" __global__ void around(float* y, const float* x, int* turn) {  // each block waits for the previous one
  DYN_SMEM(float, kept);
  if (threadIdx.x == 0) {
    while (*(volatile int*)turn != blockIdx.x) backoff();
    kept[0] = x[blockIdx.x] + (blockIdx.x ? y[blockIdx.x - 1] : 0.0f);
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    y[blockIdx.x] = kept[0];
    *(volatile int*)turn = blockIdx.x + 1;
  }
}
extern "C" __global__ void swap(float* y, const float* x) {  // two blocks of a cluster exchange values
  DYN_SMEM(float, kept);
  cluster_barrier<2>();
  if (threadIdx.x == 0) *in_block<2>(kept, 1 - blockIdx.x % 2) = x[blockIdx.x];
  cluster_barrier<2>();
  if (threadIdx.x == 0) y[blockIdx.x] = kept[0];
}
"""


def run(name, *arguments, code=KERNELS, grid=1, block=128, shared_mem=0, schedule=0):
    before, cudasim.schedule = cudasim.schedule, schedule
    try:
        kernel = cudasim.RawModule(code=COMMON + code, options=("-DREAL=float",)).get_function(name)
        kernel((grid,), (block,), arguments, shared_mem=shared_mem)
    finally:
        cudasim.schedule = before


def injected(name, fault, replacement=""):
    """The source of the kernels with a fault injected."""
    assert re.search(fault, KERNELS)
    return re.sub(fault, replacement, KERNELS)


def results(name, code, x, size, **options):
    outputs = []
    for schedule in range(4):
        y = np.full(size, np.nan, np.float32)
        run(name, y, x, code=code, schedule=schedule, **options)
        outputs.append(y)
    return outputs


X = np.arange(256, dtype=np.float32)


def test_correct_kernels_pass_with_every_schedule():
    for y in results("reverse", KERNELS, X, 128):
        np.testing.assert_array_equal(y, X[:128][::-1])
    for y in results("total", KERNELS, X, 2, grid=2):
        np.testing.assert_array_equal(y, [X[:128].sum(), X[128:].sum()])
    for y in results("copies", KERNELS, X, 8, block=32, shared_mem=64):
        np.testing.assert_array_equal(y, X[:8])
    for y in results("pack", KERNELS, X, 128, block=32):
        np.testing.assert_array_equal(y, X[:128])


@pytest.mark.parametrize("name", ["reverse", "total"])
def test_a_missing_barrier_is_detected(name):
    good, *_ = results(name, KERNELS, X, 128 if name == "reverse" else 2, grid=1)
    code = injected(name, r"__syncthreads\(\);")
    outputs = results(name, code, X, len(good), grid=1)
    assert not all(np.array_equal(y, good, equal_nan=True) for y in outputs)
    assert np.isnan(np.concatenate(outputs)).sum() > np.isnan(good).sum(), "static shared memory must start as NaN"


def test_shared_memory_of_the_previous_block_is_overwritten_with_nan():
    code = injected(
        "reverse", r"kept\[threadIdx.x\] = x\[threadIdx.x\];", "if (blockIdx.x == 0) kept[threadIdx.x] = 1;"
    )
    y = np.zeros(128, np.float32)
    run("reverse", y, X, code=code, grid=2)
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    ("name", "fault", "instead", "message"),
    [
        ("reverse", r"  __syncthreads", "  if (threadIdx.x < 32) __syncthreads", None),
        ("total", r"v = warp_sum\(v\)", "if (threadIdx.x % 2) v = warp_sum(v)", "deadlock|exited|different"),
        ("total", r"v = warp_sum\(v\)", "v += __shfl_xor_sync(0x7fffffffu, v, 16)", "does not contain"),
        ("total", r"v = warp_sum\(v\)", "v += threadIdx.x % 2 ? __shfl_sync(~0u, v, 0) : (__syncwarp(), v)", "differ"),
        ("copies", r"cp_async_wait<0>\(\);", "", "without waiting for its cp.async"),
        ("copies", r"cp_async16\(kept \+ 4 \* i", "cp_async16(kept + 2 * i + 1", "multiple of 16"),
        ("copies", r"cp_async16\(kept \+ 4 \* i", "cp_async16(kept + 8 * i", "outside shared memory"),
        ("copies", r"cp_async16\(kept \+ 4 \* i", "cp_async16(y + 4 * i", "outside shared memory"),
        ("copies", r"x \+ 4 \* i\)", "x + 244 + 4 * i)", "outside the arrays"),
        ("pack", r"x \+ 4 \* threadIdx.x\)", "x + 1 + threadIdx.x)", "misaligned access at line"),
    ],
    ids=[
        "divergent barrier",
        "half of a warp",
        "lane missing in mask",
        "different collectives",
        "copy never waited for",
        "misaligned copy",
        "copy past shared memory",
        "copy to global memory",
        "copy past the array",
        "misaligned load",
    ],
)
def test_a_hang_or_an_invalid_access_is_reported(name, fault, instead, message):
    arguments = {"copies": {"block": 32, "shared_mem": 64}, "pack": {"block": 32}}.get(name, {})
    code = injected(name, fault, instead)
    y = np.zeros(128, np.float32)
    if message is None:  # some warps skip a barrier: a GPU may continue with wrong results
        outputs = results(name, code, X, 128)
        assert not all(np.array_equal(y, X[:128][::-1]) for y in outputs)
        return
    with pytest.raises(RuntimeError, match=message):
        run(name, y, X, code=code, **arguments)


def test_blocks_that_wait_for_each_other_run_with_every_schedule():
    for schedule in range(6):
        y, turn = np.full(5, np.nan, np.float32), np.zeros(1, np.int32)
        run("around", y, X, turn, grid=5, block=64, shared_mem=4, schedule=schedule)
        np.testing.assert_array_equal(y, np.cumsum(X[:5]))
    for y in results("swap", KERNELS, X, 6, grid=6, block=32, shared_mem=4):
        np.testing.assert_array_equal(y, [1, 0, 3, 2, 5, 4])


def test_a_missing_cluster_barrier_is_detected():
    last = injected("swap", r"(kept, 1 - blockIdx.x % 2\) = x\[blockIdx.x\];\n  )cluster_barrier<2>\(\);", r"\1")
    y = np.zeros(6, np.float32)
    # The second block finishes before the first.
    with pytest.raises(RuntimeError, match="has not started, or has finished"):
        run("swap", y, X, code=last, grid=6, block=32, shared_mem=4, schedule=1)


@pytest.mark.parametrize(
    ("name", "fault", "instead", "message"),
    [
        ("around", r"blockIdx.x\) backoff", "blockIdx.x + 1) backoff", "deadlock: .* waiting for another block"),
        ("around", r"DYN_SMEM\(float, kept\)", "__shared__ float kept[1]", "static shared memory"),
        ("swap", r"cluster_barrier<2>\(\);", "", "has not started, or has finished"),
        ("swap", r"in_block<2>\(kept", "in_block<2>(kept + 1", "an address outside shared memory"),
        ("swap", r"cluster_barrier<2>", "cluster_barrier<4>", "not a multiple of the cluster size"),
    ],
)
def test_faults_in_communication_between_blocks_are_reported(name, fault, instead, message):
    turn = [np.zeros(1, np.int32)] if name == "around" else []
    code, y = injected(name, fault, instead), np.zeros(6, np.float32)
    with pytest.raises(RuntimeError, match=message):
        run(name, y, X, *turn, code=code, grid=6, block=64, shared_mem=4, schedule=1)


def test_a_copy_that_is_read_too_early_gives_nan():
    y = np.zeros(8, np.float32)
    run("copies", y, X, code=injected("copies", r"cp_async_wait<2>", "cp_async_wait<3>"), block=32, shared_mem=64)
    np.testing.assert_array_equal(y[:4], X[:4])
    assert np.isnan(y[4:]).all()


def test_a_short_copy_is_padded_with_zeros():
    y = np.full(8, np.nan, np.float32)
    part = injected("copies", r"x \+ 4 \* i\)", "x + 4 * i, 8 * i)")  # 0 and 8 bytes of 16
    run("copies", y, X, code=part.replace("i < 4", "i < 3").replace("wait<2>", "wait<1>"), block=32, shared_mem=64)
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 4, 5, 0, 0])


def test_scalars_are_passed_by_type_and_none_as_a_null_pointer():
    y = np.zeros(1, np.float32)
    good = (y, np.int32(1), np.int64(20), np.float32(300.5), np.uint32(4000), None)
    run("scalars", *good)
    assert y[0] == 4321.5
    for i, wrong in [
        (1, 1),
        (1, np.int64(1)),
        (1, np.uint32(1)),
        (2, np.int32(1)),
        (3, 0.5),
        (3, np.float64(1)),
        (0, 0),
    ]:
        with pytest.raises(TypeError, match=f"argument {i}"):
            run("scalars", *good[:i], wrong, *good[i + 1 :])
    with pytest.raises(TypeError, match="6 arguments, 5 given"):
        run("scalars", *good[:-1])


def test_a_launch_that_no_gpu_supports_is_rejected():
    y = np.zeros(128, np.float32)
    for size in ({"grid": 0}, {"block": 0}, {"block": 1025}, {"block": 32, "shared_mem": 49_153}):
        with pytest.raises(ValueError, match="reverse"):
            run("reverse", y, X, **size)
    bounded = injected("reverse", r"void reverse", "void __launch_bounds__(64 + 32, 2) reverse")
    with pytest.raises(ValueError, match=r"blocks of .*128.*bound: 96"):
        run("reverse", y, X, code=bounded)
    run("reverse", y, X, code=bounded, block=96)


def test_shared_memory_beyond_the_limit_is_rejected(monkeypatch):
    kernel = cudasim.RawModule(code=COMMON + KERNELS, options=("-DREAL=float",)).get_function("reverse")
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    monkeypatch.setattr(cudasim, "shared_memory", 99 << 10)
    with pytest.raises(ValueError, match="reverse: 101377 bytes"):
        kernel.max_dynamic_shared_size_bytes = (99 << 10) + 1
    assert kernel.max_dynamic_shared_size_bytes == 227 << 10
