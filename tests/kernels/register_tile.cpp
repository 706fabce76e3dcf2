// One register tile, for test_register_tile.py, which reads its assembly.
#include "../../csrc/cpu/gemm/gemm_simd.h"

namespace rnnkern::RNNKERN_ISA {

template void microkernel<TILE_ELEMENT, TILE_VARIANT, max_mr(TILE_VECTORS), TILE_VECTORS, 0>(
    const GemmOperands<TILE_ELEMENT>*, int, int64_t, int, const COperand<Acc<TILE_ELEMENT>>&,
    const Prefetch<TILE_ELEMENT>&);

}  // namespace rnnkern::RNNKERN_ISA
