#include "common.cuh"
#include "gelu.cuh"
// One token of GPT-2 for each of B texts, from the token's number to the logits, in one launch.
//
// A token reads every weight once and computes two operations on it, so the memory's rate is the limit: 124M in bf16 is
// 248 MB, 58 us at 4.3 TB/s. As one launch an operation it would take several times that, since each of 100 kernels
// starts with empty hands. Here the blocks live through the whole model, and the time goes into telling each other what
// they found: all of them twice a layer, those of a team up to four times in between.
//
// A team is RANKS blocks: where there are thread block clusters (compute capability 9), one of these, whose blocks write
// to each other's shared memory. The block of some rank in each team keeps C / RANKS columns of the residual stream x, its
// own; so all blocks of a rank hold the same numbers. A team has HEADS heads and HIDDEN columns of the MLP. Half a layer,
// attention or MLP, is:
//
//   x += what all teams found in the half before, for the own columns
//   LayerNorm of the own columns, with mean and squares of the team
//   own columns x the team's columns of the first matrix, added up in the team
//   attention of the team's heads, each block with some of the keys; or GELU (a form of gelu.cuh)
//   this x the own columns of the second matrix: what the team found
//
// Numbers travel in letters of 8 bytes: a float32 and a mark that no earlier letter to the same place had. Who sees the
// mark has the number: there is no barrier of all blocks, no fence. Before a place is written again, its readers have
// sent another letter, after reading, that the writer waited for. (Teams without heads send none in attention: what goes
// to all teams has places for four halves, two of each kind, which take turns.)
//
// Weights do not wait. Each block knows which parts of all matrices are its own, and copies them to shared memory AHEAD
// accesses before it needs them (Stream): who waits for a letter finds the next matrix there.
//
// Sums are f32, in an order that never changes, and nothing is rounded in between but keys and values, as the cache holds
// them. All blocks have to run at the same time, so there may be no more than the GPU has room for.
constexpr int THREADS = 512, WARPS = THREADS / 32, BLOCKS = TEAMS * RANKS, D = C / H, OWN = C / RANKS;
constexpr int WIDTH = HEADS * D;                        // columns of a team's heads
constexpr int ATTENDING = (H + HEADS - 1) / HEADS;      // teams that have heads
constexpr int VEC = Pack<REAL>::N;
using Access = Pack<REAL, VEC>;
constexpr int TURNS = B <= 2 ? 2 : 1;  // accesses that a thread has in registers
constexpr int EARLY = 3;               // halves of layers before the end, in which the first rows of wte come to L2
enum { QKV, PROJECTION, MLP_IN, MLP_OUT, MATRICES };

#if !IN_CLUSTERS  // inlined, it would have registers spill on sm_80
#define ATTEND __noinline__
#else
#define ATTEND __forceinline__
#endif
#if IN_CLUSTERS
#define TEAM __cluster_dims__(RANKS, 1, 1)
#else
#define TEAM
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
constexpr int repeats(int numbers) { return (numbers + THREADS - 1) / THREADS; }  // where each thread takes one at a time
constexpr __host__ __device__ bool first_of_half(int matrix) { return matrix == QKV || matrix == MLP_IN; }
constexpr __host__ __device__ int inputs(int matrix) { return matrix == MLP_OUT ? 4 * C : C; }
constexpr __host__ __device__ int outputs(int matrix) { return matrix == QKV ? 3 * C : matrix == MLP_IN ? 4 * C : C; }
// A block's part of a matrix, and how its threads go through it: `at_once` rows at a time, so many times.
constexpr __host__ __device__ int rows(int matrix) {
  return first_of_half(matrix) ? OWN : matrix == PROJECTION ? WIDTH : HIDDEN;
}
constexpr __host__ __device__ int columns(int matrix) {
  return matrix == QKV ? 3 * WIDTH : matrix == MLP_IN ? HIDDEN : OWN;
}
constexpr __host__ __device__ int at_once(int matrix) { return THREADS / (columns(matrix) / VEC); }
constexpr __host__ __device__ int slots(int columns) { return (columns + RANKS - 1) / RANKS; }  // that a block adds up
constexpr __host__ __device__ int turns(int matrix) { return (rows(matrix) + at_once(matrix) - 1) / at_once(matrix); }

