#include "common.cuh"
#include "gelu.cuh"
// Computes one token of GPT-2 for each of B texts, from the token id to the logits, in one launch.
//
// For each token, every weight is read once and used in two operations, so memory bandwidth is the limit: 124M
// parameters in bf16 are 248 MB, which take 58 us at 4.3 TB/s. With one launch per operation, a token would take
// several times as long, since each of 100 kernels starts by waiting for memory. Here the blocks stay resident for the
// entire model, and the limit is the speed of their exchanges: two per layer among all blocks, and up to four within a
// cluster before each of these.
//
// Glossary
//   cluster   RANKS blocks that share HEADS heads and HIDDEN columns of the MLP. With HARDWARE_CLUSTERS (compute
//             capability 9) it is a thread block cluster, whose blocks write to each other's shared memory; otherwise
//             they write to each other's mailbox in global memory.
//   rank      a block's number in its cluster. Each block owns C / RANKS columns of the residual stream x; blocks with
//             the same rank have the same columns in every cluster.
//   message   8 bytes: a float32 and a 32-bit tag, written in one access. The tag is incremented after every half of a
//             layer, so a reader that finds the expected tag also has the value. No fence and no barrier between all
//             blocks is needed.
//   mailbox   the messages that a block receives from its cluster, one entry for each.
//   results   the messages that every cluster sends to all blocks with the same rank: its contribution to x.
//   half      half a layer: attention or the MLP.
//
// Half a layer in one cluster (arrows are messages):
//
//   results of the previous half, of all clusters
//        |  sum; own columns of x
//   LayerNorm of the own columns  <---- mean and squares ---->  other ranks
//        |
//   own columns times the cluster's columns of the first matrix  -- partial sums -->  other ranks, which return totals
//        |
//   attention of the cluster's heads, over some of the keys in each rank  <-- partial results -->  other ranks; or GELU
//        |
//   the result times own columns of the second matrix
//        |
//        +----> results, for all clusters
//
// An entry is overwritten only after its readers have read it and sent another message that the writer waits for.
// (Clusters without heads send no messages in attention, so `results` has room for four halves, two of each kind, which
// are used in rotation.)
//
// Weights are prefetched. Each block reads a fixed part of every matrix and copies it to shared memory PREFETCH
// accesses ahead (see Stream), so the next matrix is available when the wait for a message ends.
//
// Sums are computed in f32 and in a fixed order. Only keys and values are rounded, to the type of the cache. All blocks
// must run concurrently, so the grid is limited to the number of blocks that fit on the GPU.
constexpr int THREADS = 512, WARPS = THREADS / 32, BLOCKS = CLUSTERS * RANKS, D = C / H, OWN = C / RANKS;
constexpr int WIDTH = HEADS * D;                        // columns of a cluster's heads
constexpr int ATTENTION_CLUSTERS = (H + HEADS - 1) / HEADS;      // clusters that have heads
constexpr int VEC = Pack<REAL>::N;
using Access = Pack<REAL, VEC>;
constexpr int UNROLL = B <= 2 ? 2 : 1;  // unrolled steps of a product, whose weights are in registers
constexpr int WTE_HALVES = 3;  // number of final halves in which the first rows of wte are prefetched into L2
enum { QKV, PROJECTION, MLP_IN, MLP_OUT, MATRICES };

#if !HARDWARE_CLUSTERS  // inlined, it would spill registers on sm_80
#define ATTEND_INLINE __noinline__
#else
#define ATTEND_INLINE __forceinline__
#endif
#if HARDWARE_CLUSTERS
#define CLUSTER_DIMS __cluster_dims__(RANKS, 1, 1)
#else
#define CLUSTER_DIMS
#endif

