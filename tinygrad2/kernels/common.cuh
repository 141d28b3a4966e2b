// Shared by all kernels; kernels/cuda.py inlines it into each source. REAL is the type of the activations, bf16 or
// float. The first functions are PTX; tests/stand_ins/cudasim/cudasim.h provides C++ equivalents, so that the same
// sources run on a CPU.
#ifndef CUDASIM
#include <cuda_bf16.h>
#define DYN_SMEM(T, name)                                       \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  T* name = (T*)name##_raw
__device__ __forceinline__ unsigned smem_addr(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void backoff() {}  // used in spin loops; not needed on a GPU
#if __CUDA_ARCH__ >= 900
// Map an address to the shared memory of another block in a thread block cluster of SIZE blocks. (Without volatile, the
// compiler may execute the instruction in all lanes even if only some need it, with ranks out of range.)
template <int SIZE, class T>
__device__ __forceinline__ T* in_block(T* place, unsigned rank) {
  T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return there;
}
template <int SIZE>
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif
#if __CUDA_ARCH__ >= 800
// Load four 8 x 8 matrices of 16-bit elements from shared memory. Lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_addr(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_addr(row))
               : "memory");
}
// d (16 x 8, f32) += a (16 x 16, bf16, row-major) b (16 x 8, bf16, column-major), on tensor cores.
__device__ __forceinline__ void mma_bf16_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Start copying 16 bytes from global to shared memory: the first `read` bytes (16 or 0) from s, zeros for the rest.
__device__ __forceinline__ void cp_async16(void* d, const void* s, unsigned read = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(d)), "l"(s), "r"(read) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Round two numbers to bfloat16 and pack them, the first in the lower half.
__device__ __forceinline__ unsigned bf16_pair(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#else  // older GPUs lack these instructions; they compute in float32
__device__ __forceinline__ void cp_async16(void* d, const void* s, unsigned read = 16) {
  *(uint4*)d = read ? *(const uint4*)s : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ void cp_async_commit() {}
template <int N>
__device__ __forceinline__ void cp_async_wait() {}
__device__ __forceinline__ unsigned bf16_pair(float first, float second) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(first)) | __bfloat16_as_ushort(__float2bfloat16_rn(second)) << 16;
}
#endif
#endif

typedef __nv_bfloat16 bf16;
#ifndef REAL
#define REAL bf16
#endif
#define NEG_INF __uint_as_float(0xff800000u)  // NVRTC does not define INFINITY

__device__ __forceinline__ float f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float f32(float x) { return x; }
template <class T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float from_f32<float>(float x) {
  return x;
}

// COUNT elements that are read and written in one access of up to 16 bytes, or in several accesses of 16 bytes.
// bfloat16 elements stay packed, two per register, until they are used; the compiler would use a register for each.
template <class T, int COUNT = 16 / sizeof(T), bool PAIRS = sizeof(T) == 2 && COUNT % 2 == 0>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {
  static constexpr int N = COUNT;
  T v[N];

  Pack() = default;
  __device__ __forceinline__ explicit Pack(const float (&x)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = from_f32<T>(x[k]);
  }
  __device__ __forceinline__ float operator[](int k) const { return f32(v[k]); }
};
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack<T, COUNT, true> {
  static constexpr int N = COUNT;
  unsigned pairs[N / 2];

  Pack() = default;
  __device__ __forceinline__ explicit Pack(const float (&x)[N]) {
#pragma unroll
    for (int j = 0; j < N / 2; j++) pairs[j] = bf16_pair(x[2 * j], x[2 * j + 1]);
  }
  __device__ __forceinline__ float operator[](int k) const {
    return __uint_as_float(k % 2 ? pairs[k / 2] & 0xffff0000u : pairs[k / 2] << 16);
  }
};

// The sum over a warp, bitwise the same in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// The sum over a block of WARPS warps, valid in the first warp. The block must synchronize before the next call.
template <int WARPS>
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float sums[WARPS];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  return threadIdx.x < 32 ? warp_sum(threadIdx.x < WARPS ? sums[threadIdx.x] : 0.f) : 0.f;
}

// Philox4x32-10, with the same bits as tinygrad2/random.py: the four words of elements 4 group ... 4 group + 3.
struct PhiloxKey {
  unsigned seed_low, seed_high, site, step;
};
__device__ __forceinline__ uint4 philox(const PhiloxKey& key, unsigned long long group) {
  unsigned c0 = (unsigned)group, c1 = (unsigned)(group >> 32), c2 = key.site, c3 = key.step;
  unsigned k0 = key.seed_low, k1 = key.seed_high;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = (unsigned)(p1 >> 32) ^ c1 ^ k0;
    c1 = (unsigned)p1;
    c2 = (unsigned)(p0 >> 32) ^ c3 ^ k1;
    c3 = (unsigned)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}
