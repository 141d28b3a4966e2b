#include "common.cuh"
#include "columns.cuh"
// Column sums, in two stages with a fixed order: blocks write partial sums, and add_partials adds them to the target.

// partial[p] = sum of block p's rows of x (N, C). Reads x: 2 bytes and 1 FLOP per element in bf16. At N = 65536 and
// C = 768: 0.1 GB, at least 0.023 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
column_sums(float* __restrict__ partial, const REAL* __restrict__ x, int rows) {
  float sum[VEC] = {};
  int c = first_column(), step = row_step();
  if (c < C) {
    for (int row = first_row(); row < rows; row += AHEAD * step) {
      Vec<REAL> in[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (row + i * step < rows) in[i] = *(const Vec<REAL>*)(x + (size_t)(row + i * step) * C + c);
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (row + i * step < rows)
#pragma unroll
          for (int k = 0; k < VEC; k++) sum[k] += in[i][k];
    }
  }
  store_partial(partial, sum);
}

// Add the sums over the rows of partial[0] and partial[1] to `first` and `second`; partial is (gridDim.y, parts, C). A
// block processes 32 columns, and each of its 32 warps every 32nd row. For a LayerNorm with C = 768, the kernel reads
// 1.6 MB from the L2 cache, which takes less time than a launch.
extern "C" __global__ void __launch_bounds__(1024)
add_partials(float* __restrict__ first, float* __restrict__ second, const float* __restrict__ partial, int parts) {
  __shared__ float sums[32][32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  partial += (size_t)blockIdx.y * parts * C;
  float sum = 0.f;
  for (int part = warp; part < parts && c < C; part += 8 * 32) {
    float in[8];  // all loads are issued before the first is used
#pragma unroll
    for (int i = 0; i < 8; i++) in[i] = part + i * 32 < parts ? partial[(size_t)(part + i * 32) * C + c] : 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += in[i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp || c >= C) return;
#pragma unroll
  for (int w = 1; w < 32; w++) sum += sums[w][lane];
  float* into = blockIdx.y ? second : first;
  into[c] += sum;
}