struct Layer {
  const REAL* matrix[MATRICES];
  const float* bias[MATRICES];
  const float* norm[4];  // the weight and bias of each LayerNorm
  REAL* cache;           // (2, B, H, capacity, D)
};
struct Tokens {
  int id[B];
};

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int repeats(int numbers) { return (numbers + THREADS - 1) / THREADS; }  // iterations at one value per thread
constexpr __host__ __device__ bool first_of_half(int matrix) { return matrix == QKV || matrix == MLP_IN; }
constexpr __host__ __device__ int inputs(int matrix) { return matrix == MLP_OUT ? 4 * C : C; }
constexpr __host__ __device__ int outputs(int matrix) { return matrix == QKV ? 3 * C : matrix == MLP_IN ? 4 * C : C; }
// A block's part of a matrix, which its threads read `at_once` rows at a time, in `steps` steps.
constexpr __host__ __device__ int rows(int matrix) {
  return first_of_half(matrix) ? OWN : matrix == PROJECTION ? WIDTH : HIDDEN;
}
constexpr __host__ __device__ int columns(int matrix) {
  return matrix == QKV ? 3 * WIDTH : matrix == MLP_IN ? HIDDEN : OWN;
}
constexpr __host__ __device__ int at_once(int matrix) { return THREADS / (columns(matrix) / VEC); }
constexpr __host__ __device__ int slots(int columns) { return (columns + RANKS - 1) / RANKS; }  // columns per block
constexpr __host__ __device__ int steps(int matrix) { return (rows(matrix) + at_once(matrix) - 1) / at_once(matrix); }

// The first entry of each kind of message in a mailbox.
constexpr int STATISTICS = 0, PARTIAL_SUMS = STATISTICS + B * RANKS * 2;
constexpr int TOTALS = PARTIAL_SUMS + RANKS * B * slots(larger(3 * WIDTH, HIDDEN));
constexpr int HEAD_PARTS = TOTALS + B * larger(larger(3 * WIDTH, HIDDEN), C);
constexpr int MAILBOX = HEAD_PARTS + RANKS * B * HEADS * (D + 2);

__device__ __forceinline__ int rank() { return blockIdx.x % RANKS; }
__device__ __forceinline__ int cluster() { return blockIdx.x / RANKS; }

// Writes a value and a tag in one access of 8 bytes that bypasses L1.
typedef unsigned long long Message;
__device__ __forceinline__ void send(Message* entry, float number, unsigned tag) {
  *(volatile Message*)entry = (Message)tag << 32 | __float_as_uint(number);
}
// Returns whether a message with this tag has arrived, and reads its value.
__device__ __forceinline__ bool received(const Message* entry, unsigned tag, float& number) {
  Message message = *(const volatile Message*)entry;
  number = __uint_as_float((unsigned)message);
  return (unsigned)(message >> 32) == tag;
}

// The same entry in the mailbox of another block of the cluster.
__device__ __forceinline__ Message* mailbox_of(Message* entry, int to) {
#if HARDWARE_CLUSTERS
  return in_block<RANKS>(entry, to);
#else
  return entry + (to - rank()) * MAILBOX;
#endif
}
__device__ __forceinline__ void send_to_cluster(Message* entry, float number, unsigned tag) {
#pragma unroll
  for (int to = 0; to < RANKS; to++) send(mailbox_of(entry, to), number, tag);
}
// Waits for N messages, `stride` entries apart, and reads their values.
template <int N>
__device__ __forceinline__ void receive(float (&number)[N], const Message* entry, int stride, unsigned tag) {
  for (unsigned polls = 0;; polls++) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; i++) all &= received(entry + i * stride, tag, number[i]);
    if (all) return;
    backoff();
    if (polls >> 26) __trap();  // after several seconds, fail instead of hanging
  }
}
template <int N>
__device__ __forceinline__ float receive_sum(const Message* entry, int stride, unsigned tag) {
  float number[N], sum = 0.f;
  receive(number, entry, stride, tag);
#pragma unroll
  for (int i = 0; i < N; i++) sum += number[i];
  return sum;
}

// What one thread reads of a block's part of a matrix: VEC columns of rows first, first + at_once, ...
struct Share {
  int first, last, column;  // indices in the full matrix; first >= last if there are no rows
  __device__ __forceinline__ explicit Share(int matrix) {
    int lane = threadIdx.x % (columns(matrix) / VEC) * VEC, row = threadIdx.x / (columns(matrix) / VEC), end;
    bool idle = row >= at_once(matrix);
    if (first_of_half(matrix)) {
      first = rank() * OWN;
      last = first + OWN;
      column = matrix == QKV ? cluster() * WIDTH + lane % WIDTH : cluster() * HIDDEN + lane;
      end = matrix == QKV ? C : 4 * C;  // the last cluster may have fewer
      idle |= column >= end;
      if (matrix == QKV) column += lane / WIDTH * C;
    } else {
      first = cluster() * rows(matrix);
      last = min(first + rows(matrix), inputs(matrix));
      column = rank() * OWN + lane;
    }
    first += row;
    if (idle) last = 0;
  }
};

