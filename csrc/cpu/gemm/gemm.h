// gemm(): the one entry to the matrix products of packed operands.
#pragma once
#include "gemm_amx.h"

namespace rnnkern::RNNKERN_ISA {

// C = beta C + sum_i A_i B_i for up to kMC rows, 1 to kMaxNR vectors and up to kMaxBatch operand
// pairs. Column-major A comes as one pair, without init.
template <class F>
RNNKERN_INLINE void gemm(int rows, int nr, const GemmOperands<F>* pairs, int count,
                         const COperand<Acc<F>>& c) {
#if defined(RNNKERN_AMX)
  if (pairs[0].a_k_stride == 1) return gemm_amx(rows, nr, pairs, count, c);
#endif
  gemm_simd(rows, nr, pairs, count, c);
}

}  // namespace rnnkern::RNNKERN_ISA
