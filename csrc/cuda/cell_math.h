// The arithmetic of a cell on the device: the functions of its value type, which is one float or
// double (csrc/cells/cell.h says what a cell asks for), the accumulation type of each
// storage type, and then the cells. The order matters: a cell finds only what is declared before.
//
// For float and double, sigmoid and tanh are those of the CUDA math library (at most 3 ulp in
// float). For the two halves FastMathFloat needs a third of the instructions, with errors of about
// 2^-21. The hardware's tanh.approx has 11 good bits, too few for states in float.
#pragma once
#include <cmath>
#include <type_traits>

#include "../cells/cell.h"

namespace rnnkern {

RNNKERN_HD static float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
RNNKERN_HD static double sigmoid(double x) { return 1. / (1. + ::exp(-x)); }
RNNKERN_HD static float tanh(float x) { return ::tanhf(x); }
RNNKERN_HD static double tanh(double x) { return ::tanh(x); }

RNNKERN_HD static float exp(float x) { return expf(x); }
RNNKERN_HD static double exp(double x) { return ::exp(x); }
RNNKERN_HD static float log(float x) { return logf(x); }
RNNKERN_HD static double log(double x) { return ::log(x); }
RNNKERN_HD static float softplus(float x) { return (x > 0 ? x : 0.f) + log1pf(expf(-fabsf(x))); }
RNNKERN_HD static double softplus(double x) { return (x > 0 ? x : 0.) + log1p(::exp(-fabs(x))); }

// A float whose functions use the approximations of the special function unit.
struct FastMathFloat {
  float value;

  FastMathFloat() = default;
  RNNKERN_HD explicit FastMathFloat(float v) : value(v) {}
  RNNKERN_HD explicit operator float() const { return value; }
};

RNNKERN_HD static FastMathFloat operator+(FastMathFloat a, FastMathFloat b) {
  return FastMathFloat(a.value + b.value);
}
RNNKERN_HD static FastMathFloat operator-(FastMathFloat a, FastMathFloat b) {
  return FastMathFloat(a.value - b.value);
}
RNNKERN_HD static FastMathFloat operator*(FastMathFloat a, FastMathFloat b) {
  return FastMathFloat(a.value * b.value);
}
RNNKERN_HD static FastMathFloat operator/(FastMathFloat a, FastMathFloat b) {
  return FastMathFloat(a.value / b.value);
}
RNNKERN_HD static FastMathFloat operator-(FastMathFloat a) { return FastMathFloat(-a.value); }
RNNKERN_HD static bool operator<(FastMathFloat a, FastMathFloat b) { return a.value < b.value; }
RNNKERN_HD static bool operator<=(FastMathFloat a, FastMathFloat b) { return a.value <= b.value; }

// 2^x and 1 / x by the special function unit.
RNNKERN_HD static float ex2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

RNNKERN_HD static float rcp_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

RNNKERN_HD static FastMathFloat sigmoid(FastMathFloat x) {
  return FastMathFloat(rcp_approx(1.f + ex2_approx(-1.4426950408889634f * x.value)));
}

// Taylor series near zero, where 1 - e would cancel.
RNNKERN_HD static FastMathFloat tanh(FastMathFloat x) {
  const float a = fabsf(x.value), e = ex2_approx(-2.8853900817779268f * a), s = a * a;
  const float far = (1.f - e) * rcp_approx(1.f + e);
  const float near =
      a + a * s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835))));
  return FastMathFloat(copysignf(a < 0.25f ? near : far, x.value));
}

// For those that cells rarely use, the library's are fast enough.
RNNKERN_HD static FastMathFloat exp(FastMathFloat x) { return FastMathFloat(expf(x.value)); }
RNNKERN_HD static FastMathFloat log(FastMathFloat x) { return FastMathFloat(logf(x.value)); }
RNNKERN_HD static FastMathFloat softplus(FastMathFloat x) {
  return FastMathFloat(softplus(x.value));
}
template <class V>
RNNKERN_HD static V log_sigmoid(V x) {
  return -softplus(-x);
}
// The larger one; NaN if either is.
template <class V>
RNNKERN_HD static V max(V x, V y) {
  return y < x || !(x <= x) ? x : y;
}

// NaN stays NaN.
template <class V>
RNNKERN_HD static V relu(V x) {
  return x < V(0) ? V(0) : x;
}

template <class V>
RNNKERN_HD static V where_positive(V x, V y) {
  return x <= V(0) ? V(0) : y;
}

}  // namespace rnnkern

#include "../cells/registry.h"

namespace rnnkern::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// What the cell computes with.
template <class T>
using CellMath = std::conditional_t<sizeof(T) == 2, FastMathFloat, Acc<T>>;

}  // namespace rnnkern::cuda
