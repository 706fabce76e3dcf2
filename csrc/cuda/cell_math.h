// The arithmetic of a cell on the device: its value type, which is one float or double, with the
// functions that csrc/cells/cell.h promises, and the accumulation type of each storage type. A cell
// finds the functions by its arguments' type, wherever its header is included.
//
// For float and double, sigmoid and tanh are those of the CUDA math library (at most 3 ulp in
// float). For the two halves FastMathFloat needs a third of the instructions, with errors of about
// 2^-21. The hardware's tanh.approx has 11 good bits, too few for states in float.
#pragma once
#include <cmath>

#include "../cells/registry.h"

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

// What cells compute with. If kFast, the functions are the special function unit's approximations.
template <class A, bool kFast>
struct Scalar {
  A value;

  Scalar() = default;
  RNNKERN_HD explicit Scalar(A v) : value(v) {}
  RNNKERN_HD explicit operator A() const { return value; }

  friend RNNKERN_HD Scalar operator+(Scalar a, Scalar b) { return Scalar(a.value + b.value); }
  friend RNNKERN_HD Scalar operator-(Scalar a, Scalar b) { return Scalar(a.value - b.value); }
  friend RNNKERN_HD Scalar operator*(Scalar a, Scalar b) { return Scalar(a.value * b.value); }
  friend RNNKERN_HD Scalar operator/(Scalar a, Scalar b) { return Scalar(a.value / b.value); }
  friend RNNKERN_HD Scalar operator-(Scalar a) { return Scalar(-a.value); }
  friend RNNKERN_HD bool operator<(Scalar a, Scalar b) { return a.value < b.value; }
  friend RNNKERN_HD bool operator<=(Scalar a, Scalar b) { return a.value <= b.value; }
};
using FastMathFloat = Scalar<float, true>;
template <class A>
using ExactMath = Scalar<A, false>;

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

template <class A>
RNNKERN_HD static ExactMath<A> sigmoid(ExactMath<A> x) {
  return ExactMath<A>(sigmoid(x.value));
}
template <class A>
RNNKERN_HD static ExactMath<A> tanh(ExactMath<A> x) {
  return ExactMath<A>(tanh(x.value));
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
template <class A, bool kFast>
RNNKERN_HD static Scalar<A, kFast> exp(Scalar<A, kFast> x) {
  return Scalar<A, kFast>(exp(x.value));
}
template <class A, bool kFast>
RNNKERN_HD static Scalar<A, kFast> log(Scalar<A, kFast> x) {
  return Scalar<A, kFast>(log(x.value));
}
template <class A, bool kFast>
RNNKERN_HD static Scalar<A, kFast> softplus(Scalar<A, kFast> x) {
  return Scalar<A, kFast>(softplus(x.value));
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
using CellMath = Scalar<Acc<T>, sizeof(T) == 2>;

}  // namespace rnnkern::cuda
