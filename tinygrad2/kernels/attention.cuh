// Shared by the tensor-core attention kernels; included after common.cuh. D is the head size, a multiple of 16 up to
// 128. A tile is a block of rows of queries, keys, values or their gradients in shared memory, with row stride LD.
constexpr int LD = D + 8;  // 16 bytes of padding, so that the 8 rows of an ldmatrix matrix are in different banks
static_assert(D % 16 == 0 && D <= 128, "the head size must be a multiple of 16 up to 128");

// The index of the warp. The shuffle tells the compiler that it is the same in all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

// The head and the tile of this block, in a grid of all tiles of all heads. Blocks start in index order. Heads are
// therefore processed in groups whose streamed matrices, two (T, D) per head, fit in the L2 cache; in each group, tile
// 0 of every head comes first, since it has the most work.
__device__ __forceinline__ void place(int tiles, int T, int& head, int& tile) {
  int heads = gridDim.x / tiles, largest_group = max(1, (16 << 20) / (4 * D) / T);  // use 16 of the H200's 50 MB
  int first = (int)blockIdx.x / tiles / largest_group * largest_group, group = min(largest_group, heads - first);
  int index = blockIdx.x - first * tiles;
  tile = index / group;
  head = first + index % group;
}

// Start copying rows first ... first + ROWS - 1 of a (T, D) matrix with row stride `stride` to a tile. Rows from T on
// are zeros. All THREADS threads of the block must call this function. The caller is responsible for cp_async_commit,
// cp_async_wait and __syncthreads.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* matrix, int first, int T, int stride) {
  constexpr int CHUNKS = D / 8;  // 16-byte chunks per row
  matrix += (size_t)first * stride;
#pragma unroll
  for (int start = 0; start < ROWS * CHUNKS; start += THREADS) {
    int chunk = start + threadIdx.x, row = chunk / CHUNKS, col = chunk % CHUNKS * 8;
    if (THREADS % CHUNKS == 0) row = start / CHUNKS + threadIdx.x / CHUNKS, col = threadIdx.x % CHUNKS * 8;
    if (ROWS * CHUNKS % THREADS && chunk >= ROWS * CHUNKS) break;
    cp_async16(tile + row * LD + col, matrix + row * stride + col, first + row < T ? 16 : 0);
  }
}

// The left factor of an mma: rows row ... row + 15 and columns col ... col + 15 of a tile.
__device__ __forceinline__ void left_factor(unsigned (&a)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile + (row + lane % 16) * LD + col + lane / 16 * 8);
}
// The right factors of two adjacent mmas (words 0 and 1, and words 2 and 3), for a product with the *transposed* tile:
// k runs over columns col ... col + 15 of the tile, n over rows row ... row + 15.
__device__ __forceinline__ void right_factor_of_transposed(unsigned (&b)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(b, tile + (row + lane % 8 + lane / 16 * 8) * LD + col + lane / 8 % 2 * 8);
}
// The same for a product with the tile itself: k runs over its rows, n over its columns.
__device__ __forceinline__ void right_factor(unsigned (&b)[4], const bf16* tile, int row, int col) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, tile + (row + lane % 16) * LD + col + lane / 16 * 8);
}

// Write the results of a warp times a factor, as rows first + row ... first + row + 16 M - 1 of a (T, D) matrix with
// row stride `stride`. They are staged in rows row ... row + 16 M - 1 of a tile, so that a lane writes 16 bytes.
template <int M>
__device__ __forceinline__ void store_rows(bf16* matrix, bf16* tile, const float (&sum)[M][D / 8][4], float factor,
                                           int row, int first, int T, int stride) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(unsigned*)(tile + (row + m * 16 + lane / 4 + half * 8) * LD + n * 8 + lane % 4 * 2) =
            bf16_pair(sum[m][n][2 * half] * factor, sum[m][n][2 * half + 1] * factor);
  __syncwarp();
#pragma unroll
  for (int start = 0; start < 16 * M * (D / 8); start += 32) {
    int r = row + (start + lane) / (D / 8), col = (start + lane) % (D / 8) * 8;
    if (first + r < T) *(uint4*)(matrix + (size_t)(first + r) * stride + col) = *(const uint4*)(tile + r * LD + col);
  }
}

// Set the scores to -inf where the key comes after the query. Rows are queries, or keys if `transposed`.
template <int M, int N>
__device__ __forceinline__ void hide_later_keys(float (&s)[M][N][4], int first_query, int first_key,
                                                bool transposed = false) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int row = m * 16 + lane / 4 + e / 2 * 8, col = n * 8 + lane % 4 * 2 + e % 2;
        if (first_key + (transposed ? row : col) > first_query + (transposed ? col : row)) s[m][n][e] = NEG_INF;
      }
}

// Dropout on the (B, H, T, T) attention weights, with the same bits as on the CPU: element e uses word e % 4 of group
// e / 4, and is kept if the word is at least `threshold`, the rate times 2^32.
__device__ __forceinline__ bool dropout_keeps(const PhiloxKey& key, unsigned threshold, unsigned long long element) {
  uint4 words = philox(key, element / 4);
  unsigned word = element % 4;
  return (word < 2 ? word ? words.y : words.x : word == 2 ? words.z : words.w) >= threshold;
}
// The same for the result of an mma: 16 rows of queries by 8 columns of keys. Lane l holds elements 0 to 3: columns
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, then of row l / 4 + 8. Returns a mask in which bit i is set if element i is
// kept. `corner` is the index of the top-left element; its column is a multiple of 4. All lanes of a warp must call it.
__device__ __forceinline__ unsigned dropout_keeps_fragment(const PhiloxKey& key, unsigned threshold,
                                                           unsigned long long corner, int T) {
  int lane = threadIdx.x % 32, odd = lane % 2;
  unsigned kept = 0;
  if (T % 4 == 0) {  // a pair of lanes needs the same two groups, one per row: each computes one, and they swap halves
    uint4 words = philox(key, (corner + (unsigned long long)(lane / 4 + 8 * odd) * T + lane % 4 / 2 * 4) / 4);
    unsigned mine = (words.x >= threshold) | (words.y >= threshold) << 1 | (words.z >= threshold) << 2 |
                    (words.w >= threshold) << 3;
    unsigned other = __shfl_xor_sync(0xffffffffu, mine, 1);
    kept = odd ? (mine & 12) | other >> 2 : (mine & 3) | (other & 3) << 2;
  } else {
#pragma unroll 1  // this case is rare, and its code is long
    for (int i = 0; i < 4; i++) {
      unsigned long long row = lane / 4 + i / 2 * 8;
      kept |= (unsigned)dropout_keeps(key, threshold, corner + row * T + lane % 4 * 2 + i % 2) << i;
    }
  }
  return kept;
}
// The same for the transposed result: 16 rows of keys by 8 columns of queries. `corner` is as above.
__device__ __forceinline__ unsigned dropout_keeps_transposed(const PhiloxKey& key, unsigned threshold,
                                                             unsigned long long corner, int T) {
  int lane = threadIdx.x % 32;
  unsigned kept = 0;
  if (T % 4 == 0) {  // four lanes, 4 apart, need the same four groups: each computes one, and reads its bits from all
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
