// Software prefetch of the next block of B to the L2, spread over the k loops of a macrokernel.
#pragma once
#include "operands.h"

namespace rnnkern::RNNKERN_ISA {

// The first `tiles` tiles of a block prefetch `lines` cache lines per k: tile i at k touches
// from + i * tile_stride + k * k_stride. No more lines than needed: each takes a load slot.
template <class F>
struct Prefetch {
  const F* from;
  int64_t k_stride, tile_stride;
  int lines, tiles;
};
constexpr int kMaxPrefetchLines = 2;

// What to prefetch during the block before the one that begins with k = next: the panel's next
// rows or, where A is column-major, A's next columns.
template <class F>
RNNKERN_INLINE Prefetch<F> prefetch_before(const GemmOperands<F>& ab, int rows, int nr,
                                           int64_t next) {
  const F* from = ab.next_b;
  if (next < ab.k)
    from = !ab.prefetch_b       ? nullptr
           : ab.a_k_stride == 1 ? ab.b + next * ab.ldb
                                : ab.a + next * ab.a_k_stride;
  if (!from) return {};
  if (ab.a_k_stride == 1) {
    // All lines of a row of B; two per k where there are too few tiles for one each.
    const int wanted = int((nr * Vec<F>::kLanes + kLineElems<F> - 1) / kLineElems<F>);
    const int lines = rows > (wanted - 1) * max_mr(nr) ? 1 : kMaxPrefetchLines;
    return {from, lines * kLineElems<F>, kKC * lines * kLineElems<F>, lines,
            (wanted + lines - 1) / lines};
  }
  const int begin = int(reinterpret_cast<uintptr_t>(from) / sizeof(F) % kLineElems<F>);
  return {from, ab.a_k_stride, kLineElems<F>, 1,
          int((begin + rows + kLineElems<F> - 1) / kLineElems<F>)};
}

}  // namespace rnnkern::RNNKERN_ISA