// A thread's Share as an offset and a stride. It is computed once, since the divisions take longer than some accesses.
struct Traversal {
  int first, stride;  // offset of the first access, and distance between accesses
  int steps, rows;    // number of steps of the block, and of those in which this thread has a row
  __device__ __forceinline__ explicit Traversal(int matrix)
      : stride(at_once(matrix) * outputs(matrix)), steps(::steps(matrix)) {
    Share share(matrix);
    first = share.first * outputs(matrix) + share.column;
    rows = max(share.last - share.first + at_once(matrix) - 1, 0) / at_once(matrix);
  }
};

// Prefetches the block's parts of all matrices, in order, into a ring buffer in shared memory. Each thread copies the
// weights that it will use, so it does not wait for other threads.
struct Stream {
  const Layer* layers;
  Access* ring;  // PREFETCH accesses for each thread
  const Traversal qkv, projection, mlp_in, mlp_out;
  const REAL *weight, *next;  // address of the next access, and the matrix after the current one
  int stage, slot, left, rows, stride;
  __device__ Stream(const Layer* layers, void* memory)
      : layers(layers), ring((Access*)memory + threadIdx.x), qkv(QKV), projection(PROJECTION), mlp_in(MLP_IN),
        mlp_out(MLP_OUT), stage(cluster() < ATTENTION_CLUSTERS ? QKV : MLP_IN), slot(0), left(0) {
    next = layers->matrix[stage];
    fetch(PREFETCH);
  }
  __device__ __forceinline__ void fetch(int count) {
#pragma unroll 1
    for (; count; count--) {
      if (!left && stage < L * MATRICES) {
        int matrix = stage % MATRICES;
        Traversal part = matrix == QKV ? qkv : matrix == PROJECTION ? projection : matrix == MLP_IN ? mlp_in : mlp_out;
        weight = next + part.first;
        stride = part.stride;
        left = part.steps;
        rows = part.rows;
        if (++stage % MATRICES == QKV && cluster() >= ATTENTION_CLUSTERS) stage += 2;
        if (stage < L * MATRICES) next = layers[stage / MATRICES].matrix[stage % MATRICES];  // loaded early
      }
      if (left) {
        cp_async16(ring + slot, weight, rows-- > 0 ? 16 : 0);
        weight += stride;
        left--;
      }
      cp_async_commit();  // even if the group is empty, since cp_async_wait counts groups
      slot = slot + THREADS == PREFETCH * THREADS ? 0 : slot + THREADS;
    }
  }
};

// Calls emit(b, column, sum) for each column of the block's part of y = x W, where x (B, rows) is in shared memory.
template <int MATRIX, class Use>
__device__ __forceinline__ void product(Stream& stream, const float* x, float* memory, Use emit) {
  constexpr int COLUMNS = columns(MATRIX), STEP = at_once(MATRIX), ROWS = rows(MATRIX), ALL = steps(MATRIX);
  constexpr int PART = ALL < PREFETCH / 2 ? ALL : PREFETCH / 2;  // steps per wait for weights
  constexpr int LANES = COLUMNS / VEC, PLANE = THREADS * 4 + 16;  // each plane has 4 columns, to avoid bank conflicts
  Share share(MATRIX);
  x -= (first_of_half(MATRIX) ? rank() : cluster()) * ROWS;
  float y[B][VEC] = {};
#pragma unroll 1
  for (int step = 0; step < ALL; step += PART) {
    if (step) stream.fetch(PART);
    cp_async_wait<PREFETCH - PART>();
    int slot = stream.slot;
#pragma unroll UNROLL
    for (int i = step; i < min(step + PART, ALL); i++) {
      Access w = stream.ring[slot];  // zero if this thread has no row
#pragma unroll
      for (int b = 0; b < B; b++) {
        float factor = share.first < share.last ? x[b * ROWS + share.first] : 0.f;
#pragma unroll
        for (int e = 0; e < VEC; e++) y[b][e] += factor * w[e];
      }
      share.first += STEP;
      slot = slot + THREADS == PREFETCH * THREADS ? 0 : slot + THREADS;
    }
  }
#pragma unroll
  for (int b = 0; b < B; b++) {
    if (threadIdx.x < STEP * LANES)
#pragma unroll
      for (int e = 0; e < VEC; e++) memory[e / 4 * PLANE + threadIdx.x * 4 + e % 4] = y[b][e];
    __syncthreads();
    for (int c = threadIdx.x; c < COLUMNS; c += THREADS) {
      const float* at = memory + c % VEC / 4 * PLANE + c / VEC * 4 + c % 4;
      float even = 0.f, odd = 0.f;
#pragma unroll 16
      for (int row = 0; row < STEP; row++) (row % 2 ? odd : even) += at[row * LANES * 4];
      emit(b, c, even + odd);
    }
    if (b + 1 < B) __syncthreads();  // after the last text, the caller synchronizes
  }
  stream.fetch(ALL - (ALL - 1) / PART * PART);  // last, since other blocks wait for the sums
}

