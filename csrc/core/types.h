// Element types of tensors, their accumulators, and the operand of one FMA.
#pragma once
#include <cstdint>

// Every engine function in a header is always inlined or in a namespace of its own instruction set:
// the linker would else keep one copy for all of them.
#define RNNKERN_INLINE inline __attribute__((always_inline))

// The engine is a library of its own: what the bindings use of it.
#define RNNKERN_API __attribute__((visibility("default")))

namespace rnnkern {

// The upper half of a float.
struct RNNKERN_API bfloat16 {
  uint16_t bits;
};

// Two bfloat16 of consecutive k: the operand of vdpbf16ps and of AMX. Aligned as bfloat16.
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
// Accumulator of T: the type of sums, and of states that are carried over time.
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
// Element of one FMA: T, or two bf16 for vdpbf16ps (VNNI factor 2).
template <class T>
using PackedElem = typename PackedElemOf<T>::Type;
template <class T>
constexpr int kVnniFactor = 1;
template <>
inline constexpr int kVnniFactor<bfloat16> = 2;

template <class T>
RNNKERN_INLINE Acc<T> to_acc(T x) {
  if constexpr (sizeof(T) == 2)
    return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
  else
    return x;
}

// Round to nearest even; a NaN stays one and becomes quiet.
RNNKERN_INLINE bfloat16 round_to_bf16(float x) {
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

// A row of T as a row of packed elements.
template <class T>
RNNKERN_INLINE PackedElem<T>* as_packed(T* row) {
  return reinterpret_cast<PackedElem<T>*>(row);
}
template <class T>
RNNKERN_INLINE const PackedElem<T>* as_packed(const T* row) {
  return reinterpret_cast<const PackedElem<T>*>(row);
}

}  // namespace rnnkern
