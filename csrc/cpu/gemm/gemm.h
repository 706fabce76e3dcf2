// gemm(): the one entry to the matrix products of packed operands.
#pragma once
#include "gemm_amx.h"

namespace rnnkern::RNNKERN_ISA {

// C = beta C + sum_i A_i B_i for up to kMC rows, 1 to kMaxNR vectors and up to kMaxBatch operand
// pairs. Column-major A comes as one pair, without init.
template <class F>
RNNKERN_INLINE void gemm(int rows, int vectors, const GemmOperands<F>* terms, int count,
                         const COperand<Acc<F>>& tile) {
#if defined(RNNKERN_AMX)
  if (terms[0].a_k_stride == 1) return gemm_amx(rows, vectors, terms, count, tile);
#endif
  gemm_simd(rows, vectors, terms, count, tile);
}

}  // namespace rnnkern::RNNKERN_ISA
