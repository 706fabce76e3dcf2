// Vec<T>: one SIMD register of T at the instruction set that this file is compiled for.
//
// The engine is compiled once per instruction set with -DRNNKERN_ISA=<name>, in the namespace
// rnnkern::<name>. It must not instantiate templates of the standard library that could leave
// symbols of their own: the linker would keep one copy for all instruction sets.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../core/strided_rows.h"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(RNNKERN_NEON)
#include <arm_neon.h>
#endif

namespace rnnkern::RNNKERN_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// Elements in a cache line.
template <class T>
constexpr int64_t kLineElems = 64 / sizeof(T);

// The compiler's vector types (specialised because it mistakes those of a template argument).
template <class T>
struct RawTypes;
template <>
struct RawTypes<float> {
  typedef float Raw __attribute__((vector_size(kBytes)));
  typedef float Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kBytes)));
};
template <>
struct RawTypes<double> {
  typedef double Raw __attribute__((vector_size(kBytes)));
  typedef double Unaligned __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kBytes)));
};

// Pairs of bf16 are only moved and multiplied.
template <>
struct RawTypes<bf16x2> {
  typedef int32_t Raw __attribute__((vector_size(kBytes)));
  typedef int32_t Unaligned __attribute__((vector_size(kBytes), aligned(2), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kBytes)));
};

// Zero-extends n bfloat16 to 32-bit lanes; the other lanes are zero.
RNNKERN_INLINE RawTypes<bf16x2>::Raw wide_bits(const bfloat16* p, int n) {
#if defined(__AVX512BF16__)
  return RawTypes<bf16x2>::Raw(
      _mm512_cvtepu16_epi32(n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                    : _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p)));
#else
  RawTypes<bf16x2>::Raw bits{};
#if defined(RNNKERN_NEON)
  if (n == 4) return RawTypes<bf16x2>::Raw(vmovl_u16(vld1_u16(&p->bits)));
#endif
  for (int l = 0; l < n; ++l) bits[l] = p[l].bits;
  return bits;
#endif
}

template <class T>
struct Vec {
  static constexpr int kLanes = kBytes / sizeof(T);
  using Raw = typename RawTypes<T>::Raw;
  using Unaligned = typename RawTypes<T>::Unaligned;
  using Bits = typename RawTypes<T>::Bits;

  Raw v;

  Vec() = default;
  RNNKERN_INLINE Vec(Raw r) : v(r) {}
  template <class Scalar>
    requires std::is_arithmetic_v<Scalar>
  RNNKERN_INLINE explicit Vec(Scalar s) : v(T(s) - Raw{}) {}
  RNNKERN_INLINE explicit Vec(bf16x2 pair) {
    int32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    v = bits - Raw{};
  }

  RNNKERN_INLINE static Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  RNNKERN_INLINE void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  // Non-temporal store where a register is a cache line; p is aligned to it. Other threads see it
  // after a locked instruction, which every barrier has.
  RNNKERN_INLINE void stream(T* p) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      _mm512_stream_ps(reinterpret_cast<float*>(p), __m512(v));
    else
      _mm512_stream_pd(p, v);
#else
    store(p);
#endif
  }

  // The first n lanes (1 <= n <= kLanes); a load fills the rest with zeros.
  RNNKERN_INLINE static Vec load(const T* p, int n) {
    if (n == kLanes) return load(p);
    return load_tail(p, n);
  }
  RNNKERN_INLINE void store(T* p, int n) const {
    if (n == kLanes) return store(p);
    store_tail(p, n);
  }