// LayerNorm of the block's own columns (B, OWN) in shared memory; each thread normalizes the values that it wrote.
__device__ __forceinline__ void layernorm(float* here, const float (&weight)[repeats(B * OWN)],
                                          const float (&bias)[repeats(B * OWN)], float eps, Message* mailbox,
                                          unsigned tag) {
  int lane = threadIdx.x % 32, text = threadIdx.x / 32;
  __syncthreads();
  if (text < B) {  // this block's mean and sum of squares; subtracting one of the values first avoids cancellation
    float origin = here[text * OWN], sum = 0.f, squares = 0.f;
    for (int c = lane; c < OWN; c += 32) {
      float x = here[text * OWN + c] - origin;
      sum += x;
      squares += x * x;
    }
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    if (lane < RANKS) {
      Message* entry = mailbox_of(mailbox + STATISTICS + (text * RANKS + rank()) * 2, lane);
      send(entry, origin + sum * (1.f / OWN), tag);
      send(entry + 1, squares - sum * sum * (1.f / OWN), tag);
    }
  }
#pragma unroll
  for (int k = 0; k < repeats(B * OWN); k++) {
    int i = threadIdx.x + k * THREADS;
    if (i >= B * OWN) break;
    float of[RANKS * 2], mean = 0.f, squares = 0.f;  // of: mean and squares of each rank
    receive(of, mailbox + STATISTICS + i / OWN * RANKS * 2, 1, tag);
#pragma unroll
    for (int r = 0; r < RANKS; r++) mean += of[2 * r] * (1.f / RANKS);
#pragma unroll
    for (int r = 0; r < RANKS; r++) squares += of[2 * r + 1] + OWN * (of[2 * r] - mean) * (of[2 * r] - mean);
    here[i] = (here[i] - mean) * rsqrtf(squares * (1.f / C) + eps) * weight[k] + bias[k];
  }
  __syncthreads();
}

