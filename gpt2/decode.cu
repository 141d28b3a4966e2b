#include "common.cuh"
#include "gelu.cuh"
// One token of GPT-2 for each of B texts, from the token's number to the logits, in one launch.
//
// A token reads every weight once and computes two operations on it, so the memory's rate is the limit: 124M in bf16 is
// 248 MB, 58 us at 4.3 TB/s. As one launch an operation it would take several times that, since each of 100 kernels
// starts with empty hands. Here as many blocks as the GPU has processors live through the whole model. They go through
// five phases a layer together and wait for each other between these (grid_barrier):
//
//   0  x += the MLP of the layer before (first: the embeddings), LayerNorm, queries keys and values
//   1  attention: the keys of a head are split over SPLITS blocks
//   2  projection of the heads' results
//   3  x += that, LayerNorm, the MLP's first product
//   4  GELU (a form of gelu.cuh), the MLP's second product
//   and last, 5 L: x += that, the final LayerNorm, logits
//
// Weights do not wait. Each block knows beforehand which parts of all matrices are its own, and copies them to shared
// memory AHEAD accesses before it needs them, through phases and barriers (Stream): who waits at a barrier finds the
// next matrix there.
//
// A matrix (K, N) is cut into tiles of TILE columns, and the tiles' rows, one tile after the other, into one contiguous
// share a block: all shares are equal, but a column's sum comes in several parts. Whoever needs it adds them (total_of),
// always in the same order. Sums are f32, and nothing in between is rounded but keys and values, as the cache holds them.
//
// phase, stop: which phases to compute. With all of them in one launch every block has to be on the GPU at the same time
// (a cooperative launch); phase by phase, in a launch each, the same code needs no barrier.
constexpr int THREADS = 512, WARPS = THREADS / 32, D = C / H;
constexpr int VEC = Pack<REAL>::N, LANES = 8, TILE = LANES * VEC;  // LANES threads read one row of a tile, 128 bytes
using Access = Pack<REAL, VEC, false>;  // number by number: two to a register spill on sm_100
constexpr int ROWS = THREADS / LANES;                             // of a tile, that a block reads at a time
enum { QKV, PROJECTION, MLP_IN, MLP_OUT, MATRICES };

struct Layer {
  const REAL* matrix[MATRICES];
  const float* bias[MATRICES];
  const float* norm[4];  // the weight and bias of each LayerNorm
  REAL* cache;  // (2, B, H, capacity, D)
};
struct Tokens {
  int id[B];
};

constexpr __host__ __device__ int inputs(int matrix) { return matrix == MLP_OUT ? 4 * C : C; }
constexpr __host__ __device__ int outputs(int matrix) { return matrix == QKV ? 3 * C : matrix == MLP_IN ? 4 * C : C; }
constexpr __host__ __device__ int rows_of(int matrix) { return (outputs(matrix) + TILE - 1) / TILE * inputs(matrix); }
constexpr __host__ __device__ int share(int matrix) { return (rows_of(matrix) + BLOCKS - 1) / BLOCKS; }
constexpr __host__ __device__ int tiles_of_a_share(int matrix) {
  return (share(matrix) + inputs(matrix) - 2) / inputs(matrix) + 1;
}
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int SLOTS = larger(larger(tiles_of_a_share(QKV), tiles_of_a_share(PROJECTION)),
                             larger(tiles_of_a_share(MLP_IN), tiles_of_a_share(MLP_OUT)));
constexpr int PARTS = BLOCKS * SLOTS * B * TILE;  // numbers that a product leaves
// Numbers of x in shared memory: whole rows for LayerNorm, else what the block's share of the matrix asks for.
constexpr int WIDTH = larger(C, larger(share(PROJECTION) < C ? share(PROJECTION) : C,
                                       share(MLP_OUT) < 4 * C ? share(MLP_OUT) : 4 * C));