#if defined(__AVX512F__)
  RNNKERN_INLINE static Vec load_tail(const T* p, int n) {
    if constexpr (sizeof(T) == 4)
      return Raw(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
    else
      return Raw(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
  }
  RNNKERN_INLINE void store_tail(T* p, int n) const {
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
    else
      _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
  }
#else
  RNNKERN_INLINE static Vec load_tail(const T* p, int n) {
    T lanes[kLanes] = {};
    for (int l = 0; l < n; ++l) lanes[l] = p[l];
    return load(lanes);
  }
  RNNKERN_INLINE void store_tail(T* p, int n) const {
    T lanes[kLanes];
    store(lanes);
    for (int l = 0; l < n; ++l) p[l] = lanes[l];
  }
#endif

#if defined(RNNKERN_NEON)
  // The first n lanes, without a way through memory; the other lanes are zero.
  template <int n>
  RNNKERN_INLINE static Vec load_first(const T* p) {
    if constexpr (n == kLanes) return load(p);
    uint32x4_t lanes{};
    const auto* const words = reinterpret_cast<const uint32_t*>(p);
    if constexpr (n * sizeof(T) >= 8) lanes = vcombine_u32(vld1_u32(words), vdup_n_u32(0));
    if constexpr (n * sizeof(T) == 12) lanes = vld1q_lane_u32(words + 2, lanes, 2);
    if constexpr (n * sizeof(T) == 4) lanes = vld1q_lane_u32(words, lanes, 0);
    return Raw(lanes);
  }
#endif

  // From bfloat16, and rounded to it.
  RNNKERN_INLINE static Vec load(const bfloat16* p, int n) { return Raw(wide_bits(p, n) << 16); }
  RNNKERN_INLINE void store(bfloat16* p, int n) const {
#if defined(__AVX512BF16__)
    const __m256i bits = __m256i(_mm512_cvtneps_pbh(v));
    if (n == kLanes)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
    else
      _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bits);
#else
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    if constexpr (std::is_same_v<T, float>)
      if (n == kLanes)
        return vst1_u16(&p->bits, vreinterpret_u16_bf16(vcvt_bf16_f32(float32x4_t(v))));
#endif
    for (int l = 0; l < n; ++l) p[l] = round_to_bf16(v[l]);
#endif
  }

  friend RNNKERN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend RNNKERN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend RNNKERN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend RNNKERN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend RNNKERN_INLINE Vec operator-(Vec a) { return -a.v; }
  // The larger one; NaN if either is.
  friend RNNKERN_INLINE Vec max(Vec a, Vec b) { return select((a.v > b.v) | (a.v != a.v), a, b); }

  RNNKERN_INLINE Bits bits() const { return Bits(v); }
  RNNKERN_INLINE static Vec from_bits(Bits b) { return Raw(b); }
  // yes where mask is set (all ones), no elsewhere.
  RNNKERN_INLINE static Vec select(Bits mask, Vec yes, Vec no) { return mask ? yes.v : no.v; }
};

// sum += a b; for a bf16x2 both products.
template <class F>
RNNKERN_INLINE void fma(typename Vec<Acc<F>>::Raw& sum, typename Vec<F>::Raw a,
                        typename Vec<F>::Raw b) {
  if constexpr (std::is_same_v<F, Acc<F>>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // In place: with 16 registers the compiler would spend some on moving accumulators. It keeps an
    // array of them in registers only if its elements are not asm operands themselves.
    auto s = sum;
    if constexpr (sizeof(F) == 4)
      asm("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
    else
      asm("vfmadd231pd %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
    sum = s;
#elif defined(RNNKERN_NEON)
    // Not left to the compiler, which would round twice without optimisation.
    if constexpr (sizeof(F) == 4)
      sum = vfmaq_f32(sum, a, b);
    else
      sum = vfmaq_f64(sum, a, b);
#else
    sum += a * b;
#endif
  } else {
#if defined(__AVX512BF16__)
    // With the intrinsic, GCC spills every accumulator of a tile with an initial C, in each k.
    auto s = sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(a), "v"(b));
    sum = s;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    sum = vbfdotq_f32(sum, bfloat16x8_t(a), bfloat16x8_t(b));
#else
    using Floats = Vec<float>::Raw;
    sum += Floats(a & ~0xFFFF) * Floats(b & ~0xFFFF);  // the second of each pair
    sum += Floats(a << 16) * Floats(b << 16);
#endif
  }
}

// As fma, where the compiler may fold the load of b into the instruction. Rounds once at any
// optimisation level, too: MR = 1 must give the bits of a larger tile.
template <class F>
RNNKERN_INLINE void fma_from_memory(typename Vec<Acc<F>>::Raw& sum, typename Vec<F>::Raw a,
                                    typename Vec<F>::Raw b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<F, float>)
    sum = _mm256_fmadd_ps(a, b, sum);
  else
    sum = _mm256_fmadd_pd(a, b, sum);
#else
  fma<F>(sum, a, b);
#endif
}