// Attention of the tokens at `position`. Each block processes the keys at positions rank, rank + RANKS, ...
// first (B, 3, WIDTH) contains queries, keys and values. For each head, the block sends its partial result to its
// cluster: D values, the largest score, and the sum of the exponentials.
__device__ ATTEND_INLINE void attend(const float* first, REAL* cache, float* memory, int position, int capacity,
                                       Message* mailbox, unsigned tag) {
  constexpr int PACKS = D / VEC, GROUP = PACKS <= 8 ? 8 : PACKS <= 16 ? 16 : 32, EACH = (PACKS + GROUP - 1) / GROUP;
  constexpr int GROUPS = THREADS / GROUP;
  int group = threadIdx.x / GROUP, member = threadIdx.x % GROUP, count = (position - rank() + RANKS) / RANKS;
  for (int unit = 0; unit < B * HEADS; unit++) {
    int b = unit / HEADS, head = cluster() * HEADS + unit % HEADS;
    if (head >= H) continue;
    if (unit) __syncthreads();
    const float *query = first + b * 3 * WIDTH + unit % HEADS * D, *key = query + WIDTH, *value = key + WIDTH;
    REAL *keys = cache + (size_t)(b * H + head) * capacity * D, *values = keys + (size_t)B * H * capacity * D;
    float largest = NEG_INF, total = 0.f, sum[EACH][VEC] = {}, q[EACH][VEC];
#pragma unroll
    for (int p = 0; p < EACH; p++)
#pragma unroll
      for (int e = 0; e < VEC; e++) {
        int at = (p * GROUP + member) * VEC + e;
        q[p][e] = at < D ? query[at] : 0.f;
      }
    for (int start = 0; start < count; start += GROUPS) {  // the same count in all threads: shuffles need full warps
      int i = rank() + (start + group) * RANKS;
      Access k[EACH], v[EACH];
#pragma unroll
      for (int p = 0; p < EACH; p++) {
        int at = p * GROUP + member;
        if (i < position && at < PACKS) {
          k[p] = *(const Access*)(keys + (size_t)i * D + at * VEC);
          v[p] = *(const Access*)(values + (size_t)i * D + at * VEC);
        } else {
          float own_key[VEC], own_value[VEC];
#pragma unroll
          for (int e = 0; e < VEC; e++) {
            own_key[e] = at < PACKS ? key[at * VEC + e] : 0.f;
            own_value[e] = at < PACKS ? value[at * VEC + e] : 0.f;
          }
          k[p] = Access(own_key), v[p] = Access(own_value);  // rounded as in the cache
        }
      }
      float score = 0.f;
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) score += q[p][e] * k[p][e];
#pragma unroll
      for (int o = GROUP / 2; o; o /= 2) score += __shfl_xor_sync(0xffffffffu, score, o);
      if (i > position) continue;
      score *= 1.4426950408889634f * rsqrtf((float)D);  // for exp2f instead of expf
      float common = fmaxf(largest, score), shrink = exp2f(largest - common), p_i = exp2f(score - common);
      largest = common;
      total = total * shrink + p_i;
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) sum[p][e] = sum[p][e] * shrink + p_i * v[p][e];
    }
    // Combine the groups of a warp, then the warps.
#pragma unroll
    for (int o = GROUP; o < 32; o *= 2) {
      float common = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
      float shrink = largest == NEG_INF ? 0.f : exp2f(largest - common);
      largest = common;
      total = shrink * total + __shfl_xor_sync(0xffffffffu, shrink * total, o);
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          float mine = shrink * sum[p][e];
          sum[p][e] = mine + __shfl_xor_sync(0xffffffffu, mine, o);
        }
    }
    float* row = memory + threadIdx.x / 32 * (D + 2);
    if (threadIdx.x % 32 == 0) row[D] = largest, row[D + 1] = total;
    if (threadIdx.x % 32 < GROUP)
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          int at = (p * GROUP + member) * VEC + e;
          if (at < D) row[at] = sum[p][e];
        }
    __syncthreads();
    for (int d = threadIdx.x; d < D + 2; d += THREADS) {
      float common = NEG_INF, y = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) common = fmaxf(common, memory[w * (D + 2) + D]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float of_warp = memory[w * (D + 2) + D];
        y += of_warp == NEG_INF ? 0.f : exp2f(of_warp - common) * memory[w * (D + 2) + d];
      }
      send_to_cluster(mailbox + HEAD_PARTS + (rank() * B * HEADS + unit) * (D + 2) + d, d == D ? common : y, tag);
    }
    if (rank() == position % RANKS)  // append to the cache, for later tokens
      for (int i = threadIdx.x; i < 2 * D; i += THREADS)
        (i < D ? keys : values)[(size_t)position * D + i % D] = from_f32<REAL>(i < D ? key[i] : value[i - D]);
  }
}

// Writes heads (B, WIDTH), the result of attention, combined from the partial results of the cluster's blocks.
__device__ __forceinline__ void combine_heads(float* heads, const Message* mailbox, unsigned tag) {
  constexpr int STRIDE = B * HEADS * (D + 2);
  for (int i = threadIdx.x; i < B * WIDTH; i += THREADS) {
    int unit = i / D;
    if (cluster() * HEADS + unit % HEADS >= H) continue;
    const Message* entry = mailbox + HEAD_PARTS + unit * (D + 2);
    float value[RANKS], largest[RANKS], total[RANKS], common = NEG_INF, below = 0.f, y = 0.f;
    receive(value, entry + i % D, STRIDE, tag);
    receive(largest, entry + D, STRIDE, tag);
    receive(total, entry + D + 1, STRIDE, tag);
#pragma unroll
    for (int r = 0; r < RANKS; r++) common = fmaxf(common, largest[r]);
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      float weight = largest[r] == NEG_INF ? 0.f : exp2f(largest[r] - common);
      below += weight * total[r];
      y += weight * value[r];
    }
    heads[i] = y / below;
  }
  __syncthreads();
}