// The way through a block's share of a matrix: up to ROWS rows of one tile at a time.
struct Walk {
  int tile, row, left, K;
  __device__ explicit Walk(int matrix) : K(inputs(matrix)) {
    int first = min((int)blockIdx.x * share(matrix), rows_of(matrix));
    left = min(share(matrix), rows_of(matrix) - first);
    tile = first / K;
    row = first % K;
  }
  __device__ int rows() const { return min(ROWS, min(K - row, left)); }
  __device__ bool advance() {  // whether that was the last of a tile, or of the share
    int n = rows();
    row += n;
    left -= n;
    if (row < K) return !left;
    row = 0;
    tile++;
    return true;
  }
};

// The block's shares of all matrices, one after the other, on their way to shared memory. A thread copies what it will
// use itself, so it needs to wait for no other one.
struct Stream {
  const Layer* layers;
  Access* ring;  // AHEAD accesses of each thread
  const REAL* weight;
  int stage, slot;
  Walk walk;
  __device__ Stream(const Layer* layers, void* memory, int stage)
      : layers(layers), ring((Access*)memory + threadIdx.x), stage(stage), slot(0), walk(stage % MATRICES) {
    weight = stage < L * MATRICES ? layers[stage / MATRICES].matrix[stage % MATRICES] : nullptr;
    for (int i = 0; i < AHEAD; i++) fetch();
  }
  __device__ void fetch() {
    while (!walk.left && weight) {
      stage++;
      walk = Walk(stage % MATRICES);
      weight = stage < L * MATRICES ? layers[stage / MATRICES].matrix[stage % MATRICES] : nullptr;
    }
    if (weight) {
      int row = threadIdx.x / LANES, column = walk.tile * TILE + threadIdx.x % LANES * VEC, N = outputs(stage % MATRICES);
      if (row < walk.rows() && column < N)
        cp_async16(ring + slot * THREADS, weight + (size_t)(walk.row + row) * N + column);
      walk.advance();
    }
    cp_async_commit();  // empty ones too: which copy is awaited is told by counting
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
  }
  __device__ Access take() {
    cp_async_wait<AHEAD - 1>();
    Access pack = ring[slot * THREADS];
    fetch();
    return pack;
  }
};

// This block's parts of y = x W. x (B, stride) in shared memory, where row k of W meets x[b][k - origin].
template <int MATRIX>
__device__ __forceinline__ void product(Stream& stream, const float* x, int stride, int origin, float* parts,
                                        float* sums) {
  constexpr int N = outputs(MATRIX), K = inputs(MATRIX);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float y[B][VEC] = {};
  parts += (size_t)blockIdx.x * SLOTS * B * TILE;
  for (Walk walk(MATRIX); walk.left;) {
    int row = threadIdx.x / LANES, at = walk.row + row - origin;
    bool mine = row < walk.rows() && walk.tile * TILE + threadIdx.x % LANES * VEC < N;
    Access w = stream.take();
    if (mine) {
      at += at < 0 ? K : 0;
#pragma unroll
      for (int b = 0; b < B; b++) {
        float factor = x[b * stride + at];
#pragma unroll
        for (int e = 0; e < VEC; e++) y[b][e] += factor * f32(w.v[e]);
      }
    }
    if (!walk.advance()) continue;
#pragma unroll
    for (int b = 0; b < B; b++)
#pragma unroll
      for (int e = 0; e < VEC; e++) {
        float sum = y[b][e];
        sum += __shfl_xor_sync(0xffffffffu, sum, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 16);
        if (lane < LANES) sums[(warp * B + b) * TILE + lane * VEC + e] = sum;
        y[b][e] = 0.f;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < B * TILE; i += THREADS) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[w * B * TILE + i];
      parts[i] = sum;
    }
    parts += B * TILE;
    __syncthreads();
  }
}

// Column c of such a product for text b: the sum of its parts. Other blocks wrote them in this launch: not from L1.
template <int MATRIX>
__device__ __forceinline__ float total_of(const float* parts, int b, int c) {
  constexpr int K = inputs(MATRIX), SHARE = share(MATRIX), MOST = (K + SHARE - 2) / SHARE + 1;
  int tile = c / TILE, first = tile * K / SHARE, last = ((tile + 1) * K - 1) / SHARE;
  float part[MOST], sum = 0.f;
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    int block = first + i, slot = tile - block * SHARE / K;
    part[i] = block <= last ? __ldcg(parts + ((size_t)(block * SLOTS + slot) * B + b) * TILE + c % TILE) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < MOST; i++) sum += part[i];
  return sum;
}

