#include "common.cuh"
#include "attention.cuh"
// Backward pass of causal flash attention on tensor cores. Inputs and outputs are bf16; intermediate results are f32.
// With S = Q K^T, P = exp(scale S - lse), scale = 1 / sqrt(D), the dropout factors M, and delta = rowsum(dO O):
//
//   dV = (P M)^T dO;   dP = (dO V^T) M;   dS = P (dP - delta);   dQ = scale dS K;   dK = scale dS^T Q.
//
// lse is rounded to f32, and its rounding error propagates to P. For scores up to 2^15, the error is smaller than that
// of bf16 (tests/tinygrad2/test_numerics.py). It grows in proportion to the scores; from 2^24 on, P is wrong.
//
// qkv and dqkv are (B, T, 3, H, D), as the matrix products write and read them; out and dout are (B, T, H, D); lse and
// delta are (B, H, T), f32. dQ is a sum over keys, dK and dV are sums over queries. There is one kernel for each case,
// so that every sum stays in the registers of one warp and has a fixed order. S and dP are therefore computed twice (7
// products instead of 5), but no atomics are needed.
//
// A block of 4 warps owns OWNED queries (or keys) and iterates over the keys (or queries) in tiles of STREAM rows. The
// next tile is copied while the current one is used. A warp processes CHUNK rows of a tile at a time, and skips chunks
// that are entirely above the diagonal.
//
// The backward pass of one layer of the 124M model, B = 64, T = 1024; X = 101 MB, a bf16 (B, T, C) array. Lower bounds
// on an H200, at 4.3 TB/s and 790 TFLOP/s (mma.sync reaches about 600, at 6 to 7 cycles per 16 x 8 x 16 mma):
//   attention_delta        2 X read, 0.2 GB                                                            0.05 ms
//   attention_backward_kv  4 products, 0.21 TFLOP below the diagonal; 4 X read, 2 X written, 0.6 GB    0.26 ms
//   attention_backward_q   3 products, 0.15 TFLOP; 4 X read, X written, 0.5 GB                         0.20 ms
// attention_backward_kv is limited by shared-memory bandwidth: a warp that owns 16 keys reads 16 elements of the stream
// for every 2 mmas, so reading takes a third longer than multiplying.
#ifndef DROPOUT
#define DROPOUT 0
#endif
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int M = OWNED / (16 * WARPS);  // tiles of 16 rows that a warp owns; they share each read of the stream
constexpr float LOG2E = 1.44269504089f;
static_assert(OWNED % (16 * WARPS) == 0 && STREAM % CHUNK == 0 && CHUNK % 16 == 0 && STREAM <= 64, "tiles");

// The rows of one warp as left factors. They are kept in registers if they fit, and otherwise reread from their tile.
template <bool HELD>
struct Own {
  const bf16* tile;
  int row;
  unsigned held[HELD ? D / 16 : 1][M][4];

  __device__ __forceinline__ Own(const bf16* tile, int row) : tile(tile), row(row) {}
  __device__ __forceinline__ void hold() {
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int m = 0; m < M; m++) left_factor(held[k][m], tile, row + m * 16, k * 16);
    }
  }
  // acc (16 M x CHUNK) = these rows times the transpose of rows first ... first + CHUNK - 1 of another tile.
  __device__ __forceinline__ void times_transposed(float (&acc)[M][CHUNK / 8][4], const bf16* other, int first) const {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[m][n][e] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      unsigned a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        if constexpr (HELD) {
#pragma unroll
          for (int i = 0; i < 4; i++) a[m][i] = held[k][m][i];
        } else {
          left_factor(a[m], tile, row + m * 16, k * 16);
        }
      }
