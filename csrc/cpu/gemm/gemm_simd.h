// The GEMM in vectors: KC block by KC block of k, register tile by register tile.
#pragma once
#include <utility>

#include "microkernel.h"

namespace rnnkern::RNNKERN_ISA {

template <class F, int kMost>
struct MicrokernelTable {
  void (*of_rows[1 + kMaxPrefetchLines][kMost])(const GemmOperands<F>*, int, int64_t, int,
                                                const COperand<Acc<F>>&, const Prefetch<F>&);
};

// The tiles of one KC block for up to kMC rows.
template <class F, class Kind, int kVectors>
void macrokernel(int rows, const GemmOperands<F>* terms, int count, const COperand<Acc<F>>& tile,
                 Prefetch<F> ahead) {
  constexpr int kMost = max_mr(kVectors);
  static constexpr auto table = []<int... n>(std::integer_sequence<int, n...>) {
    return MicrokernelTable<F, kMost>{{{microkernel<F, Kind, n + 1, kVectors, 0>...},
                                       {microkernel<F, Kind, n + 1, kVectors, 1>...},
                                       {microkernel<F, Kind, n + 1, kVectors, 2>...}}};
  }(std::make_integer_sequence<int, kMost>());
  // Tiles of nearly equal height: `high` of them, the others one row less.
  const int tiles = (rows + kMost - 1) / kMost;
  const int height = tiles == 1 ? rows : (rows + tiles - 1) / tiles;
  const int high = rows - tiles * (height - 1);
  int64_t first = 0;
  const auto run = [&](int height, int tiles) {
    while (tiles > 0) {
      const int n = ahead.tiles > 0 ? min(tiles, ahead.tiles) : tiles;
      table.of_rows[ahead.tiles > 0 ? ahead.lines : 0][height - 1](terms, count, first, n, tile,
                                                                   ahead);
      first += n * height, tiles -= n;
      ahead.tiles -= n, ahead.from += n * ahead.tile_stride;
    }
  };
  run(height, high);
  run(height - 1, tiles - high);
}

// gemm() in vectors. Operand pairs of one KC block each share a pass over the tiles.
template <class F>
void gemm_simd(int rows, int vectors, const GemmOperands<F>* terms, int count,
               COperand<Acc<F>> tile) {
  const auto multiply = [&](const GemmOperands<F>* blocks, int n, const Prefetch<F>& ahead) {
    const auto of_kind = [&]<class Kind>(Kind) {
      using Macrokernel =
          void (*)(int, const GemmOperands<F>*, int, const COperand<Acc<F>>&, Prefetch<F>);
      static constexpr Macrokernel of_vectors[kMaxNR] = {
          macrokernel<F, Kind, 1>, macrokernel<F, Kind, 2>, macrokernel<F, Kind, 3>,
          macrokernel<F, Kind, 4>};
      of_vectors[vectors - 1](rows, blocks, n, tile, ahead);
    };
    if (blocks[0].a_k_stride != 1)
      of_kind(ColumnMajorA());
    else if (tile.init)
      of_kind(RowMajorAWithInit());
    else
      of_kind(RowMajorA());
  };
  for (int i = 0; i < count;) {
    GemmOperands<F> blocks[kMaxBatch];
    int n = 0;
    do blocks[n] = block_of(terms[i], 0);
    while (blocks[n++].k == terms[i++].k && i < count);
    const GemmOperands<F>& last = terms[i - 1];
    int64_t next = blocks[n - 1].k;
    multiply(blocks, n, prefetch_before(last, rows, vectors, next));
    tile.init = nullptr, tile.accumulate = true;
    while (next < last.k) {
      const GemmOperands<F> block = block_of(last, next);
      next += block.k;
      multiply(&block, 1, prefetch_before(last, rows, vectors, next));
    }
    tile = tile.continued();
  }
}

}  // namespace rnnkern::RNNKERN_ISA
