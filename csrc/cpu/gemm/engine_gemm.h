// The engine's GEMM for the libraries of added cells. It does not depend on the cell, and a
// compiler takes most of its time for it: a cell's library has none of its own, but calls the
// engine's of the same level (RNNKERN_GEMM_OF_ENGINE).
#pragma once
#include "operands.h"

namespace rnnkern::RNNKERN_ISA {

template <class F>
struct UnpackedOperands;
struct Int8Rows;
struct Int8Matrix;

// gemm_simd(), gemm_unpacked() and gemm_int8(), with their arguments.
RNNKERN_API void engine_gemm(int rows, int nr, const GemmOperands<float>* pairs, int count,
                             const COperand<float>& c, bool bf16_b);
RNNKERN_API void engine_gemm(int rows, int nr, const GemmOperands<double>* pairs, int count,
                             const COperand<double>& c, bool bf16_b);
RNNKERN_API void engine_gemm_unpacked(int rows, int nr, const UnpackedOperands<float>* pairs,
                                      int count, const COperand<float>& c);
RNNKERN_API void engine_gemm_unpacked(int rows, int nr, const UnpackedOperands<double>* pairs,
                                      int count, const COperand<double>& c);
RNNKERN_API void engine_gemm_int8(int rows, int nr, const Int8Rows& a, const Int8Matrix& b,
                                  int64_t column, int64_t lanes, const COperand<float>& c);

}  // namespace rnnkern::RNNKERN_ISA