#if defined(RNNKERN_NEON)
// sum += a[kLane] b: the instruction picks the lane, so that one load of a serves kLanes FMAs.
template <class F, int kLane>
RNNKERN_INLINE void fma_lane(typename Vec<Acc<F>>::Raw& sum, typename Vec<F>::Raw a,
                             typename Vec<F>::Raw b) {
  // In place, as the compiler would else move accumulators, and spill one of a full tile's.
  auto s = sum;
  if constexpr (std::is_same_v<F, float>)
    asm("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(s) : "w"(b), "w"(a), "i"(kLane));
  else if constexpr (std::is_same_v<F, double>)
    asm("fmla %0.2d, %1.2d, %2.d[%3]" : "+w"(s) : "w"(b), "w"(a), "i"(kLane));
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  else
    asm("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(s) : "w"(b), "w"(a), "i"(kLane));
#endif
  sum = s;
}
#endif

// VNNI interleave: lane l is {row[l], next[l]} for l < n; a null `next` counts as zeros.
RNNKERN_INLINE Vec<bf16x2> vnni_interleave(const bfloat16* row, const bfloat16* next, int n) {
  RawTypes<bf16x2>::Raw pairs = wide_bits(row, n);
  if (next) pairs |= wide_bits(next, n) << 16;
  return pairs;
}
template <class T>
RNNKERN_INLINE Vec<T> vnni_interleave(const T* row, const T*, int n) {
  return Vec<T>::load(row, n);
}

// kCount registers that go through the same operations: independent chains hide latency.
template <class T, int kCount>
struct VecArray {
  Vec<T> v[kCount];

  // Copies register by register. The compiler would copy a block of memory in smaller pieces, and a
  // later load of a whole register would miss store forwarding.
  VecArray() = default;
  RNNKERN_INLINE VecArray(const VecArray& other) { *this = other; }
  RNNKERN_INLINE VecArray& operator=(const VecArray& other) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) v[i] = other.v[i];
    return *this;
  }
  template <class Scalar>
    requires std::is_arithmetic_v<Scalar>
  RNNKERN_INLINE explicit VecArray(Scalar s) {
    for (Vec<T>& x : v) x = Vec<T>(s);
  }

  // {f(v[i], others.v[i]...) for every i}
  template <class F, class... Others>
  RNNKERN_INLINE VecArray each(F&& f, const Others&... others) const {
    VecArray out;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) out.v[i] = f(v[i], others.v[i]...);
    return out;
  }

  friend RNNKERN_INLINE VecArray operator+(const VecArray& a, const VecArray& b) {
    return a.each([](Vec<T> x, Vec<T> y) { return x + y; }, b);
  }
  friend RNNKERN_INLINE VecArray operator-(const VecArray& a, const VecArray& b) {
    return a.each([](Vec<T> x, Vec<T> y) { return x - y; }, b);
  }
  friend RNNKERN_INLINE VecArray operator*(const VecArray& a, const VecArray& b) {
    return a.each([](Vec<T> x, Vec<T> y) { return x * y; }, b);
  }
  friend RNNKERN_INLINE VecArray operator/(const VecArray& a, const VecArray& b) {
    return a.each([](Vec<T> x, Vec<T> y) { return x / y; }, b);
  }
  friend RNNKERN_INLINE VecArray operator-(const VecArray& a) {
    return a.each([](Vec<T> x) { return -x; });
  }
  friend RNNKERN_INLINE VecArray max(const VecArray& a, const VecArray& b) {
    return a.each([](Vec<T> x, Vec<T> y) { return max(x, y); }, b);
  }
};

}  // namespace rnnkern::RNNKERN_ISA
