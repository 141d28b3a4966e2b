// GELU and its derivative, in the tanh form and the exact form.
//
// The tanh form is computed without tanh: (1 + tanh v) / 2 is the logistic function of 2 v, 1 / (1 + e) with
// e = exp(-2 v). Unlike 1 + tanh, it loses no precision where tanh is near -1, and it takes one exponential and one
// division on the special function units. Overflow gives the correct limit: if e is infinite, the result is 0. u^2 is
// clamped, since infinity times 0 is NaN; at the limit, GELU is u or 0, and its derivative 1 or 0.
constexpr float SCALE = 0.7978845608028654f, CUBIC = 0.044715f;  // sqrt(2 / pi), and the factor of u^3
__device__ __forceinline__ float limited_square(float u) { return fminf(u * u, 1e4f); }

struct Tanh {
  static __device__ __forceinline__ float logistic(float u) {
    return __fdividef(1.f, 1.f + __expf(-2.f * SCALE * u * (1.f + CUBIC * limited_square(u))));
  }
  static __device__ __forceinline__ float value(float u) { return u * logistic(u); }
  static __device__ __forceinline__ float slope(float u) {
    float s = logistic(u);
    return s + u * (s * (1.f - s)) * (2.f * SCALE * (1.f + 3.f * CUBIC * limited_square(u)));
  }
};

struct Exact {  // u Phi(u), where Phi is the normal distribution function; the derivative is Phi + u phi
  static __device__ __forceinline__ float phi_integral(float u) { return 0.5f + 0.5f * erff(0.70710678118654752f * u); }
  static __device__ __forceinline__ float value(float u) { return u * phi_integral(u); }
  static __device__ __forceinline__ float slope(float u) {
    return phi_integral(u) + u * (0.39894228040143268f * __expf(-0.5f * u * u));  // 1 / sqrt(2 pi)
  }
};
