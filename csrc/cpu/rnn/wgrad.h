// Weight gradients over the rows of a chunk of steps: dW += dG^T X, where dG are the gate gradients
// and X is what the weights were multiplied by.
//
//            X: columns -> wide panels | narrow panel
//          +--------------------+------+
//   dG^T   |  dW panel 0        |      |     wide:   A = dG, column-major; B = a packed panel of X
//   rows   |  written per chunk | sums |     narrow: A = X^T, B = dG unpacked; so MR is full though
//   (gates)|                    |      |             N is less than 3 vectors
//          +--------------------+------+
//
// The narrow columns of all matrices of one Wgrad share a GEMM, whose sums are in a buffer until
// write(). Each element is summed by one thread in the same order, whatever the team.
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/gemm.h"
#include "../gemm/pack.h"
#include "../runtime/arena.h"
#include "../runtime/team.h"
#include "../runtime/tuning.h"

namespace rnnkern::RNNKERN_ISA {

// A chunk of steps.
template <class T>
struct WgradArgs {
  using F = PackedElem<T>;

  const Sequence& sequence;
  int64_t t0, t1, rows;           // its steps, and their rows
  BlockedMatrix<const F> dgates;  // (rows, preacts); with VNNI factor 2, pairs of rows
  StridedRows<const F> dgates_t;  // for AMX (preacts, rows), padded with zeros; or null
  bool first;                     // nothing has been accumulated yet
  Team team;
  F *panel, *narrow;  // buffers: of the thread, for a panel of X and for narrow columns

  int64_t k() const { return (rows + kVnniFactor<T> - 1) / kVnniFactor<T>; }

  // X's row of each of the chunk's rows in order. row_at(k, t, b): of the chunk's row k, which is
  // batch row b of step t.
  template <class RowAt>
  auto in_order(RowAt row_at) const {
    return [this, row_at, t = t0, b = int64_t(-1)](int64_t k) mutable {
      for (++b; b >= sequence.active(t); ++t) b = 0;
      return row_at(k, t, b);
    };
  }
};

// The gradient of one weight matrix, (gates H, columns); null where not wanted. A bias is the
// weight of one column of ones, which Ones() provides.
template <class S>
struct WgradTarget {
  S* grad;
  int64_t columns;
};
struct Ones {};

// The gradients of weights that share gate gradients.
template <class T>
class Wgrad {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using GateOf = int (*)(int);
  static constexpr int kLanes = Vec<S>::kLanes, kWidth = kMaxNR * kLanes, kMaxTargets = 4;

 public:
  // Narrow columns of two matrices and their biases.
  static constexpr int kMaxNarrowColumns = 2 * (2 * kLanes + 1);

  // dG's columns from first_preact * hidden on belong to the rows of gate_of(0), gate_of(1), ...
  Wgrad(const WgradTarget<S>* targets, int count, int first_preact, int gates, int64_t hidden,
        GateOf gate_of, Arena& arena)
      : first_preact_(first_preact),
        hidden_(hidden),
        rows_(gates * hidden),
        gate_of_(gate_of),
        narrow_ld_((rows_ + kWidth - 1) / kWidth * kWidth) {
    int64_t room = 0;
    for (; count_ < count; ++count_) {
      const PackedLayout<F> layout(targets[count_].columns, 1);
      targets_[count_] = {targets[count_].grad, layout, narrow_columns_};
      if (targets[count_].grad) narrow_columns_ += narrow_columns(layout);
      room += narrow_columns(layout);  // of all: blocks of a call have the same size
    }
    narrow_ = arena.alloc<S>(room * narrow_ld_);
  }

  // Accumulates a chunk, given X's rows of each target; the team splits the gradients' rows.
  template <class... RowAt>
  void accumulate(const WgradArgs<T>& chunk, RowAt... row_at) {
    const Target* target = targets_;
    (accumulate_target(chunk, *target++, row_at), ...);
    accumulate_narrow(chunk);
  }

  // Writes the narrow columns, once all chunks have been accumulated.
  void write(Team team) const {
    for (const Target* target = targets_; target < targets_ + count_; ++target) {
      if (!target->grad) continue;
      const int64_t columns = target->layout.units, narrow = narrow_columns(target->layout);
      S* const grad = target->grad + columns - narrow;
      for (int64_t k = begin(team); k < end(team); ++k) {
        const int s = int(k / hidden_);
        S* const out = grad + ((gate_of_(s) - s) * hidden_ + k) * columns;
        for (int64_t c = 0; c < narrow; ++c)
          out[c] = narrow_[(target->narrow_column + c) * narrow_ld_ + k];
      }
    }
  }

 private:
  struct Target {
    S* grad;
    PackedLayout<F> layout = {0, 1};
    int64_t narrow_column = 0;  // its first column in the narrow GEMM
  };

  // One k of a tile loads a scalar per row and a vector per column vector: with fewer than three
  // vectors, loads take longer than FMAs.
  static bool is_narrow(const PackedLayout<F>& layout, int64_t panel) {
    return layout.ldb(panel) < 3 * kLanes;
  }
  // Those of the last panel, or none.
  static int64_t narrow_columns(const PackedLayout<F>& layout) {
    const int64_t last = layout.count() - 1;
    return last >= 0 && is_narrow(layout, last) ? layout.units - layout.first_unit(last) : 0;
  }

  template <class RowAt>
  void accumulate_target(const WgradArgs<T>& chunk, const Target& target, RowAt row_at) const {
    if (!target.grad) return;
    for (int64_t panel = 0; panel < target.layout.count(); ++panel)
      if (is_narrow(target.layout, panel))
        gather_narrow(chunk, target, chunk.in_order(row_at));
      else
        accumulate_wide(chunk, target, panel, chunk.in_order(row_at));
  }