// x = before + y + bias. Every block computes all of it; one leaves it for later.
template <int MATRIX>
__device__ __forceinline__ void residual(float* __restrict__ x, const float* __restrict__ before,
                                         float* __restrict__ after, const float* __restrict__ parts,
                                         const float* __restrict__ bias) {
  for (int i = threadIdx.x; i < B * C; i += THREADS) {
    x[i] = __ldcg(before + i) + (total_of<MATRIX>(parts, i / C, i % C) + bias[i % C]);
    if (after && blockIdx.x == 0) after[i] = x[i];
  }
}

// Biases and LayerNorms' vectors are needed at once by all blocks: bring a layer's to L2, each block some lines of it.
__device__ __forceinline__ void warm(const Layer& layer) {
  constexpr int LINE = 32;  // numbers
  int at = (blockIdx.x + BLOCKS * threadIdx.x) * LINE;
#pragma unroll
  for (int i = 0; i < MATRICES + 4; i++) {
    int size = i < MATRICES ? outputs(i) : C;
    if (at >= 0 && at < size) prefetch_l2((i < MATRICES ? layer.bias[i % MATRICES] : layer.norm[i % 4]) + at);
    at -= (size + LINE - 1) / LINE * LINE;
  }
}

// x = LayerNorm(x), a row a text.
__device__ __forceinline__ void normalise(float* x, const float* weight, const float* bias, float eps) {
  __shared__ float mean[B], rstd[B];
  __syncthreads();
  int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < B; b += WARPS) {
    float sum = 0.f, squares = 0.f;
    for (int c = lane; c < C; c += 32) sum += x[b * C + c];
    float middle = warp_sum(sum) / C;
    for (int c = lane; c < C; c += 32) squares += (x[b * C + c] - middle) * (x[b * C + c] - middle);
    squares = warp_sum(squares);
    if (lane == 0) mean[b] = middle, rstd[b] = rsqrtf(squares / C + eps);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < B * C; i += THREADS)
    x[i] = (x[i] - mean[i / C]) * rstd[i / C] * weight[i % C] + bias[i % C];
  __syncthreads();
}

// Attention of the tokens at `position` to themselves and what came before. One block has one of SPLITS parts of the
// keys of a head, with a largest score, a sum and weighted values of its own (heads: D values, largest, sum).
__device__ __forceinline__ void attend(float* heads, REAL* cache, const float* parts, const float* bias, float* memory,
                                       int position, int capacity) {
  constexpr int PACKS = D / VEC, GROUP = PACKS <= 8 ? 8 : PACKS <= 16 ? 16 : 32, EACH = (PACKS + GROUP - 1) / GROUP;
  constexpr int GROUPS = THREADS / GROUP;
  float *query = memory, *key = query + D, *value = key + D, *found = value + D;  // found: GROUPS rows as in heads
  int group = threadIdx.x / GROUP, member = threadIdx.x % GROUP;
  for (int unit = blockIdx.x; unit < B * H * SPLITS; unit += BLOCKS) {
    int split = unit % SPLITS, head = unit / SPLITS, b = head / H, column = head % H * D;
    int count = (position + SPLITS) / SPLITS, first = split * count, last = min(first + count, position + 1);
    REAL *keys = cache + (size_t)head * capacity * D, *values = keys + (size_t)B * H * capacity * D;
    for (int i = threadIdx.x; i < 3 * D; i += THREADS) {
      int c = i / D * C + column + i % D;
      float y = total_of<QKV>(parts, b, c) + bias[c];
      query[i] = i < D ? y : f32(from_f32<REAL>(y));
      if (i >= D && first <= position && position < last)
        (i < 2 * D ? keys : values)[(size_t)position * D + i % D] = from_f32<REAL>(y);
    }
    __syncthreads();

    float largest = NEG_INF, total = 0.f, sum[EACH][VEC] = {};
    for (int start = first; start < last; start += GROUPS) {  // the same for all threads, which meet in the shuffles
      int i = start + group;
      bool old = i < last && i < position;
      Access k[EACH], v[EACH];
#pragma unroll
      for (int p = 0; p < EACH; p++) {
        int at = p * GROUP + member;
        if (old && at < PACKS) {
          k[p] = *(const Access*)(keys + (size_t)i * D + at * VEC);
          v[p] = *(const Access*)(values + (size_t)i * D + at * VEC);
        } else {
#pragma unroll
          for (int e = 0; e < VEC; e++) {
            k[p].v[e] = from_f32<REAL>(at < PACKS ? key[at * VEC + e] : 0.f);
            v[p].v[e] = from_f32<REAL>(at < PACKS ? value[at * VEC + e] : 0.f);
          }
        }
      }
      float score = 0.f;
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          int at = (p * GROUP + member) * VEC + e;
          score += at < D ? query[at] * f32(k[p].v[e]) : 0.f;
        }
#pragma unroll
      for (int o = GROUP / 2; o; o /= 2) score += __shfl_xor_sync(0xffffffffu, score, o);
      if (i >= last) continue;
      score *= 1.4426950408889634f * rsqrtf((float)D);  // to base 2
      float common = fmaxf(largest, score), shrink = exp2f(largest - common), p_i = exp2f(score - common);
      largest = common;
      total = total * shrink + p_i;
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) sum[p][e] = sum[p][e] * shrink + p_i * f32(v[p].v[e]);
    }
    float* row = found + group * (D + 2);
    if (member == 0) row[D] = largest, row[D + 1] = total;
