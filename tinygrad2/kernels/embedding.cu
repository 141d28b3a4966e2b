#include "common.cuh"
// The embedding of tokens and positions. Compile with -DC, -DCHUNK (below), -DPOSITIONS (0 leaves wpe out), and -DWIDTH, the
// elements of one access: those of 16 bytes, or 1 where C or an address is no multiple of that.

template <class T>
struct alignas(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Part {
  T v[WIDTH];
};
struct Sum {
  float v[WIDTH] = {};

  template <class T>
  __device__ __forceinline__ void add(const Part<T>& p) {
#pragma unroll
    for (int k = 0; k < WIDTH; k++) v[k] += f32(p.v[k]);
  }
  __device__ __forceinline__ void store(float* to) const {
    Part<float> p;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) p.v[k] = v[k];
    *(Part<float>*)to = p;
  }
  __device__ __forceinline__ void add_to(float* to) const {
    Sum sum = *this;
    sum.add(*(const Part<float>*)to);
    sum.store(to);
  }
};

// y[n] = wte[tokens[n]] + wpe[first_position + n % T].
// N = 65536, C = 768, bf16: 0.1 GB read (the tables less often than they are used), 0.1 GB written, 0.05 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_forward(REAL* __restrict__ y, const REAL* __restrict__ wte, const REAL* __restrict__ wpe,
                  const long long* __restrict__ tokens, long long rows, int T, int first_position) {
  long long i = (long long)blockIdx.x * 256 + threadIdx.x, row = i / (C / WIDTH);
  if (row >= rows) return;
  int c = (int)(i % (C / WIDTH)) * WIDTH;
  Part<REAL> part = *(const Part<REAL>*)(wte + tokens[row] * C + c);
  if (POSITIONS) {
    Part<REAL> position = *(const Part<REAL>*)(wpe + (first_position + row % T) * C + c);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) part.v[k] = from_f32<REAL>(f32(part.v[k]) + f32(position.v[k]));
  }
  *(Part<REAL>*)(y + row * C + c) = part;
}

// The gradient of wte: the rows of dy, sorted by token, are cut into chunks of CHUNK however long the runs of equal tokens
// are, so that every block has as much to do. A run inside one chunk is added to dwte there; the pieces of a run that
// crosses a border go to partial (chunks, 2, C): [0] what began in an earlier chunk, [1] what goes on in a later one.
// Every sum is made in the order of the rows.
constexpr int AHEAD = 8;  // rows asked for before the first is added

// The run that holds a sorted row: the last one to begin at or before it.
__device__ __forceinline__ int run_of(const long long* first, int runs, int row) {
  int low = 0, high = runs;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (first[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}
__device__ __forceinline__ int end_of(const long long* first, int runs, int run, int rows) {
  return run + 1 < runs ? (int)first[run + 1] : rows;
}

// dwte[ids[u]] += the sum over run u of dy[order[i]], for the runs inside a chunk.
// N = 65536, C = 768, bf16: 0.1 GB read and, with 15,000 different tokens, 46 MB read and written: 0.05 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward(float* __restrict__ dwte, float* __restrict__ partial, const REAL* __restrict__ dy,
                   const long long* __restrict__ order, const long long* __restrict__ first,
                   const long long* __restrict__ ids, int rows, int runs) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
  if (c >= C) return;
  int start = blockIdx.x * CHUNK, stop = min(start + CHUNK, rows), run = run_of(first, runs, start);
  int end = end_of(first, runs, run, rows);
  bool began_earlier = first[run] < start;
  float* pieces = partial + (size_t)blockIdx.x * 2 * C + c;
  Sum sum;
  for (int i = start; i < stop; i += AHEAD) {
    Part<REAL> ahead[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
      if (i + k < stop) ahead[k] = *(const Part<REAL>*)(dy + order[i + k] * C + c);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      if (i + k >= stop) break;
      sum.add(ahead[k]);
      if (i + k + 1 == end) {
        if (began_earlier) sum.store(pieces);
        else sum.add_to(dwte + ids[run] * C + c);
        sum = Sum();
        began_earlier = false;
        end = end_of(first, runs, ++run, rows);
      }
    }
  }
  if (end > stop) sum.store(began_earlier ? pieces : pieces + C);
}

// dwte[ids[u]] += the pieces of run u, for the run, if any, that begins in this block's chunk and goes on in the next.
// A token that fills all of 65536 rows has 1024 pieces: 3 MB, read by as many threads as there are channels.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward_long(float* __restrict__ dwte, const float* __restrict__ partial,
                        const long long* __restrict__ first, const long long* __restrict__ ids, int rows, int runs) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, chunk = blockIdx.x, next = (chunk + 1) * CHUNK;
  if (c >= C) return;
  int run = run_of(first, runs, next - 1), end = end_of(first, runs, run, rows);
  if (first[run] < chunk * CHUNK || end <= next) return;
  Sum sum;
  sum.add(*(const Part<float>*)(partial + ((size_t)chunk * 2 + 1) * C + c));
#pragma unroll 4
  for (int k = chunk + 1; k * CHUNK < end; k++) sum.add(*(const Part<float>*)(partial + (size_t)k * 2 * C + c));
  sum.add_to(dwte + ids[run] * C + c);
}

// dwpe[first_position + t] += the sum over the batch of dy[b, t].
// B = 64, T = 1024, C = 768, bf16: 0.1 GB read, 0.02 ms.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward_positions(float* __restrict__ dwpe, const REAL* __restrict__ dy, int B, int T, int first_position) {
  int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH, t = blockIdx.x;
  if (c >= C) return;
  Sum sum;
#pragma unroll 8
  for (int b = 0; b < B; b++) sum.add(*(const Part<REAL>*)(dy + ((size_t)b * T + t) * C + c));
  sum.add_to(dwpe + (size_t)(first_position + t) * C + c);
}
