#include "common.cuh"
// The loss of a language model's head, and its gradient in place of the logits.
//
// Compile with -DVOCAB (the columns that count), -DCOLUMNS (those there are: a multiple of 64, so that every row begins
// at 16 bytes), -DTHREADS, and -DRESIDENT=1 where a row fits shared memory.

using Vec = Pack<REAL>;
constexpr int PACKS = (VOCAB + Vec::N - 1) / Vec::N;  // the last one may hold padding
constexpr int WARPS = THREADS / 32;
constexpr float LOG2E = 1.44269504089f, LN2 = 0.69314718056f;
constexpr float LOWEST = -3e38f;  // in place of -infinity, whose difference from itself is NaN

__device__ __forceinline__ Vec without_padding(Vec p, int i) {
  if (VOCAB % Vec::N && i == PACKS - 1)
#pragma unroll
    for (int k = VOCAB % Vec::N; k < Vec::N; k++) p.v[k] = from_f32<REAL>(NEG_INF);
  return p;
}

// The sum of 2^(log2(e) x - largest), largest the greatest log2(e) x so far.
struct Softmax {
  float largest = LOWEST, total = 0.f;

  __device__ __forceinline__ void add(const Vec& p) {
    float most = f32(p.v[0]);
#pragma unroll
    for (int k = 1; k < Vec::N; k++) most = fmaxf(most, f32(p.v[k]));
    float before = largest;
    largest = fmaxf(largest, most * LOG2E);
    total *= exp2f(before - largest);
#pragma unroll
    for (int k = 0; k < Vec::N; k++) total += exp2f(fmaf(f32(p.v[k]), LOG2E, -largest));
  }

  __device__ __forceinline__ void add_lanes() {
    float before = largest;
    largest = warp_max(largest);
    total = warp_sum(total * exp2f(before - largest));
  }
};

// losses[n] = ln(sum_v exp(x_v)) - x_target;  x_v = scale (softmax(x)_v - [v = target]), the padding becomes 0.
//
// One block a row. Resident: the row is read once, by asynchronous copies, which leave all of it in flight without a
// register; each thread reads nothing but what it copied. Two blocks fit a multiprocessor, so that one reads while the
// other computes. Otherwise (float32 at GPT-2's vocabulary) the row is read again, from the L2 cache at best.
// N = 65536, V = 50304, bf16: 6.6 GB read, 6.6 GB written, 3.1 ms; 2 exponentials an element, 1.9 ms of the special
// function units, beside it.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
cross_entropy(REAL* __restrict__ logits, float* __restrict__ losses, const long long* __restrict__ targets,
              float scale) {
  __shared__ float warp_largest[WARPS], warp_total[WARPS];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, target = (int)targets[blockIdx.x];
  REAL* x = logits + (size_t)blockIdx.x * COLUMNS;
  Vec* row = (Vec*)x;
  float picked = f32(x[target]);  // before any thread writes
  Softmax s;
#if RESIDENT
  DYN_SMEM(Vec, kept);
  constexpr int HALF = PACKS / 2;  // added while the other is on its way
  int i = threadIdx.x;
  for (; i < HALF; i += THREADS) cp_async16(kept + i, row + i);
  cp_async_commit();
  for (; i < PACKS; i += THREADS) cp_async16(kept + i, row + i);
  cp_async_commit();
  cp_async_wait<1>();
  for (i = threadIdx.x; i < HALF; i += THREADS) s.add(without_padding(kept[i], i));
  cp_async_wait<0>();
  for (; i < PACKS; i += THREADS) s.add(without_padding(kept[i], i));
#else
  Vec* kept = row;
#pragma unroll 4
  for (int i = threadIdx.x; i < PACKS; i += THREADS) s.add(without_padding(kept[i], i));
#endif

  s.add_lanes();
  if (lane == 0) {
    warp_largest[warp] = s.largest;
    warp_total[warp] = s.total;
  }
  __syncthreads();
  s.largest = lane < WARPS ? warp_largest[lane] : LOWEST;
  s.total = lane < WARPS ? warp_total[lane] : 0.f;
  s.add_lanes();  // every warp for itself: the same bits in all
  if (threadIdx.x == 0) losses[blockIdx.x] = (log2f(s.total) + s.largest) * LN2 - picked;

  float factor = scale / s.total;
#pragma unroll 2
  for (int i = threadIdx.x; i < COLUMNS / Vec::N; i += THREADS) {
    Vec g = {};
    if (i < PACKS) {
      Vec p = without_padding(kept[i], i);
#pragma unroll
      for (int k = 0; k < Vec::N; k++) {
        float d = factor * exp2f(fmaf(f32(p.v[k]), LOG2E, -s.largest));
        g.v[k] = from_f32<REAL>(i * Vec::N + k == target ? d - scale : d);
      }
    }
    row[i] = g;
  }
}

// loss = the mean of the rows' losses, added in a fixed order by one block of 1024 threads: 0.3 MB, a few microseconds.
extern "C" __global__ void __launch_bounds__(1024)
mean_loss(float* __restrict__ loss, const float* __restrict__ losses, int rows) {
  __shared__ float warps[32];
  float sum = 0.f;
  for (int i = threadIdx.x; i < rows; i += 1024) sum += losses[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(warps[threadIdx.x]);
  if (threadIdx.x == 0) *loss = sum / rows;
}