#pragma unroll
      for (int n = 0; n < CHUNK / 16; n++) {
        unsigned b[4];
        right_factor_of_transposed(b, other, first + n * 16, k * 16);
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_bf16_16816(acc[m][2 * n], a[m], b[0], b[1]);
          mma_bf16_16816(acc[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// sum (16 M x D) += x (16 M x CHUNK, rounded to bf16) times rows first ... first + CHUNK - 1 of a tile.
__device__ __forceinline__ void add_product(float (&sum)[M][D / 8][4], const float (&x)[M][CHUNK / 8][4],
                                            const bf16* tile, int first) {
#pragma unroll
  for (int k = 0; k < CHUNK / 16; k++) {
    unsigned a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float(&part)[4] = x[m][2 * k + i / 2];
        a[m][i] = bf16_pair(part[i % 2 * 2], part[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      unsigned b[4];
      right_factor(b, tile, first + k * 16, n * 16);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_bf16_16816(sum[m][2 * n], a[m], b[0], b[1]);
        mma_bf16_16816(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// delta = rowsum(dO O), with 8 lanes per row.
extern "C" __global__ void __launch_bounds__(256)
attention_delta(float* __restrict__ delta, const bf16* __restrict__ dout, const bf16* __restrict__ out, int T, int H,
                int rows) {
  int row = blockIdx.x * 32 + threadIdx.x / 8;
  float sum = 0.f;
  if (row < rows) {
#pragma unroll
    for (int col = threadIdx.x % 8 * 8; col < D; col += 64) {
      Pack<bf16> a = *(const Pack<bf16>*)(dout + (size_t)row * D + col);
      Pack<bf16> b = *(const Pack<bf16>*)(out + (size_t)row * D + col);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
  }
#pragma unroll
  for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (row < rows && threadIdx.x % 8 == 0) {
    int bt = row / H, h = row % H;
    delta[((size_t)(bt / T) * H + h) * T + bt % T] = sum;
  }
}

// dK and dV of OWNED keys. The rows of the score matrix are keys, so that P^T and dS^T are in registers in the layout
// of a left factor of an mma.
constexpr int BLOCKS_AT_ONCE = D <= 64 && M == 1 && !DROPOUT ? 3 : 2;  // per multiprocessor, limited by the registers
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
attention_backward_kv(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                      const float* __restrict__ lse, const float* __restrict__ delta, int T, int H, float scale,
                      PhiloxKey key, unsigned long long first_sample, unsigned threshold, float keep_scale) {
  DYN_SMEM(bf16, smem);
  bf16 *tile_k = smem, *tile_v = tile_k + OWNED * LD, *tiles_q = tile_v + OWNED * LD, *tiles_do = tiles_q + 2 * STREAM * LD;
  float* statistics = (float*)(tiles_do + 2 * STREAM * LD);  // per tile: STREAM values of lse (base 2), then of delta
  int lane = threadIdx.x % 32, own_row = warp_index() * 16 * M;
  int blocks = (T + OWNED - 1) / OWNED, head, block;
  place(blocks, T, head, block);
  int first_key = block * OWNED, stride = 3 * H * D, out_stride = H * D;
  size_t base = (size_t)(head / H) * T * stride + head % H * D, first_row = (size_t)head * T;
  const bf16 *q = qkv + base, *k = q + H * D, *v = k + H * D;
  const bf16* d_out = dout + (size_t)(head / H) * T * out_stride + head % H * D;
  const float* mine = (threadIdx.x < STREAM ? lse : delta) + first_row;  // each thread loads one value per tile
  auto statistic = [&](int tile) {
    int row = tile * STREAM + threadIdx.x % STREAM;
    return row < T ? mine[row] * (threadIdx.x < STREAM ? LOG2E : 1.f) : 0.f;
  };

  int begin = first_key / STREAM, end = (T + STREAM - 1) / STREAM;
  load_tile<OWNED, THREADS>(tile_k, k, first_key, T, stride);
  load_tile<OWNED, THREADS>(tile_v, v, first_key, T, stride);
  load_tile<STREAM, THREADS>(tiles_q, q, begin * STREAM, T, stride);
  load_tile<STREAM, THREADS>(tiles_do, d_out, begin * STREAM, T, out_stride);
  cp_async_commit();
  if (threadIdx.x < 2 * STREAM) statistics[threadIdx.x] = statistic(begin);

  constexpr bool HELD = 2 * M * D / 4 <= 48;
  constexpr int CHUNKS_AT_ONCE = DROPOUT ? 1 : STREAM / CHUNK;  // unrolling reduces the number of registers
  Own<HELD> own_k(tile_k, own_row), own_v(tile_v, own_row);
  int warp_key = first_key + own_row;
  float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
  for (int j = begin; j < end; j++) {
    int stage = (j - begin) % 2;
    float next = 0.f;
    cp_async_wait<0>();
    __syncthreads();  // all threads have received this tile, and have finished the tile that the next copy overwrites
    if (j + 1 < end) {
      load_tile<STREAM, THREADS>(tiles_q + (stage ^ 1) * STREAM * LD, q, (j + 1) * STREAM, T, stride);
      load_tile<STREAM, THREADS>(tiles_do + (stage ^ 1) * STREAM * LD, d_out, (j + 1) * STREAM, T, out_stride);
      cp_async_commit();
      next = statistic(j + 1);
    }
    if (j == begin) {
      own_k.hold();
      own_v.hold();
    }
    const bf16 *tile_q = tiles_q + stage * STREAM * LD, *tile_do = tiles_do + stage * STREAM * LD;
#pragma unroll CHUNKS_AT_ONCE
    for (int chunk = 0; chunk < STREAM; chunk += CHUNK) {
      int first_query = j * STREAM + chunk;
      if (first_query + CHUNK <= warp_key || first_query >= T) continue;
      float p[M][CHUNK / 8][4], ds[M][CHUNK / 8][4];
      unsigned kept[M][CHUNK / 8];
      own_k.times_transposed(p, tile_q, chunk);
      if (first_query < warp_key + 16 * M - 1) hide_later_keys(p, first_query, warp_key, true);
#pragma unroll
      for (int n = 0; n < CHUNK / 8; n++) {
        float2 l = *(const float2*)(statistics + stage * 2 * STREAM + chunk + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
          for (int e = 0; e < 4; e++) p[m][n][e] = exp2f(p[m][n][e] * (scale * LOG2E) - (e % 2 ? l.y : l.x));
          if (DROPOUT)
            kept[m][n] = dropout_keeps_transposed(
                key, threshold, ((first_sample * H + head) * T + first_query + n * 8) * T + warp_key + m * 16, T);
        }
      }
      if (DROPOUT) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < CHUNK / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) ds[m][n][e] = kept[m][n] >> e & 1 ? p[m][n][e] : 0.f;
        add_product(dv, ds, tile_do, chunk);
      } else {
        add_product(dv, p, tile_do, chunk);
      }
      own_v.times_transposed(ds, tile_do, chunk);  // dP, before dropout
#pragma unroll
      for (int n = 0; n < CHUNK / 8; n++) {
        float2 d = *(const float2*)(statistics + (stage * 2 + 1) * STREAM + chunk + n * 8 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float dp = ds[m][n][e];
            if (DROPOUT) dp = kept[m][n] >> e & 1 ? dp * keep_scale : 0.f;
            ds[m][n][e] = p[m][n][e] * (dp - (e % 2 ? d.y : d.x));
          }
      }
      add_product(dk, ds, tile_q, chunk);
    }
    if (threadIdx.x < 2 * STREAM) statistics[(stage ^ 1) * 2 * STREAM + threadIdx.x] = next;
  }
  store_rows(dqkv + base + H * D, tile_k, dk, scale, own_row, first_key, T, stride);
  store_rows(dqkv + base + 2 * H * D, tile_v, dv, DROPOUT ? keep_scale : 1.f, own_row, first_key, T, stride);
}

// dQ of OWNED queries.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_q(bf16* __restrict__ dqkv, const bf16* __restrict__ dout, const bf16* __restrict__ qkv,
                     const float* __restrict__ lse, const float* __restrict__ delta, int T, int H, float scale,
                     PhiloxKey key, unsigned long long first_sample, unsigned threshold, float keep_scale) {
  DYN_SMEM(bf16, smem);
  bf16 *tile_q = smem, *tile_do = tile_q + OWNED * LD, *tiles_k = tile_do + OWNED * LD, *tiles_v = tiles_k + 2 * STREAM * LD;
  int lane = threadIdx.x % 32, own_row = warp_index() * 16 * M;
  int blocks = (T + OWNED - 1) / OWNED, head, block;
  place(blocks, T, head, block);
  int first_query = (blocks - 1 - block) * OWNED, stride = 3 * H * D, out_stride = H * D;
  size_t base = (size_t)(head / H) * T * stride + head % H * D, first_row = (size_t)head * T;
  const bf16 *q = qkv + base, *k = q + H * D, *v = k + H * D;
  const bf16* d_out = dout + (size_t)(head / H) * T * out_stride + head % H * D;

  int end = (min(first_query + OWNED, T) + STREAM - 1) / STREAM;
  load_tile<OWNED, THREADS>(tile_q, q, first_query, T, stride);
  load_tile<OWNED, THREADS>(tile_do, d_out, first_query, T, out_stride);
  load_tile<STREAM, THREADS>(tiles_k, k, 0, T, stride);
  load_tile<STREAM, THREADS>(tiles_v, v, 0, T, stride);
  cp_async_commit();

  int warp_query = first_query + own_row;
  float l[M][2], d[M][2];  // lse (base 2) and delta of rows lane / 4 and lane / 4 + 8 of each 16 rows
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = warp_query + m * 16 + lane / 4 + half * 8;
      l[m][half] = row < T ? lse[first_row + row] * LOG2E : 0.f;
      d[m][half] = row < T ? delta[first_row + row] : 0.f;
    }

  constexpr bool HELD = 2 * M * D / 4 <= 64;
  Own<HELD> own_q(tile_q, own_row), own_do(tile_do, own_row);
  float dq[M][D / 8][4] = {};
  for (int j = 0; j < end; j++) {
    int stage = j % 2;
    cp_async_wait<0>();
    __syncthreads();
    if (j + 1 < end) {
      load_tile<STREAM, THREADS>(tiles_k + (stage ^ 1) * STREAM * LD, k, (j + 1) * STREAM, T, stride);
      load_tile<STREAM, THREADS>(tiles_v + (stage ^ 1) * STREAM * LD, v, (j + 1) * STREAM, T, stride);
      cp_async_commit();
    }
    if (j == 0) {
      own_q.hold();
      own_do.hold();
    }
    const bf16 *tile_k = tiles_k + stage * STREAM * LD, *tile_v = tiles_v + stage * STREAM * LD;
#pragma unroll 1
    for (int chunk = 0; chunk < STREAM; chunk += CHUNK) {
      int first_key = j * STREAM + chunk;
      if (first_key >= min(warp_query + 16 * M, T)) break;
      float s[M][CHUNK / 8][4], ds[M][CHUNK / 8][4];
      own_q.times_transposed(s, tile_k, chunk);
      own_do.times_transposed(ds, tile_v, chunk);  // dP, before dropout
      if (first_key + CHUNK - 1 > warp_query) hide_later_keys(s, warp_query, first_key);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n++) {
          unsigned kept = 0;
          if (DROPOUT)
            kept = dropout_keeps_fragment(
                key, threshold, ((first_sample * H + head) * T + warp_query + m * 16) * T + first_key + n * 8, T);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float p = exp2f(s[m][n][e] * (scale * LOG2E) - l[m][e / 2]), dp = ds[m][n][e];
            if (DROPOUT) dp = kept >> e & 1 ? dp * keep_scale : 0.f;
            ds[m][n][e] = p * (dp - d[m][e / 2]);
          }
        }
      add_product(dq, ds, tile_k, chunk);
    }
  }
  store_rows(dqkv + base, tile_q, dq, scale, own_row, first_query, T, stride);
}
