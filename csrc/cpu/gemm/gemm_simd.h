// The GEMM in vectors: KC block by KC block of k, register tile by register tile.
//
//   for each KC block of k               gemm_simd
//     for each tile of rows, MR high     macrokernel
//       for each k                       microkernel
#pragma once
#include <utility>

#include "engine_gemm.h"
#include "microkernel.h"

namespace rnnkern::RNNKERN_ISA {

// The microkernels of one width, by lines to prefetch per k and by MR - 1.
template <class F, int kMaxMR>
struct MicrokernelTable {
  void (*of[1 + kMaxPrefetchLines][kMaxMR])(const GemmOperands<F>*, int, int64_t, int,
                                            const COperand<Acc<F>>&, const Prefetch<F>&);
};

// One KC block of up to kMC rows: tiles of nearly equal height.
template <class F, class Variant, int NR>
void macrokernel(int rows, const GemmOperands<F>* pairs, int count, const COperand<Acc<F>>& c,
                 Prefetch<F> prefetch) {
  constexpr int kMaxMR = max_mr(NR);
  constexpr int kLines = Variant::kBf16B ? 0 : 1;  // half the bytes come without
  static constexpr auto table = []<int... n>(std::integer_sequence<int, n...>) {
    return MicrokernelTable<F, kMaxMR>{{{microkernel<F, Variant, n + 1, NR, 0>...},
                                        {microkernel<F, Variant, n + 1, NR, kLines>...},
                                        {microkernel<F, Variant, n + 1, NR, 2 * kLines>...}}};
  }(std::make_integer_sequence<int, kMaxMR>());
  const int tiles = (rows + kMaxMR - 1) / kMaxMR;
  const int height = tiles == 1 ? rows : (rows + tiles - 1) / tiles;
  const int high = rows - tiles * (height - 1);  // tiles of this height; the others have a row less
  int64_t row = 0;
  const auto run = [&](int height, int tiles) {
    while (tiles > 0) {
      const bool prefetches = prefetch.tiles > 0;
      const int n = prefetches ? min(tiles, prefetch.tiles) : tiles;
      table.of[prefetches ? prefetch.lines : 0][height - 1](pairs, count, row, n, c, prefetch);
      row += n * height, tiles -= n;
      prefetch.tiles -= n, prefetch.from += n * prefetch.tile_stride;
    }
  };
  run(height, high);
  run(height - 1, tiles - high);
}

// The macrokernel for a variant and a width.
template <class F, bool kBf16B>
RNNKERN_INLINE void run_macrokernel(int rows, int nr, const GemmOperands<F>* pairs, int count,
                                    const COperand<Acc<F>>& c, const Prefetch<F>& prefetch) {
  const auto of_variant = [&]<class Variant>(Variant) {
    using Macrokernel =
        void (*)(int, const GemmOperands<F>*, int, const COperand<Acc<F>>&, Prefetch<F>);
    static constexpr Macrokernel of_nr[kMaxNR] = {
        macrokernel<F, Variant, 1>, macrokernel<F, Variant, 2>, macrokernel<F, Variant, 3>,
        macrokernel<F, Variant, 4>};
    of_nr[nr - 1](rows, pairs, count, c, prefetch);
  };
  if constexpr (kBf16B) {
    if (c.init) return of_variant(WithBf16B<RowMajorAWithInit>());
    return of_variant(WithBf16B<RowMajorA>());
  }
  if (pairs[0].a_k_stride != 1)
    of_variant(ColumnMajorA());
  else if (c.init)
    of_variant(RowMajorAWithInit());
  else
    of_variant(RowMajorA());
}

#if defined(RNNKERN_GEMM_OF_ENGINE)
template <class F, bool kBf16B = false>
RNNKERN_INLINE void gemm_simd(int rows, int nr, const GemmOperands<F>* pairs, int count,
                              const COperand<Acc<F>>& c) {
  engine_gemm(rows, nr, pairs, count, c, kBf16B);
}
#else
// gemm() in vectors. Operand pairs of one KC block each share a pass over the tiles. With kBf16B,
// every B has rows of two k in bfloat16 (pack_bf16): ldb is half of such a row.
template <class F, bool kBf16B = false>
void gemm_simd(int rows, int nr, const GemmOperands<F>* pairs, int count, COperand<Acc<F>> c) {
  for (int i = 0; i < count;) {
    GemmOperands<F> blocks[kMaxBatch];
    int n = 0;
    do blocks[n] = block_of(pairs[i], 0);
    while (blocks[n++].k == pairs[i++].k && i < count);
    const GemmOperands<F>& last = pairs[i - 1];
    int64_t next = blocks[n - 1].k;
    run_macrokernel<F, kBf16B>(rows, nr, blocks, n, c, prefetch_before(last, rows, nr, next));
    c.init = nullptr, c.accumulate = true;
    while (next < last.k) {
      const GemmOperands<F> block = block_of(last, next);
      next += block.k;
      run_macrokernel<F, kBf16B>(rows, nr, &block, 1, c, prefetch_before(last, rows, nr, next));
    }
    c = c.continued();
  }
}
#endif

}  // namespace rnnkern::RNNKERN_ISA
