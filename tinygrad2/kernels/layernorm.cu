#include "common.cuh"
// LayerNorm, optionally fused with the preceding residual addition. C is the number of channels (-DC).
//
// A row is kept in the registers of ROW_WARPS warps, with at most 24 channels per lane up to C = 6144, so no array is
// read twice. A block of WARPS warps processes ROWS rows at a time, and a fixed number of blocks iterates over all
// rows. Weight and bias are kept in shared memory, so they need no alignment. If the size of a row is not a multiple of
// 16 bytes, the same code reads channel by channel.
constexpr int VEC = C % Pack<REAL>::N ? 1 : Pack<REAL>::N;
constexpr int WARPS = 8, ROW_WARPS = C <= 768 ? 1 : C <= 1536 ? 2 : C <= 3072 ? 4 : 8;
constexpr int ROWS = WARPS / ROW_WARPS, LANES = 32 * ROW_WARPS;
constexpr int PER_LANE = (C + LANES * VEC - 1) / (LANES * VEC);
constexpr float SMALL = 5.421010862427522e-20f;  // 2^-64, the scale for values whose squares overflow

template <class T>
using Vec = Pack<T, VEC>;

// Sum each of N values over the lanes of a row; every lane gets the same bits. Two consecutive calls need different
// `slots`, since warps may still be reading the slots of the first call until the barrier of the second call.
template <int N>
__device__ __forceinline__ void row_sums(float (&v)[N], float (&slots)[WARPS][N]) {
  int warp = threadIdx.x / 32, first = warp / ROW_WARPS * ROW_WARPS;
#pragma unroll
  for (int n = 0; n < N; n++) v[n] = warp_sum(v[n]);
  if (ROW_WARPS == 1) return;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; n++) slots[warp][n] = v[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    v[n] = slots[first][n];
#pragma unroll
    for (int w = 1; w < ROW_WARPS; w++) v[n] += slots[first + w][n];
  }
}

template <bool ADD>
__device__ __forceinline__ void forward(REAL* s, REAL* y, float* mean, float* rstd, const REAL* x, const REAL* delta,
                                        const float* weight, const float* bias, int rows, float eps) {
  DYN_SMEM(float, gains);  // weight, bias: 2 C elements
  __shared__ float slots[WARPS][1], square_slots[WARPS][2];
  for (int c = threadIdx.x; c < C; c += WARPS * 32) gains[c] = weight[c], gains[C + c] = bias[c];
  __syncthreads();
  int lane = threadIdx.x % LANES;
  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
    int row = first + threadIdx.x / LANES, end = row < rows ? C : 0;  // all threads reach the barriers
    size_t start = (size_t)row * C;
    float total[1] = {}, squares[2] = {};  // squares: sums of (x - mean)^2, and of its multiple by SMALL^2
    Vec<REAL> in[PER_LANE], more[PER_LANE];  // all loads are issued before the first is used
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      in[i] = *(const Vec<REAL>*)(x + start + c);
      if (ADD) more[i] = *(const Vec<REAL>*)(delta + start + c);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      float sum[VEC];
      if (ADD) {
#pragma unroll
        for (int k = 0; k < VEC; k++) sum[k] = in[i][k] + more[i][k];
        in[i] = Vec<REAL>(sum);  // rounded, as in the backward pass
        *(Vec<REAL>*)(s + start + c) = in[i];
      }
#pragma unroll
      for (int k = 0; k < VEC; k++) total[0] += in[i][k];
    }
    row_sums(total, slots);
    float m = total[0] * (1.f / C);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if ((i * LANES + lane) * VEC < end)
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          float d = in[i][k] - m, small = d * SMALL;
          squares[0] += d * d;
          squares[1] += small * small;
        }
    row_sums(squares, square_slots);
    bool overflow = squares[0] > 3e38f;
    float square = overflow ? squares[1] : squares[0];  // not squares[overflow], which would be in local memory
    float r = (overflow ? SMALL : 1.f) / sqrtf(square * (1.f / C) + (overflow ? 0.f : eps));
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      Vec<float> w = *(const Vec<float>*)(gains + c), b = *(const Vec<float>*)(gains + C + c);
      float out[VEC];
#pragma unroll
      for (int k = 0; k < VEC; k++) out[k] = (in[i][k] - m) * r * w[k] + b[k];
      *(Vec<REAL>*)(y + start + c) = Vec<REAL>(out);
    }
    if (lane == 0 && row < rows) mean[row] = m, rstd[row] = r;
  }
}

// Resident blocks per multiprocessor; the launcher creates no more blocks than can run concurrently.
constexpr int FORWARD_BLOCKS = C > 6144 ? 1 : sizeof(REAL) == 2 ? 4 : 3;
constexpr int BACKWARD_BLOCKS = C > 6144 || sizeof(REAL) > 2 ? 1 : 2;

// y = w (x - mean) rstd + b. Reads x, writes y: 4 bytes per element in bf16, 8 FLOPs. At N = 65536, C = 768: 0.2 GB,
// 0.4 GFLOP, at least 0.047 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, FORWARD_BLOCKS)
layernorm_forward(REAL* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, const REAL* __restrict__ x,
                  const float* __restrict__ weight, const float* __restrict__ bias, int rows, float eps) {
  forward<false>(nullptr, y, mean, rstd, x, nullptr, weight, bias, rows, eps);
}

