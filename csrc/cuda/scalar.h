// The cells, and before them the functions that they ask of their value type (csrc/cells/cell.h),
// here one float or double: what is declared later would not be found for these.
//
// For float and double sigmoid and tanh are the accurate ones of the CUDA math library (at most 3
// ulp in float). For the two halves they need a third of the instructions, with errors of some
// 2^-21 (FastMathFloat). The hardware's tanh.approx has 11 good bits, too few for states in float.
#pragma once
#include <cmath>

#include "../cells/cell.h"

namespace rnnkern {

RNNKERN_HD static float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
RNNKERN_HD static double sigmoid(double x) { return 1. / (1. + exp(-x)); }
RNNKERN_HD static float tanh(float x) { return ::tanhf(x); }
RNNKERN_HD static double tanh(double x) { return ::tanh(x); }

// A float whose functions are quick.
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
RNNKERN_HD static bool operator<(FastMathFloat a, FastMathFloat b) { return a.value < b.value; }
RNNKERN_HD static bool operator<=(FastMathFloat a, FastMathFloat b) { return a.value <= b.value; }

// 2^x and 1 / x, as the hardware has them.
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

// Near zero, where the quotient's difference would cancel, by the series.
RNNKERN_HD static FastMathFloat tanh(FastMathFloat x) {
  const float a = fabsf(x.value), e = ex2_approx(-2.8853900817779268f * a), s = a * a;
  const float far = (1.f - e) * rcp_approx(1.f + e);
  const float near =
      a + a * s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835))));
  return FastMathFloat(copysignf(a < 0.25f ? near : far, x.value));
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