#pragma unroll
    for (int p = 0; p < EACH; p++)
#pragma unroll
      for (int e = 0; e < VEC; e++) {
        int at = (p * GROUP + member) * VEC + e;
        if (at < D) row[at] = sum[p][e];
      }
    __syncthreads();
    largest = NEG_INF;
    for (int g = 0; g < GROUPS; g++) largest = fmaxf(largest, found[g * (D + 2) + D]);
    for (int d = threadIdx.x; d < D + 2; d += THREADS) {
      float y = d == D ? largest : 0.f;
      if (d != D)
        for (int g = 0; g < GROUPS; g++) {
          float of_group = found[g * (D + 2) + D];
          y += of_group == NEG_INF ? 0.f : exp2f(of_group - largest) * found[g * (D + 2) + d];
        }
      heads[(size_t)unit * (D + 2) + d] = y;
    }
  }
}

// Column c of attention's result for text b, from its SPLITS parts.
__device__ __forceinline__ float head_of(const float* heads, int b, int c) {
  const float* part = heads + (size_t)(b * H + c / D) * SPLITS * (D + 2);
  float largest = NEG_INF, total = 0.f, y = 0.f;
#pragma unroll
  for (int s = 0; s < SPLITS; s++) largest = fmaxf(largest, __ldcg(part + s * (D + 2) + D));
#pragma unroll
  for (int s = 0; s < SPLITS; s++) {
    float of_split = __ldcg(part + s * (D + 2) + D), weight = of_split == NEG_INF ? 0.f : exp2f(of_split - largest);
    total += weight * __ldcg(part + s * (D + 2) + D + 1);
    y += weight * __ldcg(part + s * (D + 2) + c % D);
  }
  return y / total;
}

// logits (B, V) = x wte^T, some rows of wte a warp.
__device__ __forceinline__ void vocabulary(float* logits, const float* x, const REAL* wte) {
  constexpr int AT_ONCE = B <= 4 ? 4 : 2;  // what the registers hold
  int lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
  for (int v = warp * AT_ONCE; v < V; v += BLOCKS * WARPS * AT_ONCE) {
    float y[AT_ONCE][B] = {};
#pragma unroll 2
    for (int p = lane; p < C / VEC; p += 32) {
      Access w[AT_ONCE];
#pragma unroll
      for (int r = 0; r < AT_ONCE; r++) w[r] = *(const Access*)(wte + (size_t)min(v + r, V - 1) * C + p * VEC);
#pragma unroll
      for (int b = 0; b < B; b++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          float factor = x[b * C + p * VEC + e];
#pragma unroll
          for (int r = 0; r < AT_ONCE; r++) y[r][b] += factor * f32(w[r].v[e]);
        }
    }
#pragma unroll
    for (int r = 0; r < AT_ONCE; r++)
#pragma unroll
      for (int b = 0; b < B; b++) {
        float sum = warp_sum(y[r][b]);
        if (lane == 0 && v + r < V) logits[(size_t)b * V + v + r] = sum;
      }
  }
}

