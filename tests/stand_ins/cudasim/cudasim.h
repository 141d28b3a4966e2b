// A simulator that runs CUDA C++ kernels on a CPU to test them, without a GPU or a driver.
//
// Every CUDA thread is a fiber with its own stack, which yields only at barriers, in warp collectives, and while it
// waits for another block. Between two such points it runs alone. The caller selects the schedule (0: the first warp
// runs as far ahead as it can, 1: the last warp does, 2 and more: warps run at random rates), so that a missing barrier
// gives a result that is wrong or depends on the schedule. Blocks run one after the other. If all threads of a block
// wait, the next block starts, and the blocks are then scheduled in the same way (0: the first block that can run,
// 1: the last one, 2 and more: a random block runs ahead of the others for a while).
//
// A launch stops with an error message at divergent barriers, warp collectives whose mask contains exited lanes or omits
// the calling lane, lanes of a warp that call different collectives, asynchronous copies that are never waited for,
// ldmatrix and cp.async outside shared memory or (for reads) outside the arrays that were passed, and misaligned
// accesses. Shared memory, static and dynamic, is filled with NaN when a block starts, and so is the destination of
// cp.async until the thread has waited for it.
//
// Supported: threadIdx etc., __shared__, __syncthreads, __syncwarp, shuffles, ballot, atomics, float4 and uint4, bf16,
// ldmatrix, mma.m16n8k16 (bf16 -> f32), cp.async, and the barrier and distributed shared memory of a cluster.
// Not modelled: the order in which a GPU makes writes visible, bank conflicts, registers, ordinary accesses past the end
// of an array, lanes that call the same collective from two places in the code, wgmma, TMA, the number of blocks that fit
// on a GPU, denormal numbers (CuPy compiles with -ftz=true), and the GPU's approximations of exp and other functions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>
#include <sys/mman.h>
#define CUDASIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// Only one block at a time may use it. (__init__.py inserts the code that fills it with NaN.)
#define __shared__ static
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }

namespace cudasim {

// Fibers --------------------------------------------------------------------------------------------------------------

// Push the callee-saved registers, store the stack pointer in *save, and continue with the stack pointer `load`.
#if defined(__x86_64__)
extern "C" void cudasim_switch(void** save, void* load);
asm(R"(.text
.weak cudasim_switch
cudasim_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");
#else
#error "add a ucontext switch for this processor"
#endif

// The state of a fiber: it can run, waits in __syncthreads, waits in a collective of its warp, has exited, or waits for
// another block.
enum Kind { RUN = 0, BLOCK = 1, SYNCWARP, SHFL, BALLOT, LDMATRIX, MMA, DONE, WAIT, KINDS };
static const char* const kind_name[] = {"running",  "__syncthreads", "__syncwarp", "shfl",  "ballot",
                                        "ldmatrix", "mma",           "exited",     "waiting for another block"};
#ifndef CUDASIM_STACK
#define CUDASIM_STACK 64
#endif
constexpr size_t STACK = CUDASIM_STACK << 10, SLOT = 64;  // in bytes: a stack, and a lane's data in one exchange

struct Copy {
  void* d;
  const void* s;
  int n;
};

struct Fiber {
  void* sp;
  int state;
  unsigned mask;  // of the collective in which it waits
  int parity;     // the slot that its next exchange uses
  size_t clusters;  // number of cluster barriers that it has reached
  dim3 tid;
  std::vector<std::vector<Copy>> groups;  // of cp.async, oldest first; the last one is not committed
};

struct Warp {
  unsigned arrived = 0, alive = 0;     // lanes that wait in a collective; lanes that have not exited
  alignas(16) char slot[2][32][SLOT];  // data that the lanes exchange
};

struct Block {
  dim3 id;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char *stacks, *memory;  // dynamic shared memory
  int alive, arrived;     // number of fibers that have not exited, and that wait in __syncthreads
  std::vector<int> clusters;  // number of fibers that have reached each cluster barrier
  char* dynamic() { return (char*)(((uintptr_t)memory + 127) & ~(uintptr_t)127); }
};

inline std::vector<Block*> blocks;  // by number; null until they start
inline std::vector<Block*> living;  // blocks that have started and not finished
inline Block* now;                  // the block whose fiber is running
inline int cur;                     // the index of that fiber
inline int order;
inline void* main_sp;               // the scheduler's stack pointer
inline std::vector<char*> spare;    // stacks of finished blocks
inline size_t spare_threads, dynamic_size;
inline char* dyn_smem() { return now->dynamic(); }
struct Span {
  const char* start;
  size_t size;
};
inline std::vector<Span> arrays, shared;  // the launch's arrays; dynamic shared memory and the static variables used so far
inline unsigned long blocks_started;
inline std::function<void()> body;  // the kernel with its arguments
inline std::string error;           // the first error

inline void fail(const std::string& m) {
  if (error.empty()) error = m;
}

inline void yield_to_main() { cudasim_switch(&now->fibers[cur].sp, main_sp); }

// Let other fibers run until one of them has made progress.
inline void wait() {
  now->fibers[cur].state = WAIT;
  yield_to_main();
}

// Report an error, and stop this fiber.
inline void stop(const std::string& m) {
  fail(m);
  for (;;) yield_to_main();
}

// Check that 16 bytes are aligned and inside one of the spans.
inline void check(const void* p, const std::vector<Span>& spans, const char* what) {
  if ((uintptr_t)p % 16) stop(std::string(what) + ": an address that is not a multiple of 16");
  for (auto& span : spans)
    if (span.start <= p && (const char*)p + 16 <= span.start + span.size) return;
  stop(std::string(what) + ": an address outside " + (&spans == &shared ? "shared memory" : "the arrays"));
}

// The first thread of a block that reaches the declaration of a shared variable fills it with NaN.
inline void poison(void* variable, size_t size, unsigned long& block) {
  if (block == blocks_started) return;
  if (living.size() > 1) stop("static shared memory in a kernel whose blocks wait for each other: not supported by the simulator");
  if (!block) shared.push_back({(char*)variable, size});
  block = blocks_started;
  memset(variable, 0xFF, size);
}

// Barriers and collectives --------------------------------------------------------------------------------------------

inline void release_block() {
  if (now->arrived && now->arrived == now->alive) {
    for (auto& f : now->fibers)
      if (f.state == BLOCK) f.state = RUN;
    now->arrived = 0;
  }
}

inline void syncthreads() {
  now->arrived++;
  now->fibers[cur].state = BLOCK;
  release_block();
  yield_to_main();
}

// All lanes in the mask wait here until the last one arrives.
inline void warp_meet(unsigned mask, int kind) {
  int w = cur / 32, lane = cur % 32;
  Warp& W = now->warps[w];
  Fiber& f = now->fibers[cur];
  if (!(mask >> lane & 1)) fail("a lane calls a warp collective whose mask does not contain it");
  if (mask & ~W.alive) fail(std::string(kind_name[kind]) + ": the mask contains a lane that has exited");
  W.arrived |= 1u << lane;
  f.mask = mask;
  f.state = kind;
  if ((W.arrived & mask) == (mask & W.alive)) {
    for (int l = 0; l < 32; l++)
      if (mask >> l & 1) {
        Fiber& g = now->fibers[w * 32 + l];
        if (g.state == DONE) continue;
        if (g.state != kind || g.mask != mask) fail("lanes of one warp call different collectives or use different masks");
        if (kind != SYNCWARP && g.parity != f.parity) fail("lanes of one warp have made different numbers of exchanges");
        g.state = RUN;
      }
    W.arrived &= ~mask;
  }
  yield_to_main();
}

// Pass n bytes to the lanes in the mask, and read theirs. Two alternating slots make a second barrier unnecessary: a lane
// that is ahead by one exchange writes to the other slot.
template <class F>
inline auto exchange(unsigned mask, int kind, const void* v, size_t n, F read) {
  Fiber& f = now->fibers[cur];
  int p = f.parity;
  f.parity ^= 1;
  memcpy(now->warps[cur / 32].slot[p][cur % 32], v, n);
  warp_meet(mask, kind);
  return read(now->warps[cur / 32].slot[p]);
}

// The block with this rank in the current block's cluster, or null if it has not started.
inline Block* in_cluster(int size, int rank) {
  size_t i = blockIdx.x / size * size + rank;
  return i < blocks.size() ? blocks[i] : nullptr;
}

inline void cluster_barrier(int size) {
  if (gridDim.x % size) stop("the grid size is not a multiple of the cluster size");
  size_t mine = now->fibers[cur].clusters++;
  now->clusters.resize(std::max(now->clusters.size(), mine + 1));
  now->clusters[mine]++;
  auto there = [=](Block* b) { return b && b->clusters.size() > mine && b->clusters[mine] == (int)b->fibers.size(); };
  for (int rank = 0; rank < size; rank++)
    while (!there(in_cluster(size, rank))) wait();
}

// The entry point of a fiber.
extern "C" inline void cudasim_entry() {
  body();
  int c = cur;
  now->fibers[c].state = DONE;
  now->alive--;
  Warp& W = now->warps[c / 32];
  W.alive &= ~(1u << c % 32);
  if (W.arrived) fail("a thread exited while lanes of its warp wait in a collective");
  for (auto& g : now->fibers[c].groups)
    if (!g.empty()) {
      fail("a thread exited without waiting for its cp.async");
      break;
    }
  release_block();
  yield_to_main();
  abort();
}

// Blocks --------------------------------------------------------------------------------------------------------------

inline void begin(unsigned number) {
  blocks_started++;
  size_t n = blockDim.x * blockDim.y * blockDim.z;
  if (spare_threads != n) {
    for (char* stacks : spare) munmap(stacks, spare_threads * STACK);
    spare.clear();
    spare_threads = n;
  }
  char* stacks;
  if (spare.empty()) {
    stacks = (char*)mmap(0, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  } else {
    stacks = spare.back();
    spare.pop_back();
  }
  dim3 id(number % gridDim.x, number / gridDim.x % gridDim.y, number / (gridDim.x * gridDim.y));
  Block* b = new Block{id, std::vector<Fiber>(n), std::vector<Warp>((n + 31) / 32), stacks,
                       (char*)malloc(dynamic_size + 256), (int)n, 0, {}};
  memset(b->memory, 0xFF, dynamic_size + 256);  // NaN
  for (size_t i = 0; i < n; i++) {
    Fiber& f = b->fibers[i];
    b->warps[i / 32].alive |= 1u << i % 32;
    f.tid = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    f.groups.resize(1);
    void** s = (void**)(stacks + (i + 1) * STACK);
    *--s = nullptr;
    *--s = (void*)cudasim_entry;
    for (int k = 0; k < 6; k++) *--s = nullptr;
    f.sp = s;
  }
  blocks[number] = b;
  living.push_back(b);
}

inline unsigned random_bits;
inline unsigned random(unsigned below) {
  random_bits = random_bits * 1664525u + 1013904223u;
  return (random_bits >> 8) % below;
}

// Run a block until all its threads have exited or wait. Returns whether one of them made progress.
inline bool run(Block* b) {
  now = b;
  blockIdx = b->id;
  shared[0] = {dyn_smem(), dynamic_size};
  int n = b->fibers.size(), nw = b->warps.size();
  for (auto& f : b->fibers)
    if (f.state == WAIT) f.state = RUN;
  auto pass = [&](int w) {  // run each ready lane of a warp to its next barrier; returns whether one made progress
    bool moved = false;
    for (int j = 0; j < 32; j++) {
      int i = w * 32 + (order == 1 ? 31 - j : j);
      if (i < n && b->fibers[i].state == RUN) {
        cur = i;
        threadIdx = b->fibers[i].tid;
        cudasim_switch(&main_sp, b->fibers[i].sp);
        moved |= b->fibers[i].state != WAIT;
      }
    }
    return moved;
  };
  bool moved = false;
  if (order < 2) {  // one warp runs as far ahead of the others as it can
    for (bool again = true; again;) {
      again = false;
      for (int j = 0; j < nw && error.empty(); j++)
        while (error.empty() && pass(order ? nw - 1 - j : j)) moved = again = true;
    }
  } else {  // warps at random rates
    for (int idle = 0; idle < 64 * nw && error.empty();) {
      if (pass(random(nw))) {
        moved = true;
        idle = 0;
      } else {
        idle++;
      }
    }
  }
  if (!b->alive) {
    living.erase(std::find(living.begin(), living.end(), b));
    spare.push_back(b->stacks);
    free(b->memory);
    b->memory = nullptr;
  }
  return moved;
}

// Run all blocks of a launch. Returns the number of the block with an error, or `count`.
inline unsigned run_all(unsigned count) {
  blocks.assign(count, nullptr);
  for (unsigned started = 0, idle = 0;;) {
    bool moved = false;
    if (order < 2) {
      for (size_t j = 0; j < living.size() && error.empty() && !moved; j++)
        moved = run(living[order ? living.size() - 1 - j : j]);
    } else if (size_t n = living.size()) {  // one block runs ahead of the others for a while, then the next one
      for (size_t j = 0, first = random(n); j < n && error.empty() && !moved; j++) {
        Block* b = living[(first + j) % n];
        for (bool more = true; more && b->alive && error.empty();) {
          more = run(b);
          moved |= more;
          more = more && random(8);
        }
      }
    }
    if (!error.empty()) break;
    if (moved) {
      idle = 0;
      continue;
    }
    if (started < count) {
      begin(order == 1 ? count - 1 - started : started);
      started++;
      continue;
    }
    if (living.empty()) return count;
    if (++idle < 100) continue;  // a block that waits again may have made progress in between
    std::vector<int> k(KINDS);
    for (Block* b : living)
      for (auto& f : b->fibers) k[f.state]++;
    std::string m = "deadlock:";
    for (int i = 0; i < KINDS; i++)
      if (k[i]) m += " " + std::to_string(k[i]) + " " + kind_name[i];
    fail(m);
    break;
  }
  return now->id.x + gridDim.x * (now->id.y + gridDim.y * now->id.z);
}

// Launches, for ctypes ------------------------------------------------------------------------------------------------

template <class... A, size_t... I>
void call(void (*k)(A...), void** a, std::index_sequence<I...>) {
  body = [=] { k(*(std::decay_t<A>*)a[I]...); };
}

// A parameter's type as __init__.py checks it: p for a pointer; otherwise f, u or i (also for a struct), and its size.
template <class T>
std::string kind() {
  if (std::is_pointer_v<T>) return "p";
  return (std::is_floating_point_v<T> ? "f" : std::is_unsigned_v<T> ? "u" : "i") + std::to_string(sizeof(T));
}

template <class... A>
const char* params(void (*)(A...)) {
  static std::string s;
  s.clear();
  ((s += kind<A>() + " "), ...);
  return s.c_str();
}

// gb: the three sizes of the grid, and the three sizes of the block. Returns an error message, or null.
template <class... A>
const char* launch(void (*k)(A...), const unsigned* gb, size_t smem, void** args, int ord, const Span* spans, int n) {
  error.clear();
  arrays.assign(spans, spans + n);
  order = ord;
  gridDim = dim3(gb[0], gb[1], gb[2]);
  blockDim = dim3(gb[3], gb[4], gb[5]);
  dynamic_size = smem;
  random_bits = order * 2654435761u + 1;
  if (shared.empty()) shared.push_back({});
  call(k, args, std::index_sequence_for<A...>{});
  unsigned bad = run_all(gb[0] * gb[1] * gb[2]);
  for (Block* b : blocks) {
    if (!b) continue;
    if (b->memory) munmap(b->stacks, b->fibers.size() * STACK);
    free(b->memory);
    delete b;
  }
  living.clear();
  if (error.empty()) return nullptr;
  error += " in block " + std::to_string(bad);
  return error.c_str();
}

inline unsigned first(unsigned n, ...) { return n; }
}  // namespace cudasim

// Called by code that is compiled with -fsanitize=alignment. `where` starts with the source location.
extern "C" __attribute__((weak)) void __ubsan_handle_type_mismatch_v1(void* where, void*) {
  struct Place {
    const char* file;
    unsigned line, column;
  };
  cudasim::stop("a misaligned access at line " + std::to_string(((Place*)where)->line));
}

#define CUDASIM_POISON(name)                           \
  do {                                                 \
    static unsigned long block;                        \
    cudasim::poison((void*)&name, sizeof name, block); \
  } while (0)
#define DYN_SMEM(T, name) T* name = (T*)cudasim::dyn_smem()
// Export a kernel and its launch bounds.
#define CUDASIM_EXPORT(k, ...)                                                                  \
  extern "C" unsigned cudasim_bound_##k() { return cudasim::first(__VA_ARGS__); }               \
  extern "C" const char* cudasim_params_##k() { return cudasim::params(k); }                    \
  extern "C" const char* cudasim_launch_##k(const unsigned* gb, size_t sm, void** a, int o,     \
                                            const cudasim::Span* spans, int n) {                \
    return cudasim::launch(k, gb, sm, a, o, spans, n);                                          \
  }

// CUDA's functions ----------------------------------------------------------------------------------------------------

inline void __syncthreads() { cudasim::syncthreads(); }
inline void __syncwarp(unsigned m = ~0u) { cudasim::warp_meet(m, cudasim::SYNCWARP); }
inline unsigned __activemask() { return cudasim::now->warps[cudasim::cur / 32].alive; }
template <class T>
T cudasim_shfl(unsigned m, T v, int src) {
  if (!(m >> src & 1)) cudasim::fail("shfl: reads a lane that the mask does not contain");
  return cudasim::exchange(m, cudasim::SHFL, &v, sizeof v, [=](auto& s) {
    T r;
    memcpy(&r, s[src], sizeof r);
    return r;
  });
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int = 32) {
  return cudasim_shfl(m, v, (cudasim::cur % 32) ^ x);
}
template <class T>
T __shfl_sync(unsigned m, T v, int l, int w = 32) {
  int c = cudasim::cur % 32;
  return cudasim_shfl(m, v, (c & ~(w - 1)) + (l & (w - 1)));
}
template <class T>
T __shfl_down_sync(unsigned m, T v, int d, int w = 32) {
  int c = cudasim::cur % 32, s = c + d;
  return cudasim_shfl(m, v, (s & ~(w - 1)) == (c & ~(w - 1)) ? s : c);
}
inline unsigned __ballot_sync(unsigned m, int p) {
  return cudasim::exchange(m, cudasim::BALLOT, &p, 4, [=](auto& s) {
    unsigned r = 0;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) {
        int q;
        memcpy(&q, s[l], 4);
        r |= (unsigned)!!q << l;
      }
    return r;
  });
}
template <class T, class U>
T atomicAdd(T* p, U v) {
  T o = *p;
  *p = o + (T)v;
  return o;
}
inline unsigned atomicInc(unsigned* p, unsigned lim) {
  unsigned o = *p;
  *p = o >= lim ? 0 : o + 1;
  return o;
}
inline void __threadfence() {}
inline void __trap() { cudasim::stop("__trap"); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
struct __nv_bfloat16 {
  uint16_t u;
};
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.u << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  unsigned u = __float_as_uint(f);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline unsigned bf16_pair(float first, float second) {
  return __float2bfloat16_rn(first).u | (unsigned)__float2bfloat16_rn(second).u << 16;
}

// Tensor cores and asynchronous copies, which common.cuh implements in PTX -------------------------------------------

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  cudasim::check(row, cudasim::shared, "ldmatrix");
  cudasim::exchange(~0u, cudasim::LDMATRIX, &row, 8, [&](auto& s) {
    int t = cudasim::cur % 32;
    for (int i = 0; i < 4; i++) {
      const char* a;
      memcpy(&a, s[i * 8 + t / 4], 8);
      memcpy(&r[i], a + t % 4 * 4, 4);
    }
    return 0;
  });
}

inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  cudasim::check(row, cudasim::shared, "ldmatrix");
  cudasim::exchange(~0u, cudasim::LDMATRIX, &row, 8, [&](auto& s) {
    int t = cudasim::cur % 32;
    for (int i = 0; i < 4; i++) {
      uint16_t h[2];
      for (int j = 0; j < 2; j++) {
        const char* a;
        memcpy(&a, s[i * 8 + t % 4 * 2 + j], 8);
        memcpy(&h[j], a + t / 4 * 2, 2);
      }
      memcpy(&r[i], h, 4);
    }
    return 0;
  });
}

inline void mma_bf16_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  unsigned v[6] = {a[0], a[1], a[2], a[3], b0, b1};
  cudasim::exchange(~0u, cudasim::MMA, v, 24, [&](auto& s) {
    int t = cudasim::cur % 32;
    auto bf = [&](int lane, int reg, int hi) {
      uint16_t h;
      memcpy(&h, s[lane] + reg * 4 + hi * 2, 2);
      return __uint_as_float((unsigned)h << 16);
    };
    for (int e = 0; e < 4; e++) {
      int row = t / 4 + (e / 2) * 8, col = t % 4 * 2 + e % 2;
      double acc = d[e];
      for (int k = 0; k < 16; k++)
        acc += (double)bf((row % 8) * 4 + k % 8 / 2, (row / 8) + (k / 8) * 2, k % 2) *
               bf(col * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      d[e] = (float)acc;
    }
    return 0;
  });
}

