// Loads rows of a matrix as columns.
#pragma once
#include <utility>

#include "operands.h"

namespace rnnkern::RNNKERN_ISA {

// Rows of a matrix, read as columns: out[i][l] = source[l * ld + i] for kColumns consecutive i.
// Half a register of each row comes in one piece.
template <class F>
struct TransposeLoad {
  using V = Vec<F>;
  using Raw = typename V::Raw;
  static constexpr int kLanes = V::kLanes, kPieces = kBytes > 16 ? 2 : 1,
                       kColumns = kLanes / kPieces;
  static constexpr int kQuarter = 16 / sizeof(F);  // of a register: what most shuffles stay in

  RNNKERN_INLINE static Raw gather(const F* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
    // Inserted from memory, which spares the one port that shuffles.
    const auto piece = [](const F* p) __attribute__((always_inline)) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm512_insertf32x8(_mm512_castps256_ps512(piece(p)), piece(p + step), 1));
#elif defined(__AVX2__)
    const auto piece = [](const F* p) __attribute__((always_inline)) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm256_insertf128_ps(_mm256_castps128_ps256(piece(p)), piece(p + step), 1));
#else
    return V::load(p).v;
#endif
  }
  // Per quarter: the lower (or upper) halves of a and b, interleaved.
  template <int kHigh, int... I>
  RNNKERN_INLINE static Raw interleave(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b,
        (I / kQuarter * kQuarter + kHigh * kQuarter / 2 + I % kQuarter / 2 + I % 2 * kLanes)...);
  }
  // The even (or odd) quarters of a, then those of b.
  template <int kOdd, int... I>
  RNNKERN_INLINE static Raw quarters(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b, (2 * (I / kQuarter) * kQuarter + kOdd * kQuarter + I % kQuarter)...);
  }

  RNNKERN_INLINE static void load(const F* source, int64_t ld, Raw* out) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i)
      out[i] =
          gather(source + (i / kQuarter * kPieces * kQuarter + i % kQuarter) * ld, kQuarter * ld);
#pragma GCC unroll 2
    for (int g = 0; g < kColumns; g += kQuarter)
#pragma GCC unroll 2
      for (int rounds = kQuarter; rounds > 1; rounds /= 2) {
        Raw row[kQuarter];
#pragma GCC unroll 4
        for (int i = 0; i < kQuarter; ++i) row[i] = out[g + i];
#pragma GCC unroll 2
        for (int i = 0; i < kQuarter / 2; ++i) {
          out[g + 2 * i] = interleave<0>(row[i], row[i + kQuarter / 2], all);
          out[g + 2 * i + 1] = interleave<1>(row[i], row[i + kQuarter / 2], all);
        }
      }
    if constexpr (kColumns > kQuarter) {
#pragma GCC unroll 4
      for (int i = 0; i < kQuarter; ++i) {
        const Raw a = out[i], b = out[i + kQuarter];
        out[i] = quarters<0>(a, b, all);
        out[i + kQuarter] = quarters<1>(a, b, all);
      }
    }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