// Places of letters that a block receives from its team.
constexpr int SQUARES = 0, SUMS = SQUARES + B * RANKS * 2;
constexpr int WHOLE = SUMS + RANKS * B * slots(larger(3 * WIDTH, HIDDEN));
constexpr int FOUND = WHOLE + B * larger(larger(3 * WIDTH, HIDDEN), C);
constexpr int PLACES = FOUND + RANKS * B * HEADS * (D + 2);

__device__ __forceinline__ int rank() { return blockIdx.x % RANKS; }
__device__ __forceinline__ int team() { return blockIdx.x / RANKS; }

// A number and a mark, in one access of 8 bytes, which goes past L1.
typedef unsigned long long Letter;
__device__ __forceinline__ void send(Letter* place, float number, unsigned mark) {
  *(volatile Letter*)place = (Letter)mark << 32 | __float_as_uint(number);
}
// Whether a letter with this mark has arrived, and its number.
__device__ __forceinline__ bool arrived(const Letter* place, unsigned mark, float& number) {
  Letter letter = *(const volatile Letter*)place;
  number = __uint_as_float((unsigned)letter);
  return (unsigned)(letter >> 32) == mark;
}

// A place among the letters of another block of the team.
__device__ __forceinline__ Letter* letters_of(Letter* place, int to) {
#if IN_CLUSTERS
  return in_block<RANKS>(place, to);
#else
  return place + (to - rank()) * PLACES;
#endif
}
__device__ __forceinline__ void tell_team(Letter* place, float number, unsigned mark) {
#pragma unroll
  for (int to = 0; to < RANKS; to++) send(letters_of(place, to), number, mark);
}
// The numbers of N letters, `stride` places from each other.
template <int N>
__device__ __forceinline__ void receive(float (&number)[N], const Letter* place, int stride, unsigned mark) {
  for (unsigned looks = 0;; looks++) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; i++) all &= arrived(place + i * stride, mark, number[i]);
    if (all) return;
    wait_a_little();
    if (looks >> 26) __trap();  // after seconds: a GPU that hangs is worse than an error
  }
}
template <int N>
__device__ __forceinline__ float receive_sum(const Letter* place, int stride, unsigned mark) {
  float number[N], sum = 0.f;
  receive(number, place, stride, mark);
#pragma unroll
  for (int i = 0; i < N; i++) sum += number[i];
  return sum;
}

// What one thread has of a block's part of a matrix: rows first, first + at_once, ..., in VEC columns.
struct Share {
  int first, last, column;  // of the whole matrix; there are rows where first < last
  __device__ __forceinline__ explicit Share(int matrix) {
    int lane = threadIdx.x % (columns(matrix) / VEC) * VEC, row = threadIdx.x / (columns(matrix) / VEC), end;
    bool idle = row >= at_once(matrix);
    if (first_of_half(matrix)) {
      first = rank() * OWN;
      last = first + OWN;
      column = matrix == QKV ? team() * WIDTH + lane % WIDTH : team() * HIDDEN + lane;
      end = matrix == QKV ? C : 4 * C;  // of the last team
      idle |= column >= end;
      if (matrix == QKV) column += lane / WIDTH * C;
    } else {
      first = team() * rows(matrix);
      last = min(first + rows(matrix), inputs(matrix));
      column = rank() * OWN + lane;
    }
    first += row;
    if (idle) last = 0;
  }
};

