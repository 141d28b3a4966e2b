#include "common.cuh"

// y = x times 0 or `scale`, eight elements per thread. Element e = first + i of the global batch uses word e % 4 of
// philox(e / 4), and is kept if the word is at least `threshold` = rate * 2^32, which may be 2^32. If `first` is not a
// multiple of 4, eight elements span three groups of four words; `offset` is first % 4.
// The same kernel serves the forward and the backward pass. It reads x and writes y once: for 64 x 1024 x 768 elements
// in bfloat16, 0.2 GB and 12.6M philox calls of about 60 instructions each; at least 0.047 ms.
extern "C" __global__ void __launch_bounds__(256)
dropout(const REAL* x, REAL* y, unsigned long long first, long long n, PhiloxKey key, unsigned long long threshold,
        float scale) {
  const long long i = ((long long)blockIdx.x * 256 + threadIdx.x) * 8;
  if (i >= n) return;
  constexpr int N = Pack<REAL>::N;
  const bool whole = i + 8 <= n && (unsigned long long)x % 16 == 0;
  Pack<REAL> in[8 / N];  // the loads are in flight while the random bits are computed
  if (whole)
#pragma unroll
    for (int k = 0; k < 8 / N; k++) in[k] = *(const Pack<REAL>*)(x + i + k * N);
  const unsigned long long group = (first + i) / 4;
  const unsigned offset = first % 4;
  const uint4 a = philox(key, group), b = philox(key, group + 1);
  unsigned word[12] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (offset) {
    const uint4 c = philox(key, group + 2);
    word[8] = c.x, word[9] = c.y, word[10] = c.z, word[11] = c.w;
    for (unsigned k = 0; k < offset; k++)  // (with a variable index, the compiler would put the words in local memory)
#pragma unroll
      for (int j = 0; j < 11; j++) word[j] = word[j + 1];
  }
  auto factor = [&](int j) { return word[j] >= threshold ? scale : 0.0f; };
  if (whole) {
#pragma unroll
    for (int k = 0; k < 8 / N; k++) {
      float out[N];
#pragma unroll
      for (int j = 0; j < N; j++) out[j] = in[k][j] * factor(k * N + j);
      *(Pack<REAL>*)(y + i + k * N) = Pack<REAL>(out);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (i + j < n) y[i + j] = from_f32<REAL>(f32(x[i + j]) * factor(j));
}
