// The backward pass of W_hh in heads (heads.h): dh = dgates W_hh and dW_hh = dgates^T h, for the
// units of each panel's heads.
#pragma once
#include "heads.h"
#include "packed_weights.h"
#include "wgrad.h"

namespace rnnkern::RNNKERN_ISA {

// The layout of columns that are units of h: panels that heads consist of, where there are such.
template <class F>
PackedLayout<F> head_layout(int64_t units, int64_t heads) {
  constexpr int64_t kLanes = Vec<F>::kLanes;
  const int64_t head_units = units / max<int64_t>(heads, 1), vectors = head_units / kLanes;
  int width = int(min<int64_t>(max<int64_t>(vectors, 1), kMaxNR));
  if (head_units % kLanes == 0)
    while (width > 1 && vectors % width) --width;
  return {units, 1, width};
}
template <class F>
HeadRange head_range(const PackedLayout<F>& panels, int64_t heads) {
  return {panels.units, heads, panels.blocks_per_panel * Vec<F>::kLanes};
}

// B of dh = dgates W_hh. A panel has the rows of its own k alone, gate by gate.
template <class T>
struct HeadWeights : PackedWeights<T> {
  using typename PackedWeights<T>::S;
  using typename PackedWeights<T>::F;
  using PackedWeights<T>::panels, PackedWeights<T>::packed, PackedWeights<T>::gates,
      PackedWeights<T>::k;

  HeadRange range;

  HeadWeights(PackedLayout<F> panels, int64_t heads, const T* w_hh, int gates, int (*gate_of)(int))
      : PackedWeights<T>{panels, w_hh,    nullptr, head_range(panels, heads).depth,
                         gates,  gate_of, false},
        range(head_range(panels, heads)) {}

  void pack(Team team) const {
    const int64_t count = panels.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int64_t first = panels.first_unit(panel), ldb = panels.ldb(panel);
      const int64_t last = min(first + ldb, panels.units), begin = range.begin(first);
      F* row = packed + panels.offset(panel) * k();
      std::memset(row, 0, k() * ldb * sizeof(F));
      for (int s = 0; s < gates; ++s)
        for (int64_t unit = begin; unit < begin + range.depth; ++unit, row += ldb) {
          const int64_t head = range.head_begin(unit);
          const int64_t c0 = max(head, first), c1 = min(head + range.head_units, last);
          const T* const from = range.weights(this->weight, gates, this->gate_of(s), unit);
          if (c0 < c1) std::memcpy(row + c0 - first, from + c0 - head, (c1 - c0) * sizeof(T));
        }
    }
  }

  // As PackedWeights has it.
  void gemm_accumulate(const BlockedMatrix<const F>& a, int64_t rows, int64_t panel,
                       StridedRows<S> out, int64_t = -1) const {
    const int64_t begin = range.begin(panels.first_unit(panel)), ldb = panels.ldb(panel);
    const F* const b = packed + panels.offset(panel) * k();
    GemmOperands<F> pairs[kMaxBatch];
    for (int s = 0; s < gates; ++s)
      pairs[s] = {a.at(0, s * range.units + begin),
                  a.ld,
                  1,
                  range.depth,
                  b + s * range.depth * ldb,
                  ldb,
                  a.block_stride};
    this->multiply(pairs, gates, rows, panels.nr(panel), out);
  }
};

// The gradient of W_hh, (heads, G H / heads, H / heads). dG's columns from first_preact * hidden on
// belong to the rows of gate_of(0), gate_of(1), ... of all heads.
template <class T>
struct HeadWgrad {
  using S = Acc<T>;
  using F = PackedElem<T>;

  S* grad;
  PackedLayout<F> panels;  // of h
  HeadRange range;
  int first_preact, gates;
  int (*gate_of)(int);

  // Accumulates a chunk, given h's rows; the team splits the panels.
  template <class RowAt>
  void accumulate(const WgradArgs<T>& chunk, RowAt row_at) const {
    if (!grad) return;
    const int64_t count = panels.count();
    for (int64_t panel = chunk.team.begin(count); panel < chunk.team.end(count); ++panel) {
      pack_rows<T>(panels, panel, chunk.rows, chunk.in_order(row_at), chunk.k(), chunk.panel);
      const int64_t begin = range.begin(panels.first_unit(panel)), end = begin + range.depth;
      for (int s = 0; s < gates; ++s)
        for (int64_t unit = begin, stop; unit < end; unit = stop) {
          stop = chunk.dgates.is_blocked() ? min(end, (unit / kKC + 1) * kKC) : end;
          multiply(chunk, panel, s, unit, stop);
        }
    }
  }

 private:
  // Rows of a panel; the last vector of the last one is read whole.
  static constexpr int kTile = (kMC * kMaxNR + 1) * Vec<S>::kLanes;

  // Rows of units [begin, end) of a gate.
  void multiply(const WgradArgs<T>& chunk, int64_t panel, int s, int64_t begin, int64_t end) const {
    const int64_t ldb = panels.ldb(panel), column = (first_preact + s) * range.units + begin;
    const F* const dgates = chunk.dgates.at(0, column);
    for_mc_blocks(end - begin, [&](int64_t r, int n) {
      alignas(64) S tile[kTile];
      const GemmOperands<F> ab{dgates + r, 1, chunk.dgates.ld, chunk.k(), chunk.panel, ldb};
      gemm(n, panels.nr(panel), &ab, 1, COperand<S>{nullptr, 0, tile, ldb});
      for (int i = 0; i < n; ++i) write(chunk, panel, s, begin + r + i, tile + i * ldb);
    });
  }

  // Of a unit's row of a panel what belongs to its own head.
  void write(const WgradArgs<T>& chunk, int64_t panel, int s, int64_t unit, const S* row) const {
    const int64_t first = panels.first_unit(panel), ldb = panels.ldb(panel);
    const int64_t head = range.head_begin(unit), c0 = max(head, first);
    const int64_t columns = min(head + range.head_units, min(first + ldb, range.units)) - c0;
    if (columns <= 0) return;
    S* const out = range.weights(grad, gates, gate_of(s), unit) + c0 - head;
    write_tile(row + c0 - first, int(ldb), 1, columns, out, 0, !chunk.first);
  }
};

}  // namespace rnnkern::RNNKERN_ISA