// How a thread goes through a block's part of a matrix; divisions, which take longer than some accesses.
struct Way {
  int first, stride;  // where it begins, and goes on in the next turn
  int turns, rows;    // of the block, and those in which this thread has a row
  __device__ __forceinline__ explicit Way(int matrix)
      : stride(at_once(matrix) * outputs(matrix)), turns(::turns(matrix)) {
    Share share(matrix);
    first = share.first * outputs(matrix) + share.column;
    rows = max(share.last - share.first + at_once(matrix) - 1, 0) / at_once(matrix);
  }
};

// The block's parts of all matrices, one after the other, on their way to shared memory. A thread copies what it will
// use itself, so it needs to wait for no other one.
struct Stream {
  const Layer* layers;
  Access* ring;  // AHEAD accesses of each thread
  const Way qkv, projection, mlp_in, mlp_out;
  const REAL *weight, *next;  // of the next access, and the matrix that follows
  int stage, slot, left, rows, stride;
  __device__ Stream(const Layer* layers, void* memory)
      : layers(layers), ring((Access*)memory + threadIdx.x), qkv(QKV), projection(PROJECTION), mlp_in(MLP_IN),
        mlp_out(MLP_OUT), stage(team() < ATTENDING ? QKV : MLP_IN), slot(0), left(0) {
    next = layers->matrix[stage];
    fetch(AHEAD);
  }
  __device__ __forceinline__ void fetch(int count) {
#pragma unroll 1
    for (; count; count--) {
      if (!left && stage < L * MATRICES) {
        int matrix = stage % MATRICES;
        Way way = matrix == QKV ? qkv : matrix == PROJECTION ? projection : matrix == MLP_IN ? mlp_in : mlp_out;
        weight = next + way.first;
        stride = way.stride;
        left = way.turns;
        rows = way.rows;
        if (++stage % MATRICES == QKV && team() >= ATTENDING) stage += 2;
        if (stage < L * MATRICES) next = layers[stage / MATRICES].matrix[stage % MATRICES];  // asked for early
      }
      if (left) {
        cp_async16(ring + slot, weight, rows-- > 0 ? 16 : 0);
        weight += stride;
        left--;
      }
      cp_async_commit();  // empty ones too: which copy is awaited is told by counting
      slot = slot + THREADS == AHEAD * THREADS ? 0 : slot + THREADS;
    }
  }
};

// found(b, column, sum): the block's part of y = x W, a column after the other. x (B, rows) in shared memory.
template <int MATRIX, class Use>
__device__ __forceinline__ void product(Stream& stream, const float* x, float* memory, Use found) {
  constexpr int COLUMNS = columns(MATRIX), STEP = at_once(MATRIX), ROWS = rows(MATRIX), ALL = turns(MATRIX);
  constexpr int PART = ALL < AHEAD / 2 ? ALL : AHEAD / 2;  // turns whose weights are awaited together
  constexpr int LANES = COLUMNS / VEC, PLANE = THREADS * 4 + 16;  // of 4 columns each: no two meet in a bank
  Share share(MATRIX);
  x -= (first_of_half(MATRIX) ? rank() : team()) * ROWS;
  float y[B][VEC] = {};
#pragma unroll 1
  for (int turn = 0; turn < ALL; turn += PART) {
    if (turn) stream.fetch(PART);
    cp_async_wait<AHEAD - PART>();
    int slot = stream.slot;
#pragma unroll TURNS
    for (int i = turn; i < min(turn + PART, ALL); i++) {
      Access w = stream.ring[slot];  // zeros where there is no row
#pragma unroll
      for (int b = 0; b < B; b++) {
        float factor = share.first < share.last ? x[b * ROWS + share.first] : 0.f;
#pragma unroll
        for (int e = 0; e < VEC; e++) y[b][e] += factor * w[e];
      }
      share.first += STEP;
      slot = slot + THREADS == AHEAD * THREADS ? 0 : slot + THREADS;
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
      found(b, c, even + odd);
    }
    if (b + 1 < B) __syncthreads();  // after the last one, the caller's
  }
  stream.fetch(ALL - (ALL - 1) / PART * PART);  // others wait for the sums, not for this
}

