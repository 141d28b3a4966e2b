"""Every CUDA kernel compiles for every supported GPU without register spills (see tests/nvrtc.py)."""

import pytest

from tests import nvrtc
from tests.stand_ins.cudasim import KERNEL
from tinygrad2.kernels import cuda

binding = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
try:
    binding.getVersion()
except RuntimeError:
    pytest.skip("NVRTC is not installed: pip install -e '.[cuda-check]'", allow_module_level=True)

pytestmark = pytest.mark.extras("cupy")

BIG_ARRAY = """
extern "C" __global__ void sums(float* out, const int* where, int n) {
  float kept[ROOM];
  for (int i = 0; i < ROOM; i++) kept[i] = out[i];
  for (int i = 0; i < n; i++) kept[where[i]] += 1.0f;  // registers cannot be indexed at run time
  for (int i = 0; i < ROOM; i++) out[i] = kept[i];
}
"""
MANY_LIVE = """
extern "C" __global__ void __launch_bounds__(1024) products(float* out, const float* in) {
  float kept[ROOM];
#pragma unroll
  for (int i = 0; i < ROOM; i++) kept[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ROOM; i++) out[i * 1024 + threadIdx.x] = kept[i] * kept[ROOM - 1 - i];
}
"""
MEMBERS = """
struct alignas(16) Eight {
  unsigned short v[8];
};
__device__ void add(float* sum, const Eight& x) {
  for (int k = 0; k < 8; k++) sum[k] += x.v[k];
}
extern "C" __global__ void sums(float* __restrict__ out, const unsigned short* __restrict__ in, int n) {
  float sum[8] = {};
#pragma unroll 1
  for (int i = 0; i < n; i++) add(sum, *(const Eight*)(in + 8 * i));
  for (int k = 0; k < 8; k++) out[k] = sum[k];
}
"""


def check(family, architecture, defines):
    code = cuda.source(nvrtc.families()[family])
    usages = nvrtc.compiled(code, architecture, defines)
    names = [use.name for use in usages]
    assert set(names) <= set(KERNEL.findall(code)), "cudasim.KERNEL does not match the declaration of a kernel"
    assert names
    assert [use for use in usages if use.stack or use.spilled] == []


@pytest.mark.parametrize("family", nvrtc.families())
def test_kernels_compile_for_the_main_size(family):
    rows = nvrtc.sizes("90")
    assert family in rows, f"tests/nvrtc.py: add {family} to sizes()"
    check(family, "90", rows[family][0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", nvrtc.GPUS)
@pytest.mark.parametrize("family", nvrtc.families())
def test_kernels_compile_for_every_size(family, architecture):
    rows = nvrtc.sizes(architecture)[family]
    assert rows or (architecture in nvrtc.FLOAT32_ONLY and family in ("attention_forward", "attention_backward"))
    for defines in rows:
        check(family, architecture, defines)


# The expected number of 16-bit loads: of biases and slices, which may be unaligned, and of decode's embeddings, where
# each thread reads one value (counted once per copy of the unrolled loop).
NARROW = {
    "attention_cached": 2, "cross_entropy": 1, "decode": 20, "dropout": 8, "gelu_backward": 8, "gelu_exact_backward": 8,
    "gelu_exact_forward": 8, "gelu_forward": 8,
}  # fmt: skip


@pytest.mark.parametrize("family", nvrtc.families())
def test_kernels_read_16_bytes_at_a_time(family):
    loads = nvrtc.narrow_loads(cuda.source(nvrtc.families()[family]), nvrtc.sizes("90")[family][0])
    assert loads == {name: NARROW.get(name, 0) for name in loads}


def test_a_split_access_is_reported():
    assert nvrtc.narrow_loads(MEMBERS, {}) == {"sums": 8}
    assert nvrtc.narrow_loads(MEMBERS.replace("const Eight& x", "Eight x"), {}) == {"sums": 0}


def test_a_local_array_is_reported_as_a_stack_frame():
    (use,) = nvrtc.compiled(BIG_ARRAY, "90", {"ROOM": 64})
    assert use.name == "sums"
    assert use.stack >= 256


def test_spilled_registers_are_reported():
    (use,) = nvrtc.compiled(MANY_LIVE, "90", {"ROOM": 8})
    assert (use.stack, use.spilled) == (0, 0)
    assert 8 < use.registers <= 64
    (use,) = nvrtc.compiled(MANY_LIVE, "90", {"ROOM": 128})
    assert use.spilled > 0


def test_a_compile_error_is_reported_with_its_message():
    with pytest.raises(nvrtc.CompileError, match="INFINITY"):  # defined by nvcc, but not by NVRTC
        nvrtc.compiled('extern "C" __global__ void f(float* x) { *x = INFINITY; }', "90", {})
