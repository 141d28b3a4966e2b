#include "common.cuh"
// Attention of new tokens to earlier tokens, for generation. qkv (B, T, 3, H, D), for positions from `length` on;
// cache (2, B, H, capacity, D); out (B, T, H, D). All are REAL, with any head size D.
constexpr int VEC = D % Pack<REAL>::N ? 1 : Pack<REAL>::N;  // elements per access
constexpr int VECS = D / VEC;                              // accesses per row of the cache
constexpr int group_size() {                               // lanes per key: the smallest power of two that covers its row
  int lanes = 1;
  while (lanes < VECS && lanes < 32) lanes *= 2;
  return lanes;
}
constexpr int GROUP = group_size(), PART = (VECS + GROUP - 1) / GROUP;  // PART: accesses per lane and row
constexpr int AT_ONCE = 32 / GROUP, AHEAD = 4, WARPS = 8;  // keys per read of a warp; reads in flight; warps per block

struct Row {
  float v[PART][VEC];
};
// Read this lane's part of a row, with zeros past the end. Access i is contiguous across the lanes of a group.
__device__ __forceinline__ void read(Row& row, const REAL* from, int member) {
#pragma unroll
  for (int i = 0; i < PART; i++) {
    int at = i * GROUP + member;
    Pack<REAL, VEC> pack = {};
    if (from && at < VECS) pack = *(const Pack<REAL, VEC>*)(from + at * VEC);
#pragma unroll
    for (int e = 0; e < VEC; e++) row.v[i][e] = pack[e];
  }
}

// out = softmax(q k^T / sqrt(D)) v over the keys up to the token's own. Its key and value are added to the cache.
//
// A block processes one token of one head. The keys are divided among its warps. In a warp, a group of lanes processes
// one key at a time, with AHEAD keys in flight, and a running maximum and sum in f32 (arXiv:2205.14135). At the end,
// the results of the groups and then of the warps are added in a fixed order. The keys and values of new tokens are
// read from qkv, so no block waits for another.
//
// For T = 1, the kernel reads the cache once: for the 124M model with 1024 keys, 3.1 MB per layer and sequence, 0.7 us
// at 4.3 TB/s; 2 FLOPs per byte. For T > 1, it reads the cache T times (from L2): correct, but not fast.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
attention_cached(REAL* __restrict__ out, REAL* __restrict__ cache, const REAL* __restrict__ qkv, int T, int H,
                 int length, int capacity, float scale) {
  __shared__ float warp_largest[WARPS], warp_total[WARPS], warp_sum_of[WARPS][D];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / GROUP, member = lane % GROUP;
  int b = blockIdx.x / H, h = blockIdx.x % H, t = blockIdx.y, seen = length + t + 1;
  size_t width = (size_t)H * D, in_cache = (size_t)gridDim.x * capacity * D;
  const REAL *Q = qkv + (size_t)b * T * 3 * width + h * D, *new_k = Q + width, *new_v = new_k + width;
  REAL *old_k = cache + (size_t)blockIdx.x * capacity * D, *old_v = old_k + in_cache;

  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    old_k[(size_t)(seen - 1) * D + d] = new_k[3 * width * t + d];
    old_v[(size_t)(seen - 1) * D + d] = new_v[3 * width * t + d];
  }

  Row q, sum = {};
  read(q, Q + 3 * width * t, member);
  float largest = NEG_INF, total = 0.f;
  for (int start = warp * AT_ONCE * AHEAD; start < seen; start += WARPS * AT_ONCE * AHEAD) {
    Row k[AHEAD], v[AHEAD];
    float s[AHEAD], found = largest;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      int i = start + a * AT_ONCE + group;
      size_t at = i < length ? (size_t)i * D : 3 * width * (i - length);
      read(k[a], i < seen ? (i < length ? old_k : new_k) + at : nullptr, member);
      read(v[a], i < seen ? (i < length ? old_v : new_v) + at : nullptr, member);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      s[a] = 0.f;
#pragma unroll
      for (int i = 0; i < PART; i++)
#pragma unroll
        for (int e = 0; e < VEC; e++) s[a] += q.v[i][e] * k[a].v[i][e];
#pragma unroll
      for (int o = GROUP / 2; o; o /= 2) s[a] += __shfl_xor_sync(0xffffffffu, s[a], o);
      if (start + a * AT_ONCE + group >= seen) s[a] = NEG_INF;
      found = fmaxf(found, s[a]);
    }
    float base = found == NEG_INF ? 0.f : found, shrink = exp2f((largest - base) * scale);  // (no key so far)
    largest = found;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < PART; i++)
#pragma unroll
      for (int e = 0; e < VEC; e++) sum.v[i][e] *= shrink;
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      float p = exp2f((s[a] - base) * scale);  // subtract first, so that only the difference is rounded
      total += p;
#pragma unroll
      for (int i = 0; i < PART; i++)
#pragma unroll
        for (int e = 0; e < VEC; e++) sum.v[i][e] += p * v[a].v[i][e];
    }
  }

  float common = largest;  // maximum of the warp, to which all groups are rescaled before they are added
#pragma unroll
  for (int o = GROUP; o < 32; o *= 2) common = fmaxf(common, __shfl_xor_sync(0xffffffffu, common, o));
  float factor = largest == NEG_INF ? 0.f : exp2f((largest - common) * scale);
  total *= factor;
#pragma unroll
  for (int o = GROUP; o < 32; o *= 2) total += __shfl_xor_sync(0xffffffffu, total, o);
#pragma unroll
  for (int i = 0; i < PART; i++)
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      float x = sum.v[i][e] * factor;
#pragma unroll
      for (int o = GROUP; o < 32; o *= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
      int at = i * GROUP + member;
      if (group == 0 && at < VECS) warp_sum_of[warp][at * VEC + e] = x;
    }
  if (lane == 0) warp_largest[warp] = common, warp_total[warp] = total;
  __syncthreads();

  common = NEG_INF, total = 0.f;
  for (int w = 0; w < WARPS; w++) common = fmaxf(common, warp_largest[w]);
  for (int w = 0; w < WARPS; w++) {
    float weight = warp_largest[w] == NEG_INF ? 0.f : exp2f((warp_largest[w] - common) * scale);
    total += warp_total[w] * weight;
  }
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    float x = 0.f;
    for (int w = 0; w < WARPS; w++)
      x += warp_sum_of[w][d] * (warp_largest[w] == NEG_INF ? 0.f : exp2f((warp_largest[w] - common) * scale));
    out[((size_t)b * T + t) * width + h * D + d] = from_f32<REAL>(x / total);
  }
}

// Copy the keys and values of a prompt to the cache, from position `length` on; attention_forward computes the output.
// One block per token. 8 bytes per element in bf16; 124M model, 1024 tokens, one layer: 6.3 MB, 1.5 us.
extern "C" __global__ void __launch_bounds__(256)
fill_cache(REAL* __restrict__ cache, const REAL* __restrict__ qkv, int B, int T, int H, int length, int capacity) {
  using Part = Pack<REAL, VEC>;
  int b = blockIdx.x / T, t = blockIdx.x % T, row = H * VECS;
  for (int i = threadIdx.x; i < 2 * row; i += blockDim.x) {  // keys, then values, in the order of qkv
    size_t to = (((size_t)(i / row) * B + b) * H + i % row / VECS) * capacity + length + t;
    ((Part*)cache)[to * VECS + i % VECS] = ((const Part*)qkv)[(size_t)blockIdx.x * 3 * row + row + i];
  }
}
