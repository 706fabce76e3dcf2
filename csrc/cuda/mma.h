// Matrix products of a warp, C += A B, by mma.sync: m16n8k16 for bfloat16 and half, and m16n8k8 in
// three TF32 passes for float. Fragments are one lane's share of an operand; cluster/fragments.h
// says how those of a layer are stored.
//
// With g = lane / 4 and q = lane % 4, for two-byte elements, two to a register:
//
//           k = 2q, 2q+1   2q+8, 2q+9                      n = g                   n = 2q, 2q+1
//   m = g     [ A.reg 0 ]  [ A.reg 2 ]     k = 2q, 2q+1  [ B.reg 0 ]     m = g     [ C 0, C 1 ]
//   m = g+8   [ A.reg 1 ]  [ A.reg 3 ]     k = 2q+8, +9  [ B.reg 1 ]     m = g+8   [ C 2, C 3 ]
//
// so that the lanes cover the upper left 8 x 8 corner of A (columns 0 to 7) as
//
//   k     0 1   2 3   4 5   6 7
//   m 0    0     1     2     3
//   m 1    4     5     6     7
//     .    .     .     .     .
//   m 7   28    29    30    31
//
// For float one element fills a register: k is q and q + 4, and K is 8.
#pragma once
#include "ptx.h"

#if defined(RNNKERN_CUDA_ON_HOST)
#include "mma_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rnnkern::cuda {

// One instruction.
template <class T>
RNNKERN_DEVICE void mma_sync(float (&acc)[4], const U32x4& a, const U32x2& b);

#define RNNKERN_MMA(T, MMA)                                                                      \
  template <>                                                                                    \
  __device__ __forceinline__ void mma_sync<T>(float (&acc)[4], const U32x4& a, const U32x2& b) { \
    asm("mma.sync.aligned." MMA                                                                  \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                 \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                 \
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]),             \
          "r"(b.reg[1]));                                                                        \
  }
RNNKERN_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16")
RNNKERN_MMA(__half, "m16n8k16.row.col.f32.f16.f16")
RNNKERN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32")
#undef RNNKERN_MMA

}  // namespace rnnkern::cuda
#endif

namespace rnnkern::cuda {

using AFragment = U32x4;

template <class T>
struct BFragment {
  U32x2 regs;

  RNNKERN_DEVICE_MEMBER explicit BFragment(const U32x2& r) : regs(r) {}
};

template <class T>
RNNKERN_DEVICE void mma(float (&acc)[4], const AFragment& a, const BFragment<T>& b) {
  mma_sync<T>(acc, a, b.regs);
}

// TF32 has 11 significant bits. x = high + low with both in TF32; a b without low low is right to
// about 2^-22.
RNNKERN_DEVICE void split_tf32(uint32_t reg, uint32_t* high, uint32_t* low) {
  *high = (reg + 0x1000u) & 0xffffe000u;
  float whole, upper;
  memcpy(&whole, &reg, 4);
  memcpy(&upper, high, 4);
  const float rest = whole - upper;
  memcpy(low, &rest, 4);
}

template <>
struct BFragment<float> {
  U32x2 high, low;

  RNNKERN_DEVICE_MEMBER explicit BFragment(const U32x2& r) {
    RNNKERN_UNROLL
    for (int i = 0; i < 2; ++i) split_tf32(r.reg[i], &high.reg[i], &low.reg[i]);
  }
};

RNNKERN_DEVICE void mma(float (&acc)[4], const AFragment& a, const BFragment<float>& b) {
  AFragment high, low;
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) split_tf32(a.reg[i], &high.reg[i], &low.reg[i]);
  // Tensor cores truncate what they accumulate; the long sum is made here, where it is rounded.
  float part[4] = {};
  mma_sync<float>(part, low, b.high);
  mma_sync<float>(part, high, b.low);
  mma_sync<float>(part, high, b.high);
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) acc[i] += part[i];
}

}  // namespace rnnkern::cuda
