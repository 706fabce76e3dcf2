// transpose_load: rows of a matrix in memory as columns in registers.
//
//   out[i][l] = source[l * ld + i]   for a register's kLanes rows l and kColumns columns i
//
// A 128-bit lane holds kLane elements, here 4 floats. transpose_lanes transposes kLane registers
// lane by lane: lane q of register i becomes element i of lane q of each register.
//
// SSE2 and others, kColumns = 4:
//
//   loaded          r0..r3:  row i [0..3]
//   transpose_lanes      ->  column i of rows 0..3
//
// AVX2, kColumns = 4: two rows per register.
//
//   loaded          r0..r3:  row i [0..3]          | row i+4 [0..3]
//   transpose_lanes      ->  column i of rows 0..3 | column i of rows 4..7
//
// AVX-512, kColumns = 8: half a register of each of 16 rows, in two groups.
//
//   loaded          r0..r3:  row i [0..3]   | row i [4..7]   | row i+4 [0..3] | row i+4 [4..7]
//                   r4..r7:  likewise rows i+8 and i+12
//   transpose_lanes      ->  col i, 0..3    | col i+4, 0..3  | col i, 4..7    | col i+4, 4..7
//                            (of rows 0..3 and 4..7; r4..r7: of rows 8..11 and 12..15)
//   even lanes of ri, ri+4:  col i, 0..3    | col i, 4..7    | col i, 8..11   | col i, 12..15
//   odd lanes, likewise:     col i+4
#pragma once
#include <utility>

#include "operands.h"

namespace rnnkern::RNNKERN_ISA {

template <class F>
struct TransposeLoad {
  using V = Vec<F>;
  using Raw = typename V::Raw;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kLane = 16 / sizeof(F);  // elements of a 128-bit lane
  static constexpr int kColumns = kBytes == 64 ? 2 * kLane : kLane;

#if defined(__AVX512F__)
  RNNKERN_INLINE static void load(const F* source, int64_t ld, Raw* out) {
#pragma GCC unroll 2
    for (int group = 0; group < 2; ++group) {
#pragma GCC unroll 4
      for (int i = 0; i < kLane; ++i) {
        const F* row = source + (2 * kLane * group + i) * ld;
        out[kLane * group + i] = load_halves(row, row + kLane * ld);
      }
      transpose_lanes(out + kLane * group);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLane; ++i) {
      const Raw first = out[i], second = out[kLane + i];
      out[i] = every_other_lane<0>(first, second, kAll);
      out[kLane + i] = every_other_lane<1>(first, second, kAll);
    }
  }
#else
  RNNKERN_INLINE static void load(const F* source, int64_t ld, Raw* out) {
#pragma GCC unroll 4
    for (int i = 0; i < kLane; ++i) {
      const F* row = source + i * ld;
#if defined(__AVX2__)
      out[i] = load_halves(row, row + kLane * ld);
#else
      out[i] = V::load(row).v;
#endif
    }
    transpose_lanes(out);
  }
#endif

 private:
  static constexpr auto kAll = std::make_integer_sequence<int, kLanes>();

  // Half a register from each row. The second is inserted from memory, which spares the one port
  // that shuffles.
#if defined(__AVX512F__)
  RNNKERN_INLINE static Raw load_halves(const F* row, const F* other) {
    const auto half = [](const F* p) __attribute__((always_inline)) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm512_insertf32x8(_mm512_castps256_ps512(half(row)), half(other), 1));
  }
#elif defined(__AVX2__)
  RNNKERN_INLINE static Raw load_halves(const F* row, const F* other) {
    const auto half = [](const F* p) __attribute__((always_inline)) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm256_insertf128_ps(_mm256_castps128_ps256(half(row)), half(other), 1));
  }
#endif

  // Each round interleaves register i with register i + kLane / 2; log2(kLane) rounds transpose.
  RNNKERN_INLINE static void transpose_lanes(Raw* out) {
#pragma GCC unroll 2
    for (int round = kLane; round > 1; round /= 2) {
      Raw in[kLane];
#pragma GCC unroll 4
      for (int i = 0; i < kLane; ++i) in[i] = out[i];
#pragma GCC unroll 2
      for (int i = 0; i < kLane / 2; ++i) {
        out[2 * i] = unpack<0>(in[i], in[i + kLane / 2], kAll);
        out[2 * i + 1] = unpack<1>(in[i], in[i + kLane / 2], kAll);
      }
    }
  }

  // x86's unpacklo and unpackhi: a's and b's lower (or upper) half of each lane, interleaved.
  static constexpr int unpack_index(int i, int high) {
    const int lane = i / kLane * kLane, half = high * kLane / 2, pair = i % kLane / 2;
    const int of_b = i % 2 * kLanes;
    return of_b + lane + half + pair;
  }
  template <int kHigh, int... I>
  RNNKERN_INLINE static Raw unpack(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, unpack_index(I, kHigh)...);
  }

  // The even (or odd) lanes of a, then those of b.
  static constexpr int lane_index(int i, int odd) {
    return (2 * (i / kLane) + odd) * kLane + i % kLane;
  }
  template <int kOdd, int... I>
  RNNKERN_INLINE static Raw every_other_lane(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, lane_index(I, kOdd)...);
  }
};

}  // namespace rnnkern::RNNKERN_ISA
