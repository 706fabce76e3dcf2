// float32 in three parts of bfloat16, which matrix registers multiply sixteen times as fast as
// vectors multiply float32.
//
//   x = p0 + p1 + p2,  each the nearest bfloat16 of what the ones before it leave
//   x y = p0 q0 + p0 q1 + p1 q0 + p1 q1 + p0 q2 + p2 q0, to 2^-24 of it or better
//
// Three times 8 bits hold all 24 of a float32, and sums are of float32, so that a product errs as
// one of float32 does (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations"). What it cannot do: an infinity, or a
// number that rounds to one, has no further parts (a call that meets one is taken once more, in
// vectors), and parts below 2^-126 are zero.
//
// A row or a panel in parts has, for each 16 pairs, those of the first parts, of the second and of
// the third.
#pragma once
#include <utility>

#include "matrix_registers.h"

namespace rnnkern::RNNKERN_ISA {

// Whether the products of T go in parts, where the plan says so; the forward pass's never do: a row
// alone, which is not worth matrix registers, must give the same bits as among others.
template <class T>
constexpr bool kInParts = kMatrixRegisters && std::is_same_v<T, float>;

// What the backward pass's products take at a time.
template <class T>
using Operand = std::conditional_t<kInParts<T>, BfloatPair, Factor<T>>;

constexpr int kParts = 3;
constexpr int64_t kPartsBlock = kParts * kMatrixDepth;  // pairs

// Pairs of a row of so many numbers in parts; it ends in zeros.
constexpr int64_t pairs_in_parts(int64_t numbers) {
  return filled_blocks((numbers + 1) / 2) * kParts;
}
// Where the first part of pair k stands.
constexpr int64_t pair_in_parts(int64_t k) {
  return k / kMatrixDepth * kPartsBlock + k % kMatrixDepth;
}

// Zero as long as all numbers that were split have parts, NaN from the first that has none on.
using PartsCheck = Vec<float>;

struct Parts {
  Vec<float> part[kParts];

  RNNKERN_INLINE Parts(Vec<float> x, PartsCheck& check) {
    // Ties go away from zero, which is as near. What is left has 16 bits, then 8: both exact.
    const auto rounded = [](Vec<float> x) __attribute__((always_inline)) {
      return Vec<float>::from_bits((x.bits() + 0x8000) & ~0xFFFF);
    };
    part[0] = rounded(x);
    const Vec<float> rest = x - part[0];
    check = check + rest * Vec<float>(0.f);
    part[1] = rounded(rest);
    part[2] = rest - part[1];
  }
};

// Pairs of numbers in the same lanes of two rows.
RNNKERN_INLINE void store_pairs(const Parts& first, const Parts& second, BfloatPair* out,
                                int64_t part_step, bool past_caches = false) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i, out += part_step) {
    using Bits = RawTypes<float>::Bits;
    typedef uint32_t Unsigned __attribute__((vector_size(kBytes)));
    const Bits low = Bits(Unsigned(first.part[i].bits()) >> 16);
    const Vec<BfloatPair> pairs = RawTypes<BfloatPair>::Raw(low | second.part[i].bits());
    past_caches ? pairs.stream(out) : pairs.store(out);
  }
}

// Numbers in neighbouring lanes of two registers, the second of which follows the first.
template <int... i>
RNNKERN_INLINE void store_row(const Parts& first, const Parts& second, BfloatPair* out,
                              std::integer_sequence<int, i...>) {
  typedef int16_t Halves __attribute__((vector_size(kBytes)));
#pragma GCC unroll 3
  for (int p = 0; p < kParts; ++p) {
    const Halves a = Halves(first.part[p].v), b = Halves(second.part[p].v);
    // The upper half of each.
    const Halves upper = __builtin_shufflevector(a, b, (2 * i + 1)...);
    Vec<BfloatPair>(RawTypes<BfloatPair>::Raw(upper)).store(out + p * kMatrixDepth);
  }
}

// `count` numbers as the pairs of a row from number `begin` on, with which a block begins. Where
// they do not end one, they are filled up with zeros.
RNNKERN_INLINE void split_row(const float* x, int64_t begin, int64_t count, BfloatPair* row,
                              PartsCheck& check) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  const int64_t filled = 2 * filled_blocks((count + 1) / 2);
  for (int64_t c = 0; c < filled; c += 2 * kLanes) {
    const auto load = [&](int64_t at) __attribute__((always_inline)) {
      const int64_t left = count - at;
      return left >= kLanes ? V::load(x + at) : left > 0 ? V::load(x + at, int(left)) : V(0.f);
    };
    store_row(Parts(load(c), check), Parts(load(c + kLanes), check),
              row + pair_in_parts((begin + c) / 2), std::make_integer_sequence<int, 2 * kLanes>());
  }
}

}  // namespace rnnkern::RNNKERN_ISA
