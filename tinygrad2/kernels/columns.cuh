// Column-wise access to a matrix (N, C). Each lane processes VEC adjacent columns; the rows are distributed over the
// eight warps of a block and over gridDim.y blocks. If the size of a row is not a multiple of 16 bytes, a lane
// processes one column. C is a compile-time constant (-DC).
constexpr int VEC = C % Pack<REAL>::N ? 1 : Pack<REAL>::N, WARPS = 8, WIDTH = 32 * VEC;

constexpr int AHEAD = 4;   // loads that a lane issues before it uses the first
constexpr int BLOCKS = 4;  // resident blocks per multiprocessor; the launcher creates no more than can run concurrently

template <class T>
using Vec = Pack<T, VEC>;

__device__ __forceinline__ int first_column() { return blockIdx.x * WIDTH + threadIdx.x % 32 * VEC; }
__device__ __forceinline__ int first_row() { return blockIdx.y * WARPS + threadIdx.x / 32; }
__device__ __forceinline__ int row_step() { return gridDim.y * WARPS; }

// Add the lanes' column sums over the warps, in order, and write them to row blockIdx.y of partial (gridDim.y, C). All
// threads of the block must call this function.
__device__ __forceinline__ void store_partial(float* partial, const float (&sum)[VEC]) {
  __shared__ float sums[WARPS][WIDTH];
#pragma unroll
  for (int k = 0; k < VEC; k++) sums[threadIdx.x / 32][threadIdx.x % 32 * VEC + k] = sum[k];
  __syncthreads();
  int c = blockIdx.x * WIDTH + threadIdx.x;
  if (threadIdx.x >= WIDTH || c >= C) return;
  float total = sums[0][threadIdx.x];
#pragma unroll
  for (int warp = 1; warp < WARPS; warp++) total += sums[warp][threadIdx.x];
  partial[(size_t)blockIdx.y * C + c] = total;
}
