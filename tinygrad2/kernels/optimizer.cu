#include "common.cuh"

// Load elements i ... i + 3 of n, in one access if the array is aligned and contains all four. Elements past the end
// are 0. The loops below read the elements in the same order whether or not the array is aligned.
__device__ __forceinline__ Pack<float> load4(const float* p, long long i, long long n, bool aligned) {
  if (aligned && i + 4 <= n) return *(const Pack<float>*)(p + i);
  Pack<float> r;
#pragma unroll
  for (int j = 0; j < 4; j++) r.v[j] = i + j < n ? p[i + j] : 0.0f;
  return r;
}

__device__ __forceinline__ void store4(float* p, long long i, long long n, bool aligned, const Pack<float>& r) {
  if (aligned && i + 4 <= n) {
    *(Pack<float>*)(p + i) = r;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (i + j < n) p[i + j] = r.v[j];
}

__device__ __forceinline__ bool aligned(const void* p) { return (unsigned long long)p % 16 == 0; }

// partial[u][block] = sum of (x_i unit[u])^2 over the block's share of x: every gridDim-th chunk of 4096 elements.
// One of the three sums neither overflows nor underflows (see squared_norm and norm in reference.py).
// Each of a thread's four sums covers every fourth element that the thread reads. The number of blocks depends only on
// n, so the sum is the same on every device.
// Reads 4 bytes per element: 124M elements are 0.50 GB, 1 GFLOP; at least 0.12 ms.
constexpr int UNITS = 3;
extern "C" __global__ void __launch_bounds__(256)
square_partials(const float* x, float* partial, long long n) {
  const bool whole = aligned(x);
  const float unit[UNITS] = {1.0f, 5.421010862427522e-20f, 18446744073709551616.0f};  // 1, 2^-64, 2^64
  float sum[UNITS][4] = {};
  for (long long first = (long long)blockIdx.x * 4096; first < n; first += (long long)gridDim.x * 4096) {
    Pack<float> r[4];  // four loads in flight
#pragma unroll
    for (int k = 0; k < 4; k++) r[k] = load4(x, first + k * 1024 + threadIdx.x * 4, n, whole);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
          const float x = r[k].v[j] * unit[u];
          sum[u][j] += x * x;
        }
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const float total = block_sum<8>((sum[u][0] + sum[u][1]) + (sum[u][2] + sum[u][3]));
    if (threadIdx.x == 0) partial[u * gridDim.x + blockIdx.x] = total;
    __syncthreads();  // the next iteration reuses block_sum's shared memory
  }
}

// total[u] = sum of the partial sums of unit u; one block per unit. Reads a few KB: the launch takes most of the time.
extern "C" __global__ void __launch_bounds__(256) sum_partials(const float* partial, float* total, int count) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += 256) sum += partial[blockIdx.x * count + i];
  sum = block_sum<8>(sum);
  if (threadIdx.x == 0) total[blockIdx.x] = sum;
}

// One step of AdamW, four elements per thread:
//   g = grad * scale;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
//   value = value (1 - lr decay) - lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps).
// Values that change from step to step are read from device memory. 1 - b^step is computed as -expm1(step ln b), since
// a subtraction from 1 would lose precision; for the same reason, 1 - b is passed (as `rest`) instead of b. If scale is
// NaN, nothing changes: this is how the optimizer skips a step whose gradients are not finite.
// Reads 16 bytes per element and writes 12: 124M elements are 3.5 GB, 1.9 GFLOP; at least 0.81 ms.
extern "C" __global__ void __launch_bounds__(256)
adamw(float* value, const float* grad, float* m, float* v, const float* grad_scale, const float* lr, const float* step,
      float rest1, float rest2, float log_beta1, float log_beta2, float eps, float weight_decay, long long n) {
  const long long i = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
  const float scale = *grad_scale, shrink = 1.0f - *lr * weight_decay;
  if (i >= n || isnan(scale)) return;
  const bool whole = aligned(value) && aligned(grad) && aligned(m) && aligned(v);
  Pack<float> p = load4(value, i, n, whole), g = load4(grad, i, n, whole);
  Pack<float> first = load4(m, i, n, whole), second = load4(v, i, n, whole);
  const float rate = *lr / -expm1f(*step * log_beta1), root = rsqrtf(-expm1f(*step * log_beta2));
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float gj = g.v[j] * scale;
    first.v[j] = first.v[j] * (1.0f - rest1) + rest1 * gj;
    second.v[j] = second.v[j] * (1.0f - rest2) + rest2 * gj * gj;
    p.v[j] = p.v[j] * shrink - rate * first.v[j] / (sqrtf(second.v[j]) * root + eps);
  }
  store4(value, i, n, whole, p);
  store4(m, i, n, whole, first);
  store4(v, i, n, whole, second);
}
