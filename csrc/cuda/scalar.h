// The cells, and before them the functions that they ask of their value type (csrc/cells/cell.h),
// here one float or double: what is declared later would not be found for these.
//
// For float and double sigmoid and tanh are the accurate ones of the CUDA math library (at most 3
// ulp in float). For the two halves they need a third of the instructions, with errors of some
// 2^-21 (Quick). The hardware's tanh.approx has 11 good bits, too few for states in float.
#pragma once
#include <cmath>

#include "../cells/cell.h"

namespace rnnkern {

RNNKERN_HD static float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
RNNKERN_HD static double sigmoid(double x) { return 1. / (1. + exp(-x)); }
RNNKERN_HD static float tanh(float x) { return ::tanhf(x); }
RNNKERN_HD static double tanh(double x) { return ::tanh(x); }

// A float whose functions are quick.
struct Quick {
  float value;

  Quick() = default;
  RNNKERN_HD explicit Quick(float v) : value(v) {}
  RNNKERN_HD explicit operator float() const { return value; }
};

RNNKERN_HD static Quick operator+(Quick a, Quick b) { return Quick(a.value + b.value); }
RNNKERN_HD static Quick operator-(Quick a, Quick b) { return Quick(a.value - b.value); }
RNNKERN_HD static Quick operator*(Quick a, Quick b) { return Quick(a.value * b.value); }
RNNKERN_HD static bool operator<(Quick a, Quick b) { return a.value < b.value; }
RNNKERN_HD static bool operator<=(Quick a, Quick b) { return a.value <= b.value; }

// 2^x and 1 / x, as the hardware has them.
RNNKERN_HD static float quick_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

RNNKERN_HD static float quick_inverse(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

RNNKERN_HD static Quick sigmoid(Quick x) {
  return Quick(quick_inverse(1.f + quick_exp2(-1.4426950408889634f * x.value)));
}

// Near zero, where the quotient's difference would cancel, by the series.
RNNKERN_HD static Quick tanh(Quick x) {
  const float a = fabsf(x.value), e = quick_exp2(-2.8853900817779268f * a), s = a * a;
  const float far = (1.f - e) * quick_inverse(1.f + e);
  const float near =
      a + a * s * (-1.f / 3 + s * (2.f / 15 + s * (-17.f / 315 + s * (62.f / 2835))));
  return Quick(copysignf(a < 0.25f ? near : far, x.value));
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