  void accumulate_target(const WgradArgs<T>& chunk, const Target& target, Ones) const {
    if (!target.grad) return;
    F* out = chunk.narrow + target.narrow_column;
    for (int64_t k = 0; k < chunk.rows; k += kVnniFactor<T>, out += narrow_columns_)
      if constexpr (kVnniFactor<T> == 1)
        *out = one<T>();
      else
        *out = {one<T>(), k + 1 < chunk.rows ? one<T>() : T{}};
  }

  // dW's panel += dG^T X, gate by gate, and block by block of dG's columns.
  template <class RowOf>
  void accumulate_wide(const WgradArgs<T>& chunk, const Target& target, int64_t panel,
                       RowOf row_of) const {
    const PackedLayout<F>& layout = target.layout;
    const int64_t k = chunk.dgates_t.data ? amx_padded_k(chunk.k()) : chunk.k();
    pack_rows<T>(layout, panel, chunk.rows, row_of, k, chunk.panel);
    const int64_t last = chunk.team.end(rows_), columns = layout.units;
    for (int64_t begin = chunk.team.begin(rows_), stop; begin < last; begin = stop) {
      const int64_t s = begin / hidden_;
      stop = min((s + 1) * hidden_, last);
      if (chunk.dgates.is_blocked()) stop = min(stop, (begin / kKC + 1) * kKC);
      S* const out = target.grad + (gate_of_(int(s)) - s) * hidden_ * columns;
      multiply_wide(chunk, layout, panel, k, begin, stop, last, out);
    }
  }

  // Rows [begin, stop) of one gate.
  void multiply_wide(const WgradArgs<T>& chunk, const PackedLayout<F>& layout, int64_t panel,
                     int64_t k, int64_t begin, int64_t stop, int64_t last, S* out) const {
    const int64_t first = layout.first_unit(panel), columns = layout.units, ldb = layout.ldb(panel);
    const bool column_major = !chunk.dgates_t.data;
    const bool prefetch = chunk.rows * rows_ * int64_t(sizeof(T)) > l2_budget_bytes();
    const int64_t preact = first_preact_ * hidden_;
    const F* const dgates = chunk.dgates.at(0, preact + begin);
    for_mc_blocks(stop - begin, [&](int64_t r, int n) {
      alignas(64) S tile[kMC * kWidth];
      GemmOperands<F> ab{dgates + r, 1, chunk.dgates.ld, k, chunk.panel, ldb};
      if (column_major) {
        const int64_t next = begin + r + n;
        ab.prefetch_b = prefetch;
        if (prefetch && next < last) ab.next_b = chunk.dgates.at(0, preact + next);
      } else {
        ab.a = chunk.dgates_t[preact + begin + r];
        ab.lda = chunk.dgates_t.stride, ab.a_k_stride = 1;
      }
      gemm(n, layout.nr(panel), &ab, 1, COperand<S>{nullptr, 0, tile, ldb});
      write_tile(tile, int(ldb), n, columns - first, out + (begin + r) * columns + first, columns,
                 !chunk.first);
    });
  }

  // Copies X's narrow columns to the chunk's buffer, (k, narrow_columns_).
  template <class RowOf>
  void gather_narrow(const WgradArgs<T>& chunk, const Target& target, RowOf row_of) const {
    const int64_t count = narrow_columns(target.layout), first = target.layout.units - count;
    F* out = chunk.narrow + target.narrow_column;
    for (int64_t k = 0; k < chunk.rows; k += kVnniFactor<T>, out += narrow_columns_)
      pack_k_row<T>(row_of, k, chunk.rows, first, count, out, false);
  }

  // Sums of all narrow columns += X^T dG; the team splits dG's columns.
  void accumulate_narrow(const WgradArgs<T>& chunk) const {
    const int64_t last = end(chunk.team);
    for (int64_t c = begin(chunk.team), width; c < last; c += width) {
      width = min(last - c, kWidth - c % kWidth);
      const int nr = int((width + kLanes - 1) / kLanes);
      const F* const dgates = chunk.dgates.at(0, first_preact_ * hidden_ + c);
      for_mc_blocks(narrow_columns_, [&](int64_t r, int n) {
        S* const sums = narrow_ + r * narrow_ld_ + c;
        if (chunk.first)
          for (int i = 0; i < n; ++i)
            std::memset(sums + i * narrow_ld_, 0, nr * kLanes * sizeof(S));
        const GemmOperands<F> ab{chunk.narrow + r, 1,      narrow_columns_,
                                 chunk.k(),        dgates, chunk.dgates.ld};
        gemm(n, nr, &ab, 1, COperand<S>{nullptr, 0, sums, narrow_ld_, true});
      });
    }
  }

  // Each rank's rows of the narrow gradients, in whole vectors.
  int64_t vectors() const { return (rows_ + kLanes - 1) / kLanes; }
  int64_t begin(Team team) const { return team.begin(vectors()) * kLanes; }
  int64_t end(Team team) const { return min(team.end(vectors()) * kLanes, rows_); }

  const int first_preact_;
  const int64_t hidden_, rows_;  // units, and rows of all gates
  const GateOf gate_of_;
  const int64_t narrow_ld_;
  Target targets_[kMaxTargets];
  int count_ = 0;
  int64_t narrow_columns_ = 0;
  S* narrow_;  // (narrow_columns_, narrow_ld_): sums of the narrow columns, transposed
};

}  // namespace rnnkern::RNNKERN_ISA