// LayerNorm of the own columns (B, OWN) in shared memory, each thread those that it put there.
__device__ __forceinline__ void normalise(float* here, const float (&weight)[repeats(B * OWN)],
                                          const float (&bias)[repeats(B * OWN)], float eps, Letter* letters,
                                          unsigned mark) {
  int lane = threadIdx.x % 32, text = threadIdx.x / 32;
  __syncthreads();
  if (text < B) {  // its mean and squares in the block; the differences from one of the numbers lose no digits
    float origin = here[text * OWN], sum = 0.f, squares = 0.f;
    for (int c = lane; c < OWN; c += 32) {
      float x = here[text * OWN + c] - origin;
      sum += x;
      squares += x * x;
    }
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    if (lane < RANKS) {
      Letter* place = letters_of(letters + SQUARES + (text * RANKS + rank()) * 2, lane);
      send(place, origin + sum * (1.f / OWN), mark);
      send(place + 1, squares - sum * sum * (1.f / OWN), mark);
    }
  }
#pragma unroll
  for (int k = 0; k < repeats(B * OWN); k++) {
    int i = threadIdx.x + k * THREADS;
    if (i >= B * OWN) break;
    float of[RANKS * 2], mean = 0.f, squares = 0.f;  // of the blocks
    receive(of, letters + SQUARES + i / OWN * RANKS * 2, 1, mark);
#pragma unroll
    for (int r = 0; r < RANKS; r++) mean += of[2 * r] * (1.f / RANKS);
#pragma unroll
    for (int r = 0; r < RANKS; r++) squares += of[2 * r + 1] + OWN * (of[2 * r] - mean) * (of[2 * r] - mean);
    here[i] = (here[i] - mean) * rsqrtf(squares * (1.f / C) + eps) * weight[k] + bias[k];
  }
  __syncthreads();
}

// Attention of the tokens at `position`, a block the keys at rank, rank + RANKS, ...; first (B, 3, WIDTH) are queries,
// keys and values. Each head's result of the block goes to the team: D values, the largest score, and the sum.
__device__ ATTEND void attend(const float* first, REAL* cache, float* memory, int position, int capacity,
                                       Letter* letters, unsigned mark) {
  constexpr int PACKS = D / VEC, GROUP = PACKS <= 8 ? 8 : PACKS <= 16 ? 16 : 32, EACH = (PACKS + GROUP - 1) / GROUP;
  constexpr int GROUPS = THREADS / GROUP;
  int group = threadIdx.x / GROUP, member = threadIdx.x % GROUP, count = (position - rank() + RANKS) / RANKS;
  for (int unit = 0; unit < B * HEADS; unit++) {
    int b = unit / HEADS, head = team() * HEADS + unit % HEADS;
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
    for (int start = 0; start < count; start += GROUPS) {  // the same for all threads, which meet in the shuffles
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
      score *= 1.4426950408889634f * rsqrtf((float)D);  // to base 2
      float common = fmaxf(largest, score), shrink = exp2f(largest - common), p_i = exp2f(score - common);
      largest = common;
      total = total * shrink + p_i;
#pragma unroll
      for (int p = 0; p < EACH; p++)
#pragma unroll
        for (int e = 0; e < VEC; e++) sum[p][e] = sum[p][e] * shrink + p_i * v[p][e];
    }
    // The groups of a warp, then the warps.
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
      tell_team(letters + FOUND + (rank() * B * HEADS + unit) * (D + 2) + d, d == D ? common : y, mark);
    }
    if (rank() == position % RANKS)  // for the tokens to come
      for (int i = threadIdx.x; i < 2 * D; i += THREADS)
        (i < D ? keys : values)[(size_t)position * D + i % D] = from_f32<REAL>(i < D ? key[i] : value[i - D]);
  }
}

