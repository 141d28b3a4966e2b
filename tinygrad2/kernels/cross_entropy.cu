#include "common.cuh"
// The loss of the LM head. The logits are overwritten by their gradient.
//
// Compiled with -DVOCAB (the vocabulary size), -DCOLUMNS (the padded number of columns, a multiple of 64, so that every
// row is aligned to 16 bytes), -DTHREADS, and -DRESIDENT=1 if a row fits in shared memory.

using Vec = Pack<REAL>;
constexpr int FULL = VOCAB / Vec::N;  // complete accesses; if VOCAB is not a multiple of N, the next one has padding
constexpr int WARPS = THREADS / 32;
constexpr float LOG2E = 1.44269504089f, LN2 = 0.69314718056f;
constexpr float LOWEST = -3.402823466e38f;  // -FLT_MAX, since -infinity minus -infinity is NaN

struct Logits {
  float v[Vec::N];

  __device__ __forceinline__ explicit Logits(Vec p, bool padded = false) {
#pragma unroll
    for (int k = 0; k < Vec::N; k++) v[k] = padded && k >= VOCAB % Vec::N ? NEG_INF : p[k];
  }
};

// exp(x - largest). Subtract first: multiplying by log2(e) first would round each product, at 10^10 by hundreds.
__device__ __forceinline__ float exp_difference(float x, float largest) { return exp2f((x - largest) * LOG2E); }

// A running sum of exp(x - largest), where largest is the maximum x so far.
struct Softmax {
  float largest = LOWEST, total = 0.f;

  __device__ __forceinline__ void add(const Logits& x) {
    float most = x.v[0];
#pragma unroll
    for (int k = 1; k < Vec::N; k++) most = fmaxf(most, x.v[k]);
    float before = largest;
    largest = fmaxf(largest, most);
    total *= exp_difference(before, largest);
#pragma unroll
    for (int k = 0; k < Vec::N; k++) total += exp_difference(x.v[k], largest);
  }

  __device__ __forceinline__ void add_lanes() {
    float before = largest;
    largest = warp_max(largest);
    total = warp_sum(total * exp_difference(before, largest));
  }
};

// losses[n] = ln(sum_v exp(x_v)) - x_target;  x_v = scale (softmax(x)_v - [v = target]); the padding is set to 0.
//
// One block per row. If RESIDENT, the row is read once, by asynchronous copies, which occupy no registers while in
// flight; each thread reads only what it copied. Two blocks fit on a multiprocessor, so one reads while the other
// computes. Otherwise the row is read twice, the second time from the L2 cache if it is still there. THREADS is at most
// half of a multiprocessor's threads. N = 65536, V = 50304, bf16: 6.6 GB read, 6.6 GB written, 3.1 ms; in parallel, 2
// exponentials per element take 1.9 ms on the special function units.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
cross_entropy(REAL* __restrict__ logits, float* __restrict__ losses, const long long* __restrict__ targets,
              float scale) {
  __shared__ float warp_largest[WARPS], warp_total[WARPS], picked;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  REAL* x = logits + (size_t)blockIdx.x * COLUMNS;
  Vec* row = (Vec*)x;
  Softmax s;
#if RESIDENT
  DYN_SMEM(Vec, kept);
  // While the first half is summed, the second half is still being copied.
  constexpr int HALF = FULL / 2, PACKS = FULL + (VOCAB % Vec::N > 0);
  int i = threadIdx.x;
  for (; i < HALF; i += THREADS) cp_async16(kept + i, row + i);
  cp_async_commit();
  for (; i < PACKS; i += THREADS) cp_async16(kept + i, row + i);
  cp_async_commit();
#else
  Vec* kept = row;
#endif
  int target = (int)targets[blockIdx.x];  // after the copies are issued, since its use waits for the load
  if (threadIdx.x == THREADS - 1) picked = f32(x[target]);
#if RESIDENT
  cp_async_wait<1>();
  for (i = threadIdx.x; i < HALF; i += THREADS) s.add(Logits(kept[i]));
  cp_async_wait<0>();
#else
  int i = threadIdx.x;
#endif
  for (; i < FULL; i += THREADS) s.add(Logits(kept[i]));
  if (VOCAB % Vec::N && i == FULL) s.add(Logits(kept[i], true));

  s.add_lanes();
  if (lane == 0) {
    warp_largest[warp] = s.largest;
    warp_total[warp] = s.total;
  }
  __syncthreads();
  s.largest = lane < WARPS ? warp_largest[lane] : LOWEST;
  s.total = lane < WARPS ? warp_total[lane] : 0.f;
  s.add_lanes();  // every warp computes the same bits
  if (threadIdx.x == 0) losses[blockIdx.x] = log2f(s.total) * LN2 - (picked - s.largest);

  float factor = scale / s.total;
  auto gradient = [&](float x) { return factor * exp_difference(x, s.largest); };
  auto gradients = [&](Logits x) {
#pragma unroll
    for (int k = 0; k < Vec::N; k++) x.v[k] = gradient(x.v[k]);
    return Vec(x.v);
  };
  for (i = threadIdx.x; i < FULL; i += THREADS) row[i] = gradients(Logits(kept[i]));
#pragma unroll 1
  for (; i < COLUMNS / Vec::N; i += THREADS)
    row[i] = VOCAB % Vec::N && i == FULL ? gradients(Logits(kept[i], true)) : Vec{};
  if (target / Vec::N % THREADS == threadIdx.x) x[target] = from_f32<REAL>(gradient(picked) - scale);  // overwrites it
}

// loss = mean of the rows' losses, added in a fixed order by one block of 1024 threads: 0.3 MB, a few microseconds.
extern "C" __global__ void __launch_bounds__(1024)
mean_loss(float* __restrict__ loss, const float* __restrict__ losses, int rows) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < rows; i += 1024) sum += losses[i];
  sum = block_sum<32>(sum);
  if (threadIdx.x == 0) *loss = sum / rows;
}
