#include "common.cuh"
#include "columns.cuh"
#include "gelu.cuh"
// GELU of u = x + bias, in the tanh form and the exact form. BIAS is the type of the bias. If it is not defined, there
// is no bias, and the pointer is not read.
#ifdef BIAS
__device__ __forceinline__ float bias_of(const BIAS* bias, int c) { return f32(bias[c]); }
#else
typedef REAL BIAS;
__device__ __forceinline__ float bias_of(const BIAS*, int) { return 0.f; }
#endif

template <class Form>
__device__ __forceinline__ void forward(REAL* y, const REAL* x, const BIAS* bias, int rows) {
  int c = first_column();
  if (c >= C) return;
  float b[VEC];
#pragma unroll
  for (int k = 0; k < VEC; k++) b[k] = bias_of(bias, c + k);
  int step = row_step();
  for (int row = first_row(); row < rows; row += AHEAD * step) {
    Vec<REAL> in[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (row + i * step < rows) in[i] = *(const Vec<REAL>*)(x + (size_t)(row + i * step) * C + c);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (row + i * step >= rows) break;
      float out[VEC];
#pragma unroll
      for (int k = 0; k < VEC; k++) out[k] = Form::value(in[i][k] + b[k]);
      *(Vec<REAL>*)(y + (size_t)(row + i * step) * C + c) = Vec<REAL>(out);
    }
  }
}

template <class Form>
__device__ __forceinline__ void backward(REAL* dx, float* partial, const REAL* dy, const REAL* x, const BIAS* bias,
                                         int rows) {
  int c = first_column();
  float b[VEC], sum[VEC] = {};
  if (c < C) {
#pragma unroll
    for (int k = 0; k < VEC; k++) b[k] = bias_of(bias, c + k);
    constexpr int ROWS = AHEAD / 2;  // since there are two arrays
    for (int row = first_row(), step = row_step(); row < rows; row += ROWS * step) {
      Vec<REAL> d[ROWS], in[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        if (row + i * step >= rows) break;
        size_t at = (size_t)(row + i * step) * C + c;
        d[i] = *(const Vec<REAL>*)(dy + at), in[i] = *(const Vec<REAL>*)(x + at);
      }
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        if (row + i * step >= rows) break;
        float out[VEC];
#pragma unroll
        for (int k = 0; k < VEC; k++) {
          out[k] = d[i][k] * Form::slope(in[i][k] + b[k]);
          sum[k] += out[k];
        }
        *(Vec<REAL>*)(dx + (size_t)(row + i * step) * C + c) = Vec<REAL>(out);
      }
    }
  }
  store_partial(partial, sum);
}

// y = u / (1 + exp(-2 sqrt(2 / pi) (u + 0.044715 u^3))). Reads x, writes y: 4 bytes per element in bf16, 10 FLOPs. At
// N = 65536, C = 3072: 0.8 GB, 2 GFLOP, at least 0.19 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
gelu_forward(REAL* __restrict__ y, const REAL* __restrict__ x, const BIAS* __restrict__ bias, int rows) {
  forward<Tanh>(y, x, bias, rows);
}

// dx = dy (s + 2 u s (1 - s) sqrt(2 / pi) (1 + 3 * 0.044715 u^2)), where s is the logistic function above. The column
// sums of dx are written to partial (gridDim.y, C). Reads dy and x, writes dx: 6 bytes per element in bf16, 20 FLOPs.
// At N = 65536, C = 3072: 1.2 GB, 4 GFLOP, at least 0.28 ms.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
gelu_backward(REAL* __restrict__ dx, float* __restrict__ partial, const REAL* __restrict__ dy,
              const REAL* __restrict__ x, const BIAS* __restrict__ bias, int rows) {
  backward<Tanh>(dx, partial, dy, x, bias, rows);
}

// y = u (1 + erf(u / sqrt(2))) / 2. Bytes and minimum time as for gelu_forward, about 30 FLOPs per element.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
gelu_exact_forward(REAL* __restrict__ y, const REAL* __restrict__ x, const BIAS* __restrict__ bias, int rows) {
  forward<Exact>(y, x, bias, rows);
}

// dx = dy (Phi(u) + u exp(-u^2 / 2) / sqrt(2 pi)). Bytes and minimum time as for gelu_backward, about 40 FLOPs per
// element.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
gelu_exact_backward(REAL* __restrict__ dx, float* __restrict__ partial, const REAL* __restrict__ dy,
                    const REAL* __restrict__ x, const BIAS* __restrict__ bias, int rows) {
  backward<Exact>(dx, partial, dy, x, bias, rows);
}
