#include "common.cuh"
// The embedding of tokens and positions. Compiled with -DC, -DBLOCK_ROWS (see below), -DPOSITIONS (0: without wpe) and
// -DWIDTH, the number of elements per access: 16 bytes, or 1 element if a row or an address is not a multiple of that.

template <class T>
using Part = Pack<T, WIDTH>;

struct Sum {
  float v[WIDTH] = {};

  template <class T>
  __device__ __forceinline__ void add(Part<T> p) {
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v[k] += p[k];
  }
  __device__ __forceinline__ void add(const Sum& other) { add(Part<float>(other.v)); }
  __device__ __forceinline__ void store(float* to) const { *(Part<float>*)to = Part<float>(v); }
  __device__ __forceinline__ void add_to(float* to) const {
    Sum sum = *this;
    sum.add(*(const Part<float>*)to);
    sum.store(to);
  }
};

// y[n] = wte[tokens[n]] + wpe[first_position + n % T].
// N = 65536, C = 768, bf16: 0.1 GB read (rows that are reused come from the cache), 0.1 GB written, 0.05 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_forward(REAL* __restrict__ y, const REAL* __restrict__ wte, const REAL* __restrict__ wpe,
                  const long long* __restrict__ tokens, int rows, int T, int first_position) {
  constexpr int PARTS = C / WIDTH;  // per row
  long long i = (long long)blockIdx.x * 256 + threadIdx.x;
  int row = (int)(i / PARTS), c = (int)(i % PARTS) * WIDTH;
  if (row >= rows) return;
  Part<REAL> part = *(const Part<REAL>*)(wte + tokens[row] * C + c);
  if (POSITIONS) {
    Part<REAL> position = *(const Part<REAL>*)(wpe + (size_t)(first_position + row % T) * C + c);
    float sum[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) sum[k] = part[k] + position[k];
    part = Part<REAL>(sum);
  }
  *(Part<REAL>*)(y + (size_t)row * C + c) = part;
}

// The gradient of wte. The rows of dy, sorted by token, are split into chunks of BLOCK_ROWS rows, regardless of the
// runs of equal tokens, so that all blocks have the same amount of work. The sum of a run within one chunk is added to
// dwte directly. For a run that crosses a boundary, partial sums are written to partial (chunks, 2, C): index 0 for a
// run that began in an earlier chunk, index 1 for a run that continues in a later chunk. Rows are added in order.
constexpr int AHEAD = 8;  // rows that are loaded before the first is added
constexpr int MAX_RUN = 1024;  // maximum number of terms added sequentially; more would accumulate rounding errors

// dwte[t] += sum of dy[order[i]] over the run of rows i with tokens[i] = t, for runs within one chunk.
// N = 65536, C = 768, bf16: 0.1 GB read and, with 15,000 distinct tokens, 46 MB read and written: 0.05 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward(float* __restrict__ dwte, float* __restrict__ partial, const REAL* __restrict__ dy,
                   const long long* __restrict__ order, const long long* __restrict__ tokens, int rows) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
  if (c >= C) return;
  int start = blockIdx.x * BLOCK_ROWS, stop = min(start + BLOCK_ROWS, rows);
  bool began_earlier = start > 0 && tokens[start - 1] == tokens[start], continues_later = false;
  float* pieces = partial + (size_t)blockIdx.x * 2 * C + c;
  Sum sum;
  for (int i = start; i < stop; i += AHEAD) {
    Part<REAL> ahead[AHEAD];
    long long token[AHEAD + 1];
#pragma unroll
    for (int k = 0; k <= AHEAD; k++) token[k] = i + k < rows ? tokens[i + k] : -1;
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (i + k < stop) ahead[k] = *(const Part<REAL>*)(dy + order[i + k] * C + c);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      if (i + k >= stop) break;
      sum.add(ahead[k]);
      continues_later = token[k] == token[k + 1];
      if (continues_later) continue;
      if (began_earlier) sum.store(pieces);
      else sum.add_to(dwte + token[k] * C + c);
      sum = Sum();
      began_earlier = false;
    }
  }
  if (continues_later) sum.store(began_earlier ? pieces : pieces + C);
}

// dwte[t] += sum of the partial sums of the run, if any, that begins in this block's chunk and continues in the next
// one. If all 65536 rows have the same token, there are 1024 partial sums: 3 MB, read by one thread per channel.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward_long(float* __restrict__ dwte, const float* __restrict__ partial,
                        const long long* __restrict__ tokens, int rows) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, start = blockIdx.x * BLOCK_ROWS, next = start + BLOCK_ROWS;
  long long token = tokens[next - 1];
  if (c >= C || tokens[next] != token || start > 0 && tokens[start - 1] == token) return;
  Sum sum, run;
  run.add(*(const Part<float>*)(partial + ((size_t)blockIdx.x * 2 + 1) * C + c));
  int terms = 0;
  for (bool more = true; more; next += AHEAD * BLOCK_ROWS) {
    Part<float> ahead[AHEAD];
    bool same_token[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) same_token[k] = next + k * BLOCK_ROWS < rows && tokens[next + k * BLOCK_ROWS] == token;
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (same_token[k]) ahead[k] = *(const Part<float>*)(partial + (size_t)(next / BLOCK_ROWS + k) * 2 * C + c);
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (same_token[k]) run.add(ahead[k]);
    more = same_token[AHEAD - 1];
    terms += AHEAD;
    if (terms == MAX_RUN || !more) {
      sum.add(run);
      run = Sum();
      terms = 0;
    }
  }
  sum.add_to(dwte + token * C + c);
}

// dwpe[first_position + t] += sum of dy[b, t] over the batch.
// B = 64, T = 1024, C = 768, bf16: 0.1 GB read, 0.02 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward_positions(float* __restrict__ dwpe, const REAL* __restrict__ dy, int B, int T, int first_position) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, t = blockIdx.x;
  if (c >= C) return;
  Sum sum;
  for (int first = 0; first < B; first += MAX_RUN) {
    Sum run;
    int end = min(first + MAX_RUN, B);
#pragma unroll 8
    for (int b = first; b < end; b++) run.add(*(const Part<REAL>*)(dy + ((size_t)b * T + t) * C + c));
    sum.add(run);
  }
  sum.add_to(dwpe + (size_t)(first_position + t) * C + c);
}
