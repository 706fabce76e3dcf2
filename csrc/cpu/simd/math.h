// The functions of a vector that cells compute with. Error: at most 2 ulp in float over the whole
// range, with subnormal results, infinities and NaN; at most 4 ulp in double, 2 from log on.
// tests/kernels/test_math.py sweeps the range.
//
// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2 and r in two pieces (Cody & Waite
// 1980); e^r - 1 is a polynomial. sigmoid and tanh use exp of a negative argument, which keeps
// their denominators in [1, 2].
#pragma once
#include "vec.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLow = -104.f, kHigh = 89.f;
  static constexpr int kExtra = 64;  // makes the exponent of exp(kLow) a normal one
  static constexpr float kUnextra = 0x1p-64f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};
template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLow = -746., kHigh = 710.;
  static constexpr int kExtra = 128;
  static constexpr double kUnextra = 0x1p-128;
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
};

// Coefficients of r^2, r^3, ... in e^r: a minimax fit within 2^-27 for float, 1 / k! for double.
template <class T>
constexpr T kExp[] = {0.5f, 0.16666518f, 0.041666206f, 0.00836889f, 0.0013950492f};
template <>
constexpr double kExp<double>[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                   1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                   1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};

template <class T>
struct ReducedExp {
  Vec<T> n;      // a whole number
  Vec<T> em;     // e^r - 1, where x = n ln 2 + r
  Vec<T> power;  // 2^(n + extra)
};

// Requires x in [kLow, kHigh], or NaN, whose power is unspecified. If power is used, n + extra must
// be a normal exponent.
template <class T>
RNNKERN_INLINE ReducedExp<T> reduce_exp(Vec<T> x, [[maybe_unused]] int extra = 0) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  // The low bits of `rounded` are n as an integer, here in the place of power's exponent field.
  const V round(C::kRound + C::kBias + extra);
  const V rounded = x * V(T(1.44269504088896340736)) + round;
  const V n = rounded - round;
  const V r = (x - n * V(C::kLn2High)) - n * V(C::kLn2Low);
  constexpr int kTerms = sizeof(kExp<T>) / sizeof(T);
  V p{kExp<T>[kTerms - 1]};
  for (int k = kTerms - 2; k >= 0; --k) p = p * r + V(kExp<T>[k]);
  return {n, r * r * p + r, V::from_bits(rounded.bits() << C::kMantissa)};
}

// y 2^n, for whole n up to twice the exponents of the smallest and largest normal number.
template <class T>
RNNKERN_INLINE Vec<T> scale(Vec<T> y, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Raw(_mm512_scalef_ps(y.v, n.v));
  else
    return typename Vec<T>::Raw(_mm512_scalef_pd(y.v, n.v));
#else
  // In two factors, because 2^n itself may be subnormal or overflow. The low bits of n + kRound
  // are n as an integer.
  using C = ExpConstants<T>;
  using V = Vec<T>;
  const auto i = (n + V(C::kRound)).bits() - V(C::kRound).bits();
  const auto half = i >> 1;
  return y * V::from_bits((half + C::kBias) << C::kMantissa) *
         V::from_bits((i - half + C::kBias) << C::kMantissa);
#endif
}

// exp(x) for kLow <= x <= 0, or NaN.
template <class T>
RNNKERN_INLINE Vec<T> exp_negative(Vec<T> x) {
  using V = Vec<T>;
#if defined(__AVX512F__)
  const auto [n, em, power] = reduce_exp(x);
  return scale(V(1) + em, n);
#else
  // In two factors, because 2^n itself may be subnormal. The second is constant.
  using C = ExpConstants<T>;
  const auto [n, em, power] = reduce_exp(x, C::kExtra);
  return (em * power + power) * V(C::kUnextra);
#endif
}

// max(low, x) that returns NaN for NaN: x86's max returns its second operand if one is NaN, NEON's
// the NaN.
template <class T>
RNNKERN_INLINE Vec<T> at_least(Vec<T> x, T low) {
  const Vec<T> bound(low);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Raw(_mm512_max_ps(bound.v, x.v));
  else
    return typename Vec<T>::Raw(_mm512_max_pd(bound.v, x.v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Raw(_mm256_max_ps(bound.v, x.v));
  else
    return typename Vec<T>::Raw(_mm256_max_pd(bound.v, x.v));
#elif defined(RNNKERN_NEON)
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Raw(vmaxq_f32(bound.v, x.v));
  else
    return typename Vec<T>::Raw(vmaxq_f64(bound.v, x.v));
#else
  return Vec<T>::select(x.v < bound.v, bound, x);
#endif
}

template <class T>
RNNKERN_INLINE Vec<T> absolute(Vec<T> x) {
  return Vec<T>::from_bits(x.bits() & ~Vec<T>(T(-0.)).bits());
}

// numerator / (base + rest) for a denominator in [1, 2]. One Newton step corrects the quotient by
// its residual, computed from the unrounded denominator; a rough reciprocal suffices for it.
template <class T>
RNNKERN_INLINE Vec<T> quotient(Vec<T> numerator, Vec<T> base, Vec<T> rest) {
  using V = Vec<T>;
  const V denominator = base + rest;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // 14 bits suffice for the quotient too; a division takes four times longer.
    const V reciprocal = typename V::Raw(_mm512_rcp14_ps(denominator.v));
    const V y = numerator * reciprocal;
    return y + ((numerator - base * y) - y * rest) * reciprocal;
  }
#endif
  const V y = numerator.v / denominator.v;
  return y + ((numerator - base * y) - y * rest) * V(T(0.72));
}

template <class T>
RNNKERN_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  x = at_least(x, C::kLow);
  x = Vec<T>::select(x.v > Vec<T>(C::kHigh).v, Vec<T>(C::kHigh), x);
  const auto [n, em, power] = reduce_exp(x);
  return scale(Vec<T>(1) + em, n);
}