// s = x + delta, y = w (s - mean) rstd + b. Reads x and delta, writes s and y: 8 bytes per element in bf16, 9 FLOPs. At
// N = 65536, C = 768: 0.4 GB, 0.45 GFLOP, at least 0.094 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, FORWARD_BLOCKS)
add_layernorm_forward(REAL* __restrict__ s, REAL* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd,
                      const REAL* __restrict__ x, const REAL* __restrict__ delta, const float* __restrict__ weight,
                      const float* __restrict__ bias, int rows, float eps) {
  forward<true>(s, y, mean, rstd, x, delta, weight, bias, rows, eps);
}

// Add the channel sums of the lanes over the row groups of the block, in order, and write them to a row of `partial`.
__device__ __forceinline__ void store_partial(float* partial, float* row, const float (&sum)[PER_LANE][VEC]) {
  int lane = threadIdx.x % LANES;
#pragma unroll 1
  for (int group = 0; group < ROWS; group++) {
    __syncthreads();  // first, the old contents of `row` have been read; later, the previous group has added its sums
    if (threadIdx.x / LANES != group) continue;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c < C)
#pragma unroll
        for (int k = 0; k < VEC; k++) row[c + k] = group ? row[c + k] + sum[i][k] : sum[i][k];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += WARPS * 32) partial[(size_t)blockIdx.x * C + c] = row[c];
}

template <bool ADD>
__device__ __forceinline__ void backward(REAL* dx, float* partial, const REAL* ds, const REAL* dy, const REAL* x,
                                         const float* weight, const float* mean, const float* rstd, int rows) {
  DYN_SMEM(float, gains);  // weight (C elements); reused at the end for a row of sums
  Vec<REAL>* skips = (Vec<REAL>*)(gains + C);  // ds, copied asynchronously, since no registers are left
  __shared__ float slots[2][WARPS][2];
  for (int c = threadIdx.x; c < C; c += WARPS * 32) gains[c] = weight[c];
  __syncthreads();
  int lane = threadIdx.x % LANES, stage = 0;
  float dweight[PER_LANE][VEC] = {}, dbias[PER_LANE][VEC] = {};
  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS, stage ^= 1) {
    int row = first + threadIdx.x / LANES, end = row < rows ? C : 0;  // all threads reach the barriers
    size_t start = (size_t)row * C;
    float m = end ? mean[row] : 0.f, r = end ? rstd[row] : 0.f, sums[2] = {};  // sums of g and of g xhat
    Vec<REAL> in[PER_LANE], at[PER_LANE];  // dy and x: packed, which halves the registers
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      in[i] = *(const Vec<REAL>*)(dy + start + c);
      at[i] = *(const Vec<REAL>*)(x + start + c);
      if (ADD && VEC > 1) cp_async16(skips + i * WARPS * 32 + threadIdx.x, ds + start + c);
    }
    if (ADD) cp_async_commit();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      Vec<float> w = *(const Vec<float>*)(gains + c);
#pragma unroll
      for (int k = 0; k < VEC; k++) {
        float d = in[i][k], xhat = (at[i][k] - m) * r, g = d * w[k];
        dweight[i][k] += d * xhat;
        dbias[i][k] += d;
        sums[0] += g;
        sums[1] += g * xhat;
      }
    }
    row_sums(sums, slots[stage]);
    if (ADD) cp_async_wait<0>();  // no barrier: each lane reads only what it copied
    float g_mean = sums[0] * (1.f / C), gx_mean = sums[1] * (1.f / C);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int c = (i * LANES + lane) * VEC;
      if (c >= end) continue;
      Vec<float> w = *(const Vec<float>*)(gains + c);
      Vec<REAL> skip;
      if (ADD) skip = VEC > 1 ? skips[i * WARPS * 32 + threadIdx.x] : *(const Vec<REAL>*)(ds + start + c);
      float out[VEC];
#pragma unroll
      for (int k = 0; k < VEC; k++) {
        float xhat = (at[i][k] - m) * r;
        out[k] = r * (in[i][k] * w[k] - g_mean - xhat * gx_mean) + (ADD ? skip[k] : 0.f);
      }
      *(Vec<REAL>*)(dx + start + c) = Vec<REAL>(out);
    }
  }
  store_partial(partial, gains, dweight);
  store_partial(partial + (size_t)gridDim.x * C, gains, dbias);
}

// With xhat = (x - mean) rstd and g = dy w: dx = rstd (g - mean(g) - xhat mean(g xhat)). A block writes its sums of
// dy xhat and dy to its rows of partial[0] and partial[1] (2, blocks, C); columns.cu adds them. In bf16, two blocks
// share a multiprocessor.
// Reads dy and x, writes dx: 6 bytes per element in bf16, 16 FLOPs. At N = 65536, C = 768: 0.3 GB, 0.8 GFLOP, at
// least 0.070 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BACKWARD_BLOCKS)
layernorm_backward(REAL* __restrict__ dx, float* __restrict__ partial, const REAL* __restrict__ dy,
                   const REAL* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ mean,
                   const float* __restrict__ rstd, int rows) {
  backward<false>(dx, partial, nullptr, dy, x, weight, mean, rstd, rows);
}

// The same, plus ds, the gradient of the sum: 8 bytes per element in bf16, 17 FLOPs; 0.4 GB, at least 0.094 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BACKWARD_BLOCKS)
add_layernorm_backward(REAL* __restrict__ dx, float* __restrict__ partial, const REAL* __restrict__ ds,
                       const REAL* __restrict__ dy, const REAL* __restrict__ x, const float* __restrict__ weight,
                       const float* __restrict__ mean, const float* __restrict__ rstd, int rows) {
  backward<true>(dx, partial, ds, dy, x, weight, mean, rstd, rows);
}