// heads (B, WIDTH): attention's results, from what the blocks of the team found.
__device__ __forceinline__ void join(float* heads, const Letter* letters, unsigned mark) {
  constexpr int STRIDE = B * HEADS * (D + 2);
  for (int i = threadIdx.x; i < B * WIDTH; i += THREADS) {
    int unit = i / D;
    if (team() * HEADS + unit % HEADS >= H) continue;
    const Letter* place = letters + FOUND + unit * (D + 2);
    float value[RANKS], largest[RANKS], total[RANKS], common = NEG_INF, below = 0.f, y = 0.f;
    receive(value, place + i % D, STRIDE, mark);
    receive(largest, place + D, STRIDE, mark);
    receive(total, place + D + 1, STRIDE, mark);
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

// The largest of some logits and its token, of equal ones the first. A logit that is no finite number is larger than all,
// and its token -1.
struct Choice {
  float logit, token;
  __device__ __forceinline__ void none() { logit = NEG_INF, token = 1e9f; }
  __device__ __forceinline__ void meet(float other, float its_token) {
    if (other > logit || (other == logit && its_token < token)) logit = other, token = its_token;
  }
};

// logits (B, V) = x wte^T, some rows of wte a warp, where they are wanted; best (B, WARPS): of the warps' shares of the
// first `choices` tokens.
__device__ __forceinline__ void vocabulary(float* logits, Choice* best, int choices, const float* x, const REAL* wte) {
  constexpr int AT_ONCE = B <= 4 ? 4 : 2;  // what the registers hold
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
        if (v + r < choices) best[b * WARPS].meet(finite ? sum : -NEG_INF, finite ? v + r : -1);
      }
  }
}

// The likeliest token of each text: a warp a text, first of the block, then, having been told by all, of the GPU.
__device__ __forceinline__ void choose(int* likeliest, const Choice* best, Letter* letters, unsigned mark) {
  __syncthreads();
  int b = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (b >= B) return;
  auto of_warp = [](Choice choice) {
#pragma unroll
    for (int o = 16; o; o >>= 1)
      choice.meet(__shfl_xor_sync(0xffffffffu, choice.logit, o), __shfl_xor_sync(0xffffffffu, choice.token, o));
    return choice;
  };
  Choice choice = of_warp(best[b * WARPS + lane % WARPS]);
  letters += b * BLOCKS * 2;
  if (lane == 0) {
    send(letters + blockIdx.x * 2, choice.logit, mark);
    send(letters + blockIdx.x * 2 + 1, choice.token, mark);
  }
  if (blockIdx.x) return;
  choice.none();
  for (int i = lane; i < BLOCKS; i += 32) {
    float other[2];
    receive(other, letters + i * 2, 1, mark);
    choice.meet(other[0], other[1]);
  }
  choice = of_warp(choice);
  if (lane == 0) likeliest[b] = choice.token;
}

// Bring to L2 what will be wanted at once: by all blocks, a vector of a layer to come (each block some lines of it);
// by this one, its keys and values.
__device__ __forceinline__ void warm(const Layer& layer) {
  constexpr int LINE = 32;  // numbers
  int at = (blockIdx.x + BLOCKS * (THREADS - 1 - threadIdx.x)) * LINE;  // the first warps have letters to wait for
#pragma unroll
  for (int i = 0; i < MATRICES + 4; i++) {
    int size = i < MATRICES ? outputs(i) : C;
    if (at >= 0 && at < size) prefetch_l2((i < MATRICES ? layer.bias[i % MATRICES] : layer.norm[i % 4]) + at);
    at -= (size + LINE - 1) / LINE * LINE;
  }
}
__device__ __forceinline__ void warm_vocabulary(const REAL* wte, int step) {
  constexpr int LINE = 128 / sizeof(REAL);
  size_t at = ((size_t)(step * BLOCKS + blockIdx.x) * THREADS + threadIdx.x) * LINE;
  if (at < (size_t)V * C) prefetch_l2(wte + at);
}
__device__ __forceinline__ void warm_keys(const REAL* cache, int position, int capacity) {
  for (int i = rank() + (THREADS - 1 - threadIdx.x) / 2 * RANKS; i < position; i += THREADS / 2 * RANKS)
    for (int unit = 0; unit < B * HEADS; unit++) {
      int head = team() * HEADS + unit % HEADS;
      if (head >= H) continue;
      size_t text = (size_t)(threadIdx.x % 2 * B + unit / HEADS) * H;  // keys, then values
      prefetch_l2(cache + ((text + head) * capacity + i) * D);
    }
}