// With e = exp(-|x|): 1 / (1 + e), or e / (1 + e) for negative x.
template <class T>
RNNKERN_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V e = exp_negative(at_least(-absolute(x), ExpConstants<T>::kLow));
  return quotient(V::select(x.v < V(0).v, e, V(1)), V(1), e);
}

// With m = exp(-2|x|) - 1: -m / (m + 2), and the sign of x.
template <class T>
RNNKERN_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const auto [n, em, power] = reduce_exp(at_least(absolute(x) * V(T(-2)), T(-60)));
  const V small = power * em, large = power - V(1);
  const V m = small + large;
  const V sign = V::from_bits(x.bits() & V(T(-0.)).bits());
  V y = quotient(-m, V(2), m);
#if !defined(__FMA__) && !defined(RNNKERN_NEON)
  // Without FMA the rounding of m counts, too.
  y = y - (small - (m - large)) * (V(1) + y) * V(T(0.5));
#endif
  return V::from_bits(absolute(y).bits() | sign.bits());
}

template <class T>
RNNKERN_INLINE Vec<T> relu(Vec<T> x) {
  return at_least(x, T(0));
}

template <class T>
RNNKERN_INLINE Vec<T> where_positive(Vec<T> x, Vec<T> y) {
  return Vec<T>::select(x.v <= Vec<T>(0).v, Vec<T>(0), y);
}

// log(1 + f) of the reduced argument, f in [sqrt(1/2) - 1, sqrt(2) - 1], plus k ln 2, as fdlibm's
// log has it: with s = f / (2 + f), log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)).
template <class T>
constexpr T kLog[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
template <>
constexpr double kLog<double>[] = {6.666666666666735130e-01, 3.999999999940941908e-01,
                                   2.857142874366239149e-01, 2.222219843214978396e-01,
                                   1.818357216161805012e-01, 1.531383769920937332e-01,
                                   1.479819860511658591e-01};

template <class T>
RNNKERN_INLINE Vec<T> reduced_log(Vec<T> f, Vec<T> k) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V s = f / (V(2) + f), z = s * s, half = V(T(0.5)) * f * f;
  constexpr int kTerms = sizeof(kLog<T>) / sizeof(T);
  V r{kLog<T>[kTerms - 1]};
  for (int i = kTerms - 2; i >= 0; --i) r = r * z + V(kLog<T>[i]);
  return k * V(C::kLn2High) - ((half - (s * (half + r * z) + k * V(C::kLn2Low))) - f);
}

// Negative: NaN; 0: -infinity.
template <class T>
RNNKERN_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V smallest = V::from_bits((V(0).bits() + 1) << C::kMantissa);
  const auto subnormal = x.v < smallest.v;
  const V scaled = V::select(subnormal, x * V(T(int64_t(1) << C::kMantissa)), x);
  // Of x = 2^k m, m in [sqrt(1/2), sqrt(2)): k in the exponent of x / sqrt(1/2).
  const auto base = V(T(0.70710678118654752440)).bits();
  const auto exponent = (scaled.bits() - base) >> C::kMantissa;
  const V m = V::from_bits(scaled.bits() - (exponent << C::kMantissa));
  // k as a number: the low bits of kRound + k are those of kRound, and k's.
  const V k = V::from_bits(V(C::kRound).bits() + exponent) - V(C::kRound) -
              V::select(subnormal, V(C::kMantissa), V(0));
  V y = reduced_log(m - V(1), k);
  const V infinity(__builtin_huge_val());
  y = V::select(x.v == infinity.v, infinity, y);
  y = V::select(x.v == V(0).v, -infinity, y);
  return V::select(x.v >= V(0).v, y, V(T(__builtin_nan(""))));
}

// log(1 + e) for e in [0, 1] without the rounding of 1 + e.
template <class T>
RNNKERN_INLINE Vec<T> log1p_to_one(Vec<T> e) {
  using V = Vec<T>;
  const auto large = e.v > V(T(0.41421356237309504880)).v;
  return reduced_log(V::select(large, (e - V(1)) * V(T(0.5)), e), V::select(large, V(1), V(0)));
}

// log(1 + e^x).
template <class T>
RNNKERN_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> e = exp_negative(at_least(-absolute(x), ExpConstants<T>::kLow));
  return relu(x) + log1p_to_one(e);
}

// log(sigmoid(x)).
template <class T>
RNNKERN_INLINE Vec<T> log_sigmoid(Vec<T> x) {
  return -softplus(-x);
}

template <class T, int n>
RNNKERN_INLINE VecArray<T, n> sigmoid(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return sigmoid(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> tanh(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return tanh(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> relu(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return relu(v); });
}

template <class T, int n>
RNNKERN_INLINE VecArray<T, n> exp(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return exp(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> log(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return log(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> softplus(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return softplus(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> log_sigmoid(const VecArray<T, n>& x) {
  return x.each([](Vec<T> v) __attribute__((always_inline)) { return log_sigmoid(v); });
}
template <class T, int n>
RNNKERN_INLINE VecArray<T, n> where_positive(const VecArray<T, n>& x, const VecArray<T, n>& y) {
  return x.each(
      [](Vec<T> v, Vec<T> w) __attribute__((always_inline)) { return where_positive(v, w); }, y);
}

}  // namespace rnnkern::RNNKERN_ISA
