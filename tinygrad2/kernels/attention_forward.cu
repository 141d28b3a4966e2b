#include "common.cuh"
#include "attention.cuh"
// Forward pass of causal flash attention: out = softmax(q k^T / sqrt(D)) v, and lse, the natural logarithm of each
// row's sum of exponentials. Dropout (DROPOUT=1) applies to the weights but not to their sum.
//
// qkv (B, T, 3, H, D), as written by the matrix product; out (B, T, H, D); lse (B, H, T), f32. A block of 4 warps
// processes ROWS queries of one head, 16 M per warp, and iterates over the keys up to them, KEYS at a time. The next
// tile is copied while the current one is used, and the scores stay in registers. Running maximum and sum:
// arXiv:2205.14135. Scores are scaled by log2(e) / sqrt(D), so that one fused multiply-add and one exp2 give a weight.
//
// 124M model (H=12, D=64), B=64, T=1024, one layer: 302 MB read (keys and values are reread from L2), 101 MB and 3 MB
// written, 94 us. 103 GFLOP below the diagonal take 130 us at 790 TFLOP/s, which mma.sync does not reach, and 450 us at
// FlashAttention-2's 229 TFLOP/s.
#ifndef DROPOUT
#define DROPOUT 0
#endif
constexpr int WARPS = 4, ROWS = OWNED, KEYS = STREAM;
constexpr int M = ROWS / (16 * WARPS);  // fragments of 16 queries per warp, which share each fragment of keys
static_assert(ROWS % (16 * WARPS) == 0 && KEYS % 16 == 0, "tiles");

// Maximum and sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
attention_forward(bf16* __restrict__ out, float* __restrict__ lse, const bf16* __restrict__ qkv, int T, int H,
                  float scale, PhiloxKey key, unsigned long long first_sample, unsigned threshold, float keep_scale) {
  DYN_SMEM(bf16, shared);
  bf16 *queries = shared, *keys = queries + ROWS * LD, *values = keys + 2 * KEYS * LD;
  int blocks = (T + ROWS - 1) / ROWS, head, block;
  place(blocks, T, head, block);
  int lane = threadIdx.x % 32, b = head / H, h = head % H;
  int top = (blocks - 1 - block) * ROWS;               // the last queries attend to the most keys
  int warp_top = top + warp_index() * 16 * M;          // the first query of this warp
  int tiles = (min(top + ROWS, T) + KEYS - 1) / KEYS;  // tiles of keys that some query of this block attends to
  int stride = 3 * H * D;
  const bf16 *Q = qkv + (size_t)b * T * stride + h * D, *K = Q + H * D, *V = K + H * D;

  load_tile<ROWS, 32 * WARPS>(queries, Q, top, T, stride);
  load_tile<KEYS, 32 * WARPS>(keys, K, 0, T, stride);
  load_tile<KEYS, 32 * WARPS>(values, V, 0, T, stride);
  cp_async_commit();

  unsigned q[M][D / 16][4];
  float o[M][D / 8][4] = {}, largest[M][2], total[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = NEG_INF;

  for (int j = 0; j < tiles; j++) {
    const bf16 *tile_k = keys + j % 2 * KEYS * LD, *tile_v = values + j % 2 * KEYS * LD;
    cp_async_wait<0>();
    __syncthreads();  // all threads have received this tile, and have finished the tile that the next copy overwrites
    if (j + 1 < tiles) {
      load_tile<KEYS, 32 * WARPS>(keys + (j + 1) % 2 * KEYS * LD, K, (j + 1) * KEYS, T, stride);
      load_tile<KEYS, 32 * WARPS>(values + (j + 1) % 2 * KEYS * LD, V, (j + 1) * KEYS, T, stride);
      cp_async_commit();
    }
    if (j == 0)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < D / 16; k++) left_factor(q[m][k], queries, warp_top - top + 16 * m, 16 * k);

    if (j * KEYS < warp_top + 16 * M) {  // this warp attends to some of these keys
      float s[M][KEYS / 8][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
          unsigned f[4];
          right_factor_of_transposed(f, tile_k, 16 * n, 16 * k);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16_16816(s[m][2 * n], q[m][k], f[0], f[1]);
            mma_bf16_16816(s[m][2 * n + 1], q[m][k], f[2], f[3]);
          }
        }
      if ((j + 1) * KEYS > warp_top + 1) hide_later_keys(s, warp_top, j * KEYS);  // the diagonal crosses this tile
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {  // rows lane / 4 and lane / 4 + 8 of the fragment
          float found = largest[m][half];
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++) found = fmaxf(found, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
          found = row_max(found);
          float shrink = exp2f((largest[m][half] - found) * scale), offset = -found * scale;
          largest[m][half] = found;
          total[m][half] *= shrink;
#pragma unroll
          for (int n = 0; n < D / 8; n++) {
            o[m][n][2 * half] *= shrink;
            o[m][n][2 * half + 1] *= shrink;
          }
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
              s[m][n][i] = exp2f(fmaf(s[m][n][i], scale, offset));
              total[m][half] += s[m][n][i];  // this lane's columns
            }
        }
#if DROPOUT
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
          unsigned long long row = (first_sample + b) * H + h;
          row = row * T + warp_top + 16 * m;
          unsigned kept = dropout_keeps_fragment(key, threshold, row * T + j * KEYS + 8 * n, T);
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!(kept >> i & 1)) s[m][n][i] = 0.f;
        }
#endif
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) {
        unsigned p[M][4];  // the results of two mmas, packed, have the layout of a left factor
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            p[m][i] = bf16_pair(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          unsigned f[4];
          right_factor(f, tile_v, 16 * k, 16 * n);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma_bf16_16816(o[m][2 * n], p[m], f[0], f[1]);
            mma_bf16_16816(o[m][2 * n + 1], p[m], f[2], f[3]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = row_sum(total[m][half]), factor = 1.f / sum;
      int row = warp_top + 16 * m + lane / 4 + 8 * half;
#if DROPOUT
      factor *= keep_scale;
#endif
      if (row < T && lane % 4 == 0)
        lse[(size_t)head * T + row] = largest[m][half] * scale * 0.69314718056f + logf(sum);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        o[m][n][2 * half] *= factor;
        o[m][n][2 * half + 1] *= factor;
      }
    }
  store_rows(out + ((size_t)b * T * H + h) * D, queries, o, 1.f, warp_top - top, top, T, H * D);
}
