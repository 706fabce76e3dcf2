// The types of the numbers in tensors, and the type each is added up in.
#pragma once
#include <cstdint>

namespace rnnkern {

// The upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

// Two bfloat16 of consecutive terms of a sum, multiplied and added up by one instruction. They may
// begin at any bfloat16 of a row.
struct __attribute__((may_alias)) bf16x2 {
  bfloat16 first, second;
};

template <class T>
struct AccOf {
  using Type = T;
};
template <>
struct AccOf<bfloat16> {
  using Type = float;
};
template <>
struct AccOf<bf16x2> {
  using Type = float;
};
// What products of T are added up in, and states are kept in.
template <class T>
using Acc = typename AccOf<T>::Type;

template <class T>
struct PackedElemOf {
  using Type = T;
};
template <>
struct PackedElemOf<bfloat16> {
  using Type = bf16x2;
};
// What a product takes at a time: so many terms of its sum.
template <class T>
using PackedElem = typename PackedElemOf<T>::Type;
template <class T>
constexpr int kVnniFactor = sizeof(PackedElem<T>) / sizeof(T);

template <class T>
inline __attribute__((always_inline)) Acc<T> value(T x) {
  if constexpr (sizeof(T) == 2)
    return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
  else
    return x;
}

// The nearest bfloat16, the even one of two as near; a NaN stays one, and is quiet.
inline __attribute__((always_inline)) bfloat16 nearest(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <class T>
constexpr T one() {
  if constexpr (sizeof(T) == 2)
    return {0x3F80};
  else
    return 1;
}

// A row of T as a row of factors.
template <class T>
inline __attribute__((always_inline)) PackedElem<T>* factors(T* row) {
  return reinterpret_cast<PackedElem<T>*>(row);
}
template <class T>
inline __attribute__((always_inline)) const PackedElem<T>* factors(const T* row) {
  return reinterpret_cast<const PackedElem<T>*>(row);
}

}  // namespace rnnkern