// The largest of some logits and its token (the smallest token if several logits are equal). A logit that is not finite
// counts as the largest, with token -1.
struct Choice {
  float logit, token;
  __device__ __forceinline__ void none() { logit = NEG_INF, token = 1e9f; }
  __device__ __forceinline__ void update(float other, float its_token) {
    if (other > logit || (other == logit && its_token < token)) logit = other, token = its_token;
  }
};

// logits (B, V) = x wte^T; each warp computes some rows of wte. The logits are not stored if `logits` is null.
// best (B, WARPS): each warp's choice among its rows below `choices`.
__device__ __forceinline__ void lm_head(float* logits, Choice* best, int choices, const float* x, const REAL* wte) {
  constexpr int AT_ONCE = B <= 4 ? 4 : 2;  // rows per iteration, limited by the number of registers
  int lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
  best += threadIdx.x / 32;
  if (lane < B) best[lane * WARPS].none();
  __syncwarp();
  for (int v = warp * AT_ONCE; v < V; v += BLOCKS * WARPS * AT_ONCE) {
    float y[AT_ONCE][B] = {};
#pragma unroll(B <= 2 ? 2 : 1)
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
          for (int r = 0; r < AT_ONCE; r++) y[r][b] += factor * w[r][e];
        }
    }
#pragma unroll
    for (int r = 0; r < AT_ONCE; r++)
#pragma unroll
      for (int b = 0; b < B; b++) {
        float sum = warp_sum(y[r][b]);
        if (lane != 0) continue;
        if (logits && v + r < V) logits[(size_t)b * V + v + r] = sum;
        bool finite = fabsf(sum) < -NEG_INF;
        if (v + r < choices) best[b * WARPS].update(finite ? sum : -NEG_INF, finite ? v + r : -1);
      }
  }
}

// Chooses the token with the largest logit, with one warp per text: each block among its own rows, then block 0 among
// the choices of all blocks.
__device__ __forceinline__ void choose_token(int* chosen, const Choice* best, Message* mailbox, unsigned tag) {
  __syncthreads();
  int b = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (b >= B) return;
  auto of_warp = [](Choice choice) {
#pragma unroll
    for (int o = 16; o; o >>= 1)
      choice.update(__shfl_xor_sync(0xffffffffu, choice.logit, o), __shfl_xor_sync(0xffffffffu, choice.token, o));
    return choice;
  };
  Choice choice = of_warp(best[b * WARPS + lane % WARPS]);
  mailbox += b * BLOCKS * 2;
  if (lane == 0) {
    send(mailbox + blockIdx.x * 2, choice.logit, tag);
    send(mailbox + blockIdx.x * 2 + 1, choice.token, tag);
  }
  if (blockIdx.x) return;
  choice.none();
  for (int i = lane; i < BLOCKS; i += 32) {
    float other[2];
    receive(other, mailbox + i * 2, 1, tag);
    choice.update(other[0], other[1]);
  }
  choice = of_warp(choice);
  if (lane == 0) chosen[b] = choice.token;
}

