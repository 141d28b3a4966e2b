"""The fragments of mma and ldmatrix in the simulators and in attention.cuh match NVIDIA's CuTe (fragments.txt)."""

from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim, ptxsim
from tinygrad2.kernels import cuda

SOURCE = """
#include "common.cuh"
#include "attention.cuh"
extern "C" __global__ void __launch_bounds__(32)
product(float* d, const unsigned* a, const unsigned* b, const float* c) {
  int lane = threadIdx.x;
  unsigned left[4];
  float sum[4];
  for (int i = 0; i < 4; i++) left[i] = a[lane * 4 + i], sum[i] = c[lane * 4 + i];
  mma_bf16_16816(sum, left, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = sum[i];
}
extern "C" __global__ void __launch_bounds__(32)
load(unsigned* plain, unsigned* transposed, const bf16* matrix) {
  DYN_SMEM(bf16, tile);
  int lane = threadIdx.x;
  for (int i = 0; i < 8; i++) tile[lane * 8 + i] = matrix[lane * 8 + i];
  __syncwarp();
  unsigned found[4];
  ldmatrix_x4(found, tile + lane * 8);
  for (int i = 0; i < 4; i++) plain[lane * 4 + i] = found[i];
  ldmatrix_x4_trans(found, tile + lane * 8);
  for (int i = 0; i < 4; i++) transposed[lane * 4 + i] = found[i];
}
extern "C" __global__ void __launch_bounds__(32)
factors(unsigned* left, unsigned* right, unsigned* right_of_transposed, const bf16* matrix) {
  DYN_SMEM(bf16, tile);
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i / 16 * LD + i % 16] = matrix[i];
  __syncwarp();
  unsigned found[4];
  left_factor(found, tile, 0, 0);
  for (int i = 0; i < 4; i++) left[lane * 4 + i] = found[i];
  right_factor(found, tile, 0, 0);
  for (int i = 0; i < 4; i++) right[lane * 4 + i] = found[i];
  right_factor_of_transposed(found, tile, 0, 0);
  for (int i = 0; i < 4; i++) right_of_transposed[lane * 4 + i] = found[i];
}
"""


def fragments():
    """{matrix: array (lanes, elements, 2)}, the row and the column of each element."""
    found = {}
    for line in Path(__file__).with_name("fragments.txt").read_text().splitlines():
        if not line.startswith("#"):
            matrix, lane, *places = line.split()
            assert len(found.setdefault(matrix, [])) == int(lane)
            found[matrix].append([[int(n) for n in place.split(",")] for place in places])
    return {matrix: np.array(rows) for matrix, rows in found.items()}


CUTE = fragments()


def fragments_of(values, matrix):
    """The elements of an array that each lane has in its registers. A register contains two 16-bit elements."""
    rows, columns = np.moveaxis(CUTE[matrix], -1, 0)
    return np.ascontiguousarray(values[rows, columns])


@pytest.fixture(params=["source", pytest.param("ptx", marks=pytest.mark.extras("cupy"))])
def kernel(request, tmp_path):
    """A function that runs a kernel of SOURCE with one warp, in the C++ or the PTX simulator."""
    file = tmp_path / "fragments.cu"
    file.write_text(SOURCE)
    simulator = cudasim if request.param == "source" else ptxsim
    module = simulator.RawModule(cuda.source(file), ("-std=c++17", "-DD=16"))

    def run(name, *arguments):
        module.get_function(name)((1,), (32,), arguments, shared_mem=1024)

    return run


def test_mma_fragments_match_cute(kernel):
    draw = np.random.default_rng(0)
    a, b, c = (draw.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (8, 16), (16, 8)))
    left, right = (fragments_of(x.astype(bfloat16), name).view(np.uint32) for x, name in ((a, "A"), (b, "B")))
    d = np.zeros((32, 4), np.float32)
    kernel("product", d, left, right, fragments_of(c, "C"))
    np.testing.assert_array_equal(d, fragments_of(a @ b.T + c, "C"))


def test_ldmatrix_fragments_match_cute(kernel):
    matrix = np.arange(256, dtype=np.uint16).reshape(32, 8)
    plain, transposed = (np.zeros((32, 4), np.uint32) for _ in range(2))
    kernel("load", plain, transposed, matrix.view(bfloat16))
    np.testing.assert_array_equal(plain.view(np.uint16), fragments_of(matrix, "ldmatrix"))
    np.testing.assert_array_equal(transposed.view(np.uint16), fragments_of(matrix, "ldmatrix.trans"))


def test_attention_fragments_match_cute(kernel):
    """Registers 0 and 1 of a right factor are the B fragment for the first 8 columns of the product, registers 2 and 3
    that for the others."""
    tile = np.arange(256, dtype=np.uint16).reshape(16, 16)
    left, right, right_of_transposed = (np.zeros((32, 4), np.uint32) for _ in range(3))
    kernel("factors", left, right, right_of_transposed, tile.view(bfloat16))
    np.testing.assert_array_equal(left.view(np.uint16), fragments_of(tile, "A"))
    for found, columns in ((right, tile.T), (right_of_transposed, tile)):
        expected = np.concatenate([fragments_of(columns[:8], "B"), fragments_of(columns[8:], "B")], axis=1)
        np.testing.assert_array_equal(found.view(np.uint16), expected)