inline void cp_async16(void* d, const void* s, unsigned read = 16) {
  cudasim::check(d, cudasim::shared, "cp.async");
  if (read && !cudasim::arrays.empty()) cudasim::check(s, cudasim::arrays, "cp.async");
  memset(d, 0xFF, 16);
  cudasim::now->fibers[cudasim::cur].groups.back().push_back({d, s, (int)read});
}

// Other blocks ----------------------------------------------------------------------------------------------------------

inline void backoff() { cudasim::wait(); }
template <int SIZE>
inline void cluster_barrier() {
  cudasim::cluster_barrier(SIZE);
}
template <int SIZE, class T>
inline T* in_block(T* place, unsigned rank) {
  cudasim::Block* there = rank < SIZE ? cudasim::in_cluster(SIZE, rank) : nullptr;
  if (!there || !there->alive) cudasim::stop("a block of the cluster that has not started, or has finished");
  std::ptrdiff_t at = (char*)place - cudasim::now->dynamic();
  if (at < 0 || at + sizeof(T) > cudasim::dynamic_size) cudasim::stop("an address outside shared memory");
  return (T*)(there->dynamic() + at);
}

inline void prefetch_l2(const void* p) { (void)*(const volatile char*)p; }  // a GPU would ignore a wrong address
inline void cp_async_commit() { cudasim::now->fibers[cudasim::cur].groups.emplace_back(); }
template <int N>
inline void cp_async_wait() {
  auto& g = cudasim::now->fibers[cudasim::cur].groups;
  while ((int)g.size() - 1 > N) {
    for (auto& c : g.front()) {
      memcpy(c.d, c.s, c.n);
      memset((char*)c.d + c.n, 0, 16 - c.n);
    }
    g.erase(g.begin());
  }
}