// Half a layer for what a team has of it: FIRST and SECOND are its matrices, here (B, OWN) is what LayerNorm gave.
template <int FIRST, int SECOND>
__device__ __forceinline__ void half_layer(Stream& stream, const Layer& layer, const float* here, float* first,
                                           float* heads, float* work, Letter* found, Letter* letters, int position,
                                           int capacity, unsigned mark) {
  constexpr int COLUMNS = columns(FIRST), SLOTS = slots(COLUMNS);
  float bias[repeats(B * SLOTS)];  // asked for before it is needed
#pragma unroll
  for (int k = 0; k < repeats(B * SLOTS); k++) {
    int c = rank() * SLOTS + (threadIdx.x + k * THREADS) % SLOTS, within = FIRST == QKV ? c % WIDTH : c;
    int column = team() * (FIRST == QKV ? WIDTH : HIDDEN) + within;
    bias[k] = c < COLUMNS && column < inputs(SECOND) ? layer.bias[FIRST][column + (c - within) / WIDTH * C] : 0.f;
  }
  // Each block adds up some of the columns and tells the team: two ways, but an eighth of the letters.
  Letter *sums = letters + SUMS, *whole = letters + WHOLE;
  product<FIRST>(stream, here, work, [&](int b, int c, float sum) {
    send(letters_of(sums + (rank() * B + b) * SLOTS + c % SLOTS, c / SLOTS), sum, mark);
  });
#pragma unroll
  for (int k = 0; k < repeats(B * SLOTS); k++) {
    int i = threadIdx.x + k * THREADS, c = rank() * SLOTS + i % SLOTS;
    if (i >= B * SLOTS || c >= COLUMNS) continue;
    float y = receive_sum<RANKS>(sums + i, B * SLOTS, mark) + bias[k];
    tell_team(whole + i / SLOTS * COLUMNS + c, FIRST == QKV ? y : GELU::value(y), mark);
  }
  for (int i = threadIdx.x; i < B * COLUMNS; i += THREADS) first[i] = receive_sum<1>(whole + i, 1, mark);
  __syncthreads();
  if (FIRST == QKV) {
    attend(first, layer.cache, work, position, capacity, letters, mark);
    join(heads, letters, mark);
  }
  product<SECOND>(stream, FIRST == QKV ? heads : first, work, [&](int b, int c, float sum) {
    send(found + ((size_t)team() * B + b) * C + rank() * OWN + c, sum, mark);
  });
}

