// What the attention kernels on tensor cores share. D is the head size, a multiple of 16 up to 128. A tile is some rows of
// queries, keys, values or their gradients in shared memory, LD numbers from row to row. Included after
// common.cuh.
constexpr int LD = D + 8;  // 16 bytes more than D: the 8 rows of a matrix that ldmatrix reads fall in distinct banks
static_assert(D % 16 == 0 && D <= 128, "a head size that the tensor cores' tiles divide");

__device__ __forceinline__ unsigned pack(float low, float high) {
  union {
    bf16 half[2];
    unsigned word;
  } p;
  p.half[0] = from_f32<bf16>(low);
  p.half[1] = from_f32<bf16>(high);
  return p.word;
}

// Start copying rows first ... first + ROWS - 1 of a (T, D) matrix, `stride` apart, to a tile; rows from T on are zeros.
// All THREADS threads of the block take part; cp_async_commit, cp_async_wait and __syncthreads are the caller's.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* matrix, int first, int T, size_t stride) {
  constexpr int CHUNKS = D / 8;  // of 16 bytes, a row
#pragma unroll
  for (int start = 0; start < ROWS * CHUNKS; start += THREADS) {
    int chunk = start + threadIdx.x, row = chunk / CHUNKS, col = chunk % CHUNKS * 8;
    if (ROWS * CHUNKS % THREADS && chunk >= ROWS * CHUNKS) break;
    if (first + row < T)
      cp_async16(tile + row * LD + col, matrix + (size_t)(first + row) * stride + col);
    else
      *(uint4*)(tile + row * LD + col) = make_uint4(0, 0, 0, 0);
  }
}

// The left factor of an mma: rows row ... row + 15 and columns col ... col + 15 of a tile.
__device__ __forceinline__ void left_factor(unsigned (&a)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile + (row + lane % 16) * LD + col + lane / 16 * 8);
}
// The right factors of two mmas side by side, words 0 and 1 and words 2 and 3, for a product with the *transposed* tile:
// k are its columns col ... col + 15, n its rows row ... row + 15.
__device__ __forceinline__ void right_factor_of_transposed(unsigned (&b)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(b, tile + (row + lane % 8 + lane / 16 * 8) * LD + col + lane / 8 % 2 * 8);
}
// The same for a product with the tile as it stands: k are its rows, n its columns.
__device__ __forceinline__ void right_factor(unsigned (&b)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, tile + (row + lane % 16) * LD + col + lane / 16 * 8);
}

// Dropout on the (B, H, T, T) attention weights, the CPU's bits: element e takes word e % 4 of group e / 4, and is kept
// if that is at least `threshold`, the rate times 2^32.
__device__ __forceinline__ bool dropout_keeps(const PhiloxKey& key, unsigned threshold, unsigned long long element) {
  uint4 words = philox(key, element / 4);
  unsigned word = element % 4;
  return (word < 2 ? word ? words.y : words.x : word == 2 ? words.z : words.w) >= threshold;
}
// The same for the result of an mma, 16 rows of queries by 8 columns of keys, of which lane l holds, as numbers 0 to 3,
// columns 2 (l % 4) and the next of row l / 4, then of row l / 4 + 8: bit i is set where number i is kept. `corner` is
// the index of the element at the top left; its column is a multiple of 4. For whole warps.
__device__ __forceinline__ unsigned dropout_keeps_fragment(const PhiloxKey& key, unsigned threshold,
                                                           unsigned long long corner, int T) {
  int lane = threadIdx.x % 32, odd = lane % 2;
  unsigned kept = 0;
  if (T % 4 == 0) {  // a pair of lanes shares two groups, one a row: each draws one, and they swap halves
    uint4 words = philox(key, (corner + (unsigned long long)(lane / 4 + 8 * odd) * T + lane % 4 / 2 * 4) / 4);
    unsigned mine = (words.x >= threshold) | (words.y >= threshold) << 1 | (words.z >= threshold) << 2 |
                    (words.w >= threshold) << 3;
    unsigned other = __shfl_xor_sync(0xffffffffu, mine, 1);
    kept = odd ? (mine & 12) | other >> 2 : (mine & 3) | (other & 3) << 2;
  } else {
#pragma unroll 1  // rare, and the code is long
    for (int i = 0; i < 4; i++) {
      unsigned long long row = lane / 4 + i / 2 * 8;
      kept |= (unsigned)dropout_keeps(key, threshold, corner + row * T + lane % 4 * 2 + i % 2) << i;
    }
  }
  return kept;
}
// The same for the transposed result, 16 rows of keys by 8 columns of queries; `corner` as above.
__device__ __forceinline__ unsigned dropout_keeps_transposed(const PhiloxKey& key, unsigned threshold,
                                                             unsigned long long corner, int T) {
  int lane = threadIdx.x % 32;
  unsigned kept = 0;
  if (T % 4 == 0) {  // four lanes, 4 apart, share four groups: each draws one, and all look there for their bit
    int mine = lane / 4 % 4;
    unsigned long long query = lane % 4 * 2 + mine % 2;
    uint4 words = philox(key, (corner + query * T + lane / 16 * 4 + mine / 2 * 8) / 4);
    unsigned group = (words.x >= threshold) | (words.y >= threshold) << 1 | (words.z >= threshold) << 2 |
                     (words.w >= threshold) << 3;
#pragma unroll
    for (int i = 0; i < 4; i++)
      kept |= (__shfl_sync(0xffffffffu, group, lane / 16 * 16 + i * 4 + lane % 4) >> mine & 1) << i;
  } else {
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
      unsigned long long query = lane % 4 * 2 + i % 2;
      kept |= (unsigned)dropout_keeps(key, threshold, corner + query * T + lane / 4 + i / 2 * 8) << i;
    }
  }
  return kept;
}