// What all blocks wrote before, all of them read afterwards. `arrived` counts on from launch to launch. Where a block
// does not come in seconds, the launch ends with an error: a GPU that hangs is worse.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    for (unsigned looks = 0; (int)(*(volatile unsigned*)arrived - expected) < 0; looks++)
      if (looks >> 25) __trap();
    __threadfence();
  }
  __syncthreads();
}

// x (2, B, C), parts (2, PARTS), heads (B H SPLITS, D + 2): what the blocks leave for each other, float32.
// arrived: the barrier's counter, which is `expected` when the launch begins. Tokens stand at `position` in their texts.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(float* logits, const Layer* layers, const REAL* wte, const REAL* wpe, const float* ln_f_weight,
       const float* ln_f_bias, float* x, float* parts, float* heads, unsigned* arrived, unsigned expected,
       const __grid_constant__ Tokens tokens, int position, int capacity, float eps, int phase, int stop) {
  DYN_SMEM(unsigned char, memory);
  float *here = (float*)(memory + AHEAD * THREADS * 16), *sums = here + B * WIDTH;
  float *x_in = x, *x_mid = x + B * C, *parts_in = parts, *parts_out = parts + PARTS;
  Stream stream(layers, memory, phase / 5 * MATRICES + phase % 5 - (phase % 5 > 1));  // phase 1 has no matrix
  while (phase < stop) {
    const Layer& layer = layers[min(phase / 5, L - 1)];
    const float* last_bias = layers[max(phase / 5, 1) - 1].bias[MLP_OUT];
    if (phase == 5 * L) {
      residual<MLP_OUT>(here, x_mid, nullptr, parts_out, last_bias);
      normalise(here, ln_f_weight, ln_f_bias, eps);
      vocabulary(logits, here, wte);
    } else if (phase % 5 == 0) {
      if (phase / 5 + 1 < L) warm(layers[phase / 5 + 1]);
      if (phase) {
        residual<MLP_OUT>(here, x_mid, x_in, parts_out, last_bias);
      } else {
        for (int i = threadIdx.x; i < B * C; i += THREADS) {
          here[i] = f32(wte[(size_t)tokens.id[i / C] * C + i % C]) + f32(wpe[(size_t)position * C + i % C]);
          if (blockIdx.x == 0) x_in[i] = here[i];
        }
      }
      normalise(here, layer.norm[0], layer.norm[1], eps);
      product<QKV>(stream, here, C, 0, parts_in, sums);
    } else if (phase % 5 == 1) {
      attend(heads, layer.cache, parts_in, layer.bias[QKV], sums, position, capacity);
    } else if (phase % 5 == 3) {
      residual<PROJECTION>(here, x_in, x_mid, parts_out, layer.bias[PROJECTION]);
      normalise(here, layer.norm[2], layer.norm[3], eps);
      product<MLP_IN>(stream, here, C, 0, parts_in, sums);
    } else {  // the block's share of the matrix says which of the inputs it needs: `count` from `origin` on, in a circle
      bool projection = phase % 5 == 2;
      int K = projection ? C : 4 * C, count = min(K, share(projection ? PROJECTION : MLP_OUT));
      int origin = Walk(projection ? PROJECTION : MLP_OUT).row;
      for (int i = threadIdx.x; i < B * count; i += THREADS) {
        int b = i / count, k = origin + i % count;
        k -= k < K ? 0 : K;
        here[i] = projection ? head_of(heads, b, k)
                             : GELU::value(total_of<MLP_IN>(parts_in, b, k) + layer.bias[MLP_IN][k]);
      }
      __syncthreads();
      if (projection)
        product<PROJECTION>(stream, here, count, origin, parts_out, sums);
      else
        product<MLP_OUT>(stream, here, count, origin, parts_out, sums);
    }
    if (++phase < stop) grid_barrier(arrived, expected += BLOCKS);
  }
  cp_async_wait<0>();
}