// The tokens are `previous` (B), what an earlier launch chose, or where that is null `tokens`; they stand at `position` in
// their texts. Either logits (B, V) or likeliest (B), among the first `choices` tokens, may be null.
// found (4, TEAMS, B, C): letters to all blocks of a rank, and then (B, BLOCKS, 2) to the first block. letters (BLOCKS,
// PLACES): those of teams that are no clusters. mark: of the launch's first letters; the 2 L after it are its too.
extern "C" __global__ void __launch_bounds__(THREADS, 1) TEAM
decode(float* logits, int* likeliest, const int* previous, const Layer* layers, const REAL* wte, const REAL* wpe,
       const float* ln_f_weight, const float* ln_f_bias, Letter* found, Letter* letters,
       const __grid_constant__ Tokens tokens, int choices, int position, int capacity, float eps, unsigned mark) {
  DYN_SMEM(unsigned char, memory);
  float* work = (float*)(memory + AHEAD * THREADS * 16);  // of products and attention; last, x of all ranks
  float* first = work + larger(THREADS * VEC + 16, larger(WARPS * (D + 2), B * C));
  float *heads = first + B * larger(3 * WIDTH, HIDDEN), *here = heads + B * WIDTH, *x = here + B * OWN;
  Stream stream(layers, memory);
#if IN_CLUSTERS
  letters = (Letter*)(x + B * OWN);
  for (int i = threadIdx.x; i < PLACES; i += THREADS) letters[i] = (Letter)(mark - 1) << 32;  // no mark of this launch
  cluster_barrier<RANKS>();
#else
  letters += (size_t)blockIdx.x * PLACES;
#endif
  for (int i = threadIdx.x; i < B * OWN; i += THREADS) {  // whose x no other thread asks for
    int c = rank() * OWN + i % OWN, token = previous ? max(previous[i / OWN], 0) : tokens.id[i / OWN];
    x[i] = f32(wte[(size_t)token * C + c]) + f32(wpe[(size_t)position * C + c]);
  }
  constexpr int EACH = repeats(B * OWN);
#pragma unroll 1
  for (int half = 0;; half++, mark++) {
    bool mlp = half % 2, end = half == 2 * L;
    const Layer &layer = layers[min(half / 2, L - 1)], &before = layers[max(half - 1, 0) / 2];
    float last_bias[EACH], weight[EACH], bias[EACH];  // asked for before it is needed
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      int c = rank() * OWN + (threadIdx.x + k * THREADS) % OWN;
      last_bias[k] = before.bias[mlp ? PROJECTION : MLP_OUT][c];
      weight[k] = (end ? ln_f_weight : layer.norm[mlp ? 2 : 0])[c];
      bias[k] = (end ? ln_f_bias : layer.norm[mlp ? 3 : 1])[c];
    }
    if (mlp && half / 2 + 1 < L) warm(layers[half / 2 + 1]);
    if (half >= 2 * L - EARLY && !end) warm_vocabulary(wte, half - (2 * L - EARLY));
    if (!mlp && !end) warm_keys(layer.cache, position, capacity);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      int i = threadIdx.x + k * THREADS;
      if (i >= B * OWN) break;
      const Letter* place = found + ((size_t)(half + 3) % 4 * TEAMS * B + i / OWN) * C + rank() * OWN + i % OWN;
      if (half)
        x[i] += last_bias[k] + (mlp ? receive_sum<ATTENDING>(place, B * C, mark - 1)
                                    : receive_sum<TEAMS>(place, B * C, mark - 1));
      here[i] = x[i];
    }
    if (!mlp && !end && team() >= ATTENDING) continue;
    normalise(here, weight, bias, eps, letters, mark);
    if (end) break;
    Letter* to = found + (size_t)half % 4 * TEAMS * B * C;
    if (mlp)
      half_layer<MLP_IN, MLP_OUT>(stream, layer, here, first, heads, work, to, letters, position, capacity, mark);
    else
      half_layer<QKV, PROJECTION>(stream, layer, here, first, heads, work, to, letters, position, capacity, mark);
  }
  for (int i = threadIdx.x; i < B * OWN; i += THREADS)
    tell_team(letters + WHOLE + i / OWN * C + rank() * OWN + i % OWN, here[i], mark);
  for (int i = threadIdx.x; i < B * C; i += THREADS) work[i] = receive_sum<1>(letters + WHOLE + i, 1, mark);
  __syncthreads();
  cp_async_wait<0>();  // of nothing: the last matrix has been used
  Choice* best = (Choice*)memory;
  vocabulary(logits, best, likeliest ? choices : 0, work, wte);
  if (likeliest) choose(likeliest, best, found + (size_t)4 * TEAMS * B * C, mark);
}