// Prefetches into L2: the vectors of the next layer, which all blocks need (each block fetches some lines), the first
// rows of wte, and this block's keys and values.
__device__ __forceinline__ void prefetch_vectors(const Layer& layer) {
  constexpr int LINE = 32;  // elements
  int at = (blockIdx.x + BLOCKS * (THREADS - 1 - threadIdx.x)) * LINE;  // the first warps wait for messages
#pragma unroll
  for (int i = 0; i < MATRICES + 4; i++) {
    int size = i < MATRICES ? outputs(i) : C;
    if (at >= 0 && at < size) prefetch_l2((i < MATRICES ? layer.bias[i % MATRICES] : layer.norm[i % 4]) + at);
    at -= (size + LINE - 1) / LINE * LINE;
  }
}
__device__ __forceinline__ void prefetch_wte(const REAL* wte, int step) {
  constexpr int LINE = 128 / sizeof(REAL);
  size_t at = ((size_t)(step * BLOCKS + blockIdx.x) * THREADS + threadIdx.x) * LINE;
  if (at < (size_t)V * C) prefetch_l2(wte + at);
}
__device__ __forceinline__ void prefetch_keys(const REAL* cache, int position, int capacity) {
  for (int i = rank() + (THREADS - 1 - threadIdx.x) / 2 * RANKS; i < position; i += THREADS / 2 * RANKS)
    for (int unit = 0; unit < B * HEADS; unit++) {
      int head = cluster() * HEADS + unit % HEADS;
      if (head >= H) continue;
      size_t text = (size_t)(threadIdx.x % 2 * B + unit / HEADS) * H;  // keys, then values
      prefetch_l2(cache + ((text + head) * capacity + i) * D);
    }
}

// A cluster's part of half a layer, with matrices FIRST and SECOND. `here` (B, OWN) is the output of LayerNorm.
template <int FIRST, int SECOND>
__device__ __forceinline__ void half_layer(Stream& stream, const Layer& layer, const float* here, float* first,
                                           float* heads, float* work, Message* results, Message* mailbox, int position,
                                           int capacity, unsigned tag) {
  constexpr int COLUMNS = columns(FIRST), SLOTS = slots(COLUMNS);
  float bias[repeats(B * SLOTS)];  // loaded before it is needed
#pragma unroll
  for (int k = 0; k < repeats(B * SLOTS); k++) {
    int c = rank() * SLOTS + (threadIdx.x + k * THREADS) % SLOTS, within = FIRST == QKV ? c % WIDTH : c;
    int column = cluster() * (FIRST == QKV ? WIDTH : HIDDEN) + within;
    bias[k] = c < COLUMNS && column < inputs(SECOND) ? layer.bias[FIRST][column + (c - within) / WIDTH * C] : 0.f;
  }
  // Each block sums some of the columns and sends the totals to the cluster. This takes two exchanges, but an eighth of
  // the messages that a single exchange would need.
  Message *sums = mailbox + PARTIAL_SUMS, *totals = mailbox + TOTALS;
  product<FIRST>(stream, here, work, [&](int b, int c, float sum) {
    send(mailbox_of(sums + (rank() * B + b) * SLOTS + c % SLOTS, c / SLOTS), sum, tag);
  });
#pragma unroll
  for (int k = 0; k < repeats(B * SLOTS); k++) {
    int i = threadIdx.x + k * THREADS, c = rank() * SLOTS + i % SLOTS;
    if (i >= B * SLOTS || c >= COLUMNS) continue;
    float y = receive_sum<RANKS>(sums + i, B * SLOTS, tag) + bias[k];
    send_to_cluster(totals + i / SLOTS * COLUMNS + c, FIRST == QKV ? y : GELU::value(y), tag);
  }
  for (int i = threadIdx.x; i < B * COLUMNS; i += THREADS) first[i] = receive_sum<1>(totals + i, 1, tag);
  __syncthreads();
  if (FIRST == QKV) {
    attend(first, layer.cache, work, position, capacity, mailbox, tag);
    combine_heads(heads, mailbox, tag);
  }
  product<SECOND>(stream, FIRST == QKV ? heads : first, work, [&](int b, int c, float sum) {
    send(results + ((size_t)cluster() * B + b) * C + rank() * OWN + c, sum, tag);
  });
}

