// A stand-in for cuBLASLt on the CPU: naive, column-major versions of the C functions that tinygrad2/kernels/gemm.py
// calls. They check their arguments. If a check fails, they return an error status, and cublaslt_complaint() returns the
// message. An algorithm is accepted only for the product for which the heuristic returned it, with at least the same
// alignment. Every product overwrites the workspace.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

namespace {
enum { OK = 0, INVALID = 7, UNSUPPORTED = 15 };
enum { R32F = 0, R16BF = 14 };
enum : uint64_t { OPERATION = 0x4f504552, LAYOUT = 0x4c41594f, PREFERENCE = 0x50524546, HANDLE = 0x48414e44 };

char complaint[200];
int fail(const char* what, int status = INVALID) {
  snprintf(complaint, sizeof complaint, "%s", what);
  return status;
}
#define CHECK(condition) \
  if (!(condition)) return fail(#condition)

struct Operation {
  uint64_t tag = OPERATION;
  int compute, scale, mode = 0, ta = 0, tb = 0, epilogue = 1, bias_type = -1;
  const void* bias = nullptr;
};
struct Layout {
  uint64_t tag = LAYOUT;
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Preference {
  uint64_t tag = PREFERENCE;
  uint64_t workspace = 0;
  int reduction = 7, alignment[4] = {256, 256, 256, 256};
};
struct Handle {
  uint64_t tag = HANDLE;
};
struct Algorithm {  // 64 bytes
  uint64_t magic, product, workspace;
  int alignment[4], bias_alignment, unused[5];
};
static_assert(sizeof(Algorithm) == 64);
struct Result {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

uint64_t mix(uint64_t h, uint64_t x) { return (h ^ x) * 0x9E3779B97F4A7C15ull; }
int alignment_of(const void* p) {
  uintptr_t a = (uintptr_t)p;
  int n = 1;
  while (n < 256 && a % (2 * n) == 0) n *= 2;
  return n;
}
uint64_t product_of(const Operation& o, const Layout& a, const Layout& b, const Layout& d) {
  uint64_t h = 1;
  for (const Layout* l : {&a, &b, &d}) {
    for (uint64_t x : {(uint64_t)l->type, l->rows, l->cols, (uint64_t)l->ld}) h = mix(h, x);
  }
  for (int x : {o.compute, o.mode, o.ta, o.tb, o.epilogue, o.bias_type}) h = mix(h, x);
  return h;
}
float load(const void* p, int type, size_t i) {
  if (type == R32F) return ((const float*)p)[i];
  uint32_t u = (uint32_t)((const uint16_t*)p)[i] << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
float round_to(float f, int bits) {  // to nearest, ties to even, dropping the last `bits` bits of the mantissa
  if (std::isnan(f)) return f;
  uint32_t u;
  memcpy(&u, &f, 4);
  u += (1u << (bits - 1)) - 1 + (u >> bits & 1);
  u &= ~((1u << bits) - 1);
  memcpy(&f, &u, 4);
  return f;
}
void store(void* p, int type, size_t i, float f) {
  if (type == R32F) {
    ((float*)p)[i] = f;
    return;
  }
  f = round_to(f, 16);
  uint32_t u;
  memcpy(&u, &f, 4);
  ((uint16_t*)p)[i] = u >> 16;
}
enum { PLAIN = 1, WITH_BIAS = 4 };  // epilogues

int check(const Operation& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  CHECK(o.tag == OPERATION && a.tag == LAYOUT && b.tag == LAYOUT && c.tag == LAYOUT && d.tag == LAYOUT);
  for (const Layout* l : {&a, &b, &c, &d}) CHECK(l->rows && l->cols && l->ld >= (int64_t)l->rows);
  CHECK((o.ta ? a.cols : a.rows) == d.rows && (o.tb ? b.rows : b.cols) == d.cols);
  CHECK((o.ta ? a.rows : a.cols) == (o.tb ? b.cols : b.rows));
  CHECK(c.rows == d.rows && c.cols == d.cols && c.type == d.type && c.ld == d.ld);
  CHECK(o.scale == R32F && (o.compute == 68 || o.compute == 77));
  CHECK(o.mode == 0 || o.mode == 1);
  if (a.type != b.type || (d.type != R32F && d.type != a.type) || (o.compute == 77 && a.type != R32F))
    return fail("types", UNSUPPORTED);
  CHECK(o.epilogue == PLAIN || o.epilogue == WITH_BIAS);
  if (o.epilogue == WITH_BIAS) {
    CHECK(o.bias);
    CHECK(o.bias_type == d.type);
  }
  return OK;
}
template <class T>
int put(T& field, const void* value, size_t size) {
  CHECK(size == sizeof(T));
  memcpy(&field, value, size);
  return OK;
}
}  // namespace

extern "C" {
const char* cublaslt_complaint() { return complaint; }
int cublaslt_products[2];  // number of products of float32 operands: in float32, in TF32

int cublasLtCreate(Handle** h) { return *h = new Handle, OK; }
int cublasLtMatmulDescCreate(Operation** o, int compute, int scale) {
  *o = new Operation;
  (*o)->compute = compute;
  (*o)->scale = scale;
  return OK;
}
int cublasLtMatmulDescSetAttribute(Operation* o, int attribute, const void* value, size_t size) {
  CHECK(o->tag == OPERATION);
  switch (attribute) {
    case 2: return put(o->mode, value, size);
    case 3: return put(o->ta, value, size);
    case 4: return put(o->tb, value, size);
    case 7: return put(o->epilogue, value, size);
    case 8: return put(o->bias, value, size);
    case 26: return put(o->bias_type, value, size);
  }
  return fail("unknown attribute of an operation");
}
int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  CHECK(type == R32F || type == R16BF);
  *l = new Layout;
  (*l)->type = type, (*l)->rows = rows, (*l)->cols = cols, (*l)->ld = ld;
  return OK;
}
int cublasLtMatmulPreferenceCreate(Preference** p) { return *p = new Preference, OK; }
int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value, size_t size) {
  CHECK(p->tag == PREFERENCE);
  if (attribute == 1) return put(p->workspace, value, size);
  if (attribute == 3) return put(p->reduction, value, size);
  CHECK(attribute >= 5 && attribute <= 8);
  return put(p->alignment[attribute - 5], value, size);
}
int cublasLtMatmulPreferenceDestroy(Preference* p) {
  CHECK(p->tag == PREFERENCE);
  p->tag = 0;
  delete p;
  return OK;
}
int cublasLtMatmulAlgoGetHeuristic(Handle* h, Operation* o, Layout* a, Layout* b, Layout* c, Layout* d, Preference* p,
                                   int wanted, Result* result, int* found) {
  CHECK(h && h->tag == HANDLE && p->tag == PREFERENCE && wanted == 1);
  if (int status = check(*o, *a, *b, *c, *d)) return status;
  CHECK(p->reduction == 2);  // the default would also allow partial sums in bfloat16
  CHECK(p->workspace >= 4096);
  *result = {};
  Algorithm& g = result->algorithm;
  g.magic = 0xA190, g.product = product_of(*o, *a, *b, *d), g.workspace = result->workspace = 4096;
  memcpy(g.alignment, p->alignment, sizeof g.alignment);
  g.bias_alignment = alignment_of(o->bias);
  return *found = 1, OK;
}
int cublasLtMatmul(Handle* h, Operation* o, const float* alpha, const void* A, Layout* a, const void* B, Layout* b,
                   const float* beta, const void* C, Layout* c, void* D, Layout* d, const Algorithm* g, void* workspace,
                   size_t workspace_size, void*) {
  CHECK(h && h->tag == HANDLE);
  if (int status = check(*o, *a, *b, *c, *d)) return status;
  CHECK(g && g->magic == 0xA190);
  CHECK(g->product == product_of(*o, *a, *b, *d));
  const void* pointers[] = {A, B, C, D};
  for (int i = 0; i < 4; i++) CHECK(pointers[i] && alignment_of(pointers[i]) >= g->alignment[i]);
  CHECK(C == D);
  if (o->epilogue == WITH_BIAS) CHECK(alignment_of(o->bias) >= g->bias_alignment);
  CHECK(workspace && alignment_of(workspace) >= 16 && workspace_size >= g->workspace);
  memset(workspace, 0xFF, g->workspace);

  uint64_t m = d->rows, n = d->cols, k = o->ta ? a->rows : a->cols;
  std::vector<float> left(m * k), right(n * k);  // the operands after transposition, inner index last
  for (uint64_t i = 0; i < m; i++)
    for (uint64_t l = 0; l < k; l++) left[i * k + l] = load(A, a->type, o->ta ? l + i * a->ld : i + l * a->ld);
  for (uint64_t j = 0; j < n; j++)
    for (uint64_t l = 0; l < k; l++) right[j * k + l] = load(B, b->type, o->tb ? j + l * b->ld : l + j * b->ld);
  if (a->type == R32F) cublaslt_products[o->compute == 77]++;
  if (o->compute == 77) {
    for (float& x : left) x = round_to(x, 13);
    for (float& x : right) x = round_to(x, 13);
  }
  for (uint64_t j = 0; j < n; j++)
    for (uint64_t i = 0; i < m; i++) {
      float sum = 0;
      for (uint64_t l = 0; l < k; l++) sum += left[i * k + l] * right[j * k + l];
      float y = *alpha * sum + (*beta ? *beta * load(C, d->type, i + j * d->ld) : 0);
      if (o->epilogue == WITH_BIAS) y += load(o->bias, o->bias_type, i);
      store(D, d->type, i + j * d->ld, y);
    }
  return OK;
}
}