// previous (B), tokens: the input tokens, which are at `position` in their texts. They are those in `previous`, which
//   were chosen by an earlier launch, or `tokens` if `previous` is null.
// logits (B, V), chosen (B): the outputs, either of which may be null. `chosen` is among the first `choices` tokens.
// results (4, CLUSTERS, B, C): messages to all blocks with the same rank, followed by (B, BLOCKS, 2) for block 0.
// mailbox (BLOCKS, MAILBOX): used only without hardware clusters.
// tag: the tag of the first messages of this launch, which also uses the next 2 L tags.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_DIMS
decode(float* logits, int* chosen, const int* previous, const Layer* layers, const REAL* wte, const REAL* wpe,
       const float* ln_f_weight, const float* ln_f_bias, Message* results, Message* mailbox,
       const __grid_constant__ Tokens tokens, int choices, int position, int capacity, float eps, unsigned tag) {
  DYN_SMEM(unsigned char, memory);
  float* work = (float*)(memory + PREFETCH * THREADS * 16);  // for products and attention; at the end, x of all ranks
  float* first = work + larger(THREADS * VEC + 16, larger(WARPS * (D + 2), B * C));
  float *heads = first + B * larger(3 * WIDTH, HIDDEN), *here = heads + B * WIDTH, *x = here + B * OWN;
  Stream stream(layers, memory);
#if HARDWARE_CLUSTERS
  mailbox = (Message*)(x + B * OWN);
  for (int i = threadIdx.x; i < MAILBOX; i += THREADS) mailbox[i] = (Message)(tag - 1) << 32;  // an unused tag
  cluster_barrier<RANKS>();
#else
  mailbox += (size_t)blockIdx.x * MAILBOX;
#endif
  for (int i = threadIdx.x; i < B * OWN; i += THREADS) {  // each element of x is read only by the thread that writes it
    int c = rank() * OWN + i % OWN, token = previous ? max(previous[i / OWN], 0) : tokens.id[i / OWN];
    x[i] = f32(wte[(size_t)token * C + c]) + f32(wpe[(size_t)position * C + c]);
  }
  constexpr int EACH = repeats(B * OWN);
#pragma unroll 1
  for (int half = 0;; half++, tag++) {
    bool mlp = half % 2, end = half == 2 * L;
    const Layer &layer = layers[min(half / 2, L - 1)], &before = layers[max(half - 1, 0) / 2];
    float last_bias[EACH], weight[EACH], bias[EACH];  // loaded before it is needed
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      int c = rank() * OWN + (threadIdx.x + k * THREADS) % OWN;
      last_bias[k] = before.bias[mlp ? PROJECTION : MLP_OUT][c];
      weight[k] = (end ? ln_f_weight : layer.norm[mlp ? 2 : 0])[c];
      bias[k] = (end ? ln_f_bias : layer.norm[mlp ? 3 : 1])[c];
    }
    if (mlp && half / 2 + 1 < L) prefetch_vectors(layers[half / 2 + 1]);
    if (half >= 2 * L - WTE_HALVES && !end) prefetch_wte(wte, half - (2 * L - WTE_HALVES));
    if (!mlp && !end) prefetch_keys(layer.cache, position, capacity);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      int i = threadIdx.x + k * THREADS;
      if (i >= B * OWN) break;
      const Message* entry = results + ((size_t)(half + 3) % 4 * CLUSTERS * B + i / OWN) * C + rank() * OWN + i % OWN;
      if (half)
        x[i] += last_bias[k] + (mlp ? receive_sum<ATTENTION_CLUSTERS>(entry, B * C, tag - 1)
                                    : receive_sum<CLUSTERS>(entry, B * C, tag - 1));
      here[i] = x[i];
    }
    if (!mlp && !end && cluster() >= ATTENTION_CLUSTERS) continue;
    layernorm(here, weight, bias, eps, mailbox, tag);
    if (end) break;
    Message* to = results + (size_t)half % 4 * CLUSTERS * B * C;
    if (mlp)
      half_layer<MLP_IN, MLP_OUT>(stream, layer, here, first, heads, work, to, mailbox, position, capacity, tag);
    else
      half_layer<QKV, PROJECTION>(stream, layer, here, first, heads, work, to, mailbox, position, capacity, tag);
  }
  for (int i = threadIdx.x; i < B * OWN; i += THREADS)
    send_to_cluster(mailbox + TOTALS + i / OWN * C + rank() * OWN + i % OWN, here[i], tag);
  for (int i = threadIdx.x; i < B * C; i += THREADS) work[i] = receive_sum<1>(mailbox + TOTALS + i, 1, tag);
  __syncthreads();
  cp_async_wait<0>();  // nothing is pending: the last matrix has been used
  Choice* best = (Choice*)memory;
  lm_head(logits, best, chosen ? choices : 0, work, wte);
  if (chosen) choose_token(chosen, best, results + (size_t)4 * CLUSTERS * B * C, tag);
}
