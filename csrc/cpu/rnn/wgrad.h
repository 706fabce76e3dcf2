// Weight gradients of a chunk of steps: products over its rows of the gate gradients with what the
// weights were multiplied by. Each element is summed by one thread, whatever the team.
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/gemm.h"
#include "../gemm/pack.h"
#include "../runtime/arena.h"
#include "../runtime/team.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
struct WgradArgs {
  const Sequence& sequence;
  int64_t t0, t1, rows;  // steps of the chunk, and their rows
  BlockedMatrix<const PackedElem<T>>
      dgates;  // gradients of sums, each `hidden` wide; pairs are of two rows
  int64_t hidden;
  int gates;
  bool first;  // nothing has been summed yet
  Team team;
  PackedElem<T>*panel, *narrow;  // for a panel of the right operand, and for its thin columns
  // dsums once more for matrix registers, whose left operands stand in rows: a row for each column,
  // filled up with zeros to whole blocks.
  StridedRows<const PackedElem<T>> dgates_t;

  int64_t depth() const {
    return (rows + kVnniFactor<T> - 1) / kVnniFactor<T>;
  }  // rows, in factors

  // The right operand's row of each of the chunk's rows in turn. row_at(k, t, b): of the chunk's
  // row k, batch row b of step t.
  template <class RowAt>
  auto serpentine(RowAt row_at) const {
    return [this, row_at, t = t0, b = int64_t(-1)](int64_t k) mutable {
      for (++b; b >= sequence.active(t); ++t) b = 0;
      return row_at(k, t, b);
    };
  }
};

// The gradients of columns too few for a wide tile, of all weights with the same sums: transposed,
// so that dsums is the panel, as it lies, and tiles are as high as they can be.
template <class T>
class NarrowWgrad {
  using S = Acc<T>;
  using F = PackedElem<T>;
  static constexpr int kLanes = Vec<S>::kLanes, kWidth = kMaxNR * kLanes;

 public:
  // A tile loads one value per row and one vector per vector of its panel for each k: with fewer
  // than three vectors the loads take longer than the multiply-adds.
  static bool is_narrow(const PackedLayout<F>& panels, int64_t panel) {
    return panels.ldb(panel) < 3 * kLanes;
  }
  static constexpr int kMostColumns = 2 * (2 * kLanes + 1);  // of two matrices and their biases
  // How many columns of a matrix are thin: those of its last panel, or none.
  static int64_t columns(const PackedLayout<F>& panels) {
    const int64_t last = panels.count() - 1;
    return last >= 0 && is_narrow(panels, last) ? panels.units - panels.first_unit(last) : 0;
  }

  NarrowWgrad(int64_t most_columns, int64_t gates, int64_t hidden, Arena& arena)
      : stride_(most_columns),
        hidden_(hidden),
        row_((gates * hidden + kWidth - 1) / kWidth * kWidth),
        rows_(gates * hidden),
        sums_(arena.alloc<S>(most_columns * row_)) {}

  void clear() { count_ = 0, columns_ = 0; }

  // Columns [first, first + count) of the right operand row_at, and of its gradient, (gates H, ld).
  template <class RowAt>
  void gather(const WgradArgs<T>& chunk, S* grad, int64_t ld, int64_t first, int64_t count,
              RowAt row_at) {
    auto row_of = chunk.serpentine(row_at);
    F* out = chunk.narrow + columns_;
    for (int64_t k = 0; k < chunk.rows; k += kVnniFactor<T>, out += stride_)
      pack_k_row<T>(row_of, k, chunk.rows, first, count, out, false);
    runs_[count_++] = {grad + first, ld, columns_, count};
    columns_ += count;
  }

  // The sums of the columns += those over the chunk's rows; the team splits dsums' columns.
  void add(const WgradArgs<T>& chunk, int first_sum) {
    const int64_t end = this->end(chunk.team);
    for (int64_t k = begin(chunk.team), width; k < end; k += width) {
      width = min(end - k, kWidth - k % kWidth);
      const int vectors = int((width + kLanes - 1) / kLanes);
      const F* const dgates = chunk.dgates.at(0, first_sum * hidden_ + k);
      for_mc_blocks(columns_, [&](int64_t c, int n) {
        S* const out = sums_ + c * row_ + k;
        if (chunk.first)
          for (int i = 0; i < n; ++i) std::memset(out + i * row_, 0, vectors * kLanes * sizeof(S));
        const GemmOperands<F> term{chunk.narrow + c, 1,      stride_,
                                   chunk.depth(),    dgates, chunk.dgates.ld};
        gemm(n, vectors, &term, 1, COperand<S>{nullptr, 0, out, row_, true});
      });
    }
  }

  // The gradients, once all chunks have been added.
  template <class GateOf>
  void finish(Team team, GateOf gate_of) const {
    for (const Run* run = runs_; run < runs_ + count_; ++run)
      for (int64_t k = begin(team); k < end(team); ++k) {
        const int s = int(k / hidden_);
        S* const out = run->grad + ((gate_of(s) - s) * hidden_ + k) * run->ld;
        for (int64_t c = 0; c < run->count; ++c) out[c] = sums_[(run->column + c) * row_ + k];
      }
  }

 private:
  // Each rank's rows of the gradients, in whole vectors.
  int64_t vectors() const { return (rows_ + kLanes - 1) / kLanes; }
  int64_t begin(Team team) const { return team.begin(vectors()) * kLanes; }
  int64_t end(Team team) const { return min(team.end(vectors()) * kLanes, rows_); }

  struct Run {
    S* grad;
    int64_t ld, column, count;  // its first column here
  };
  const int64_t stride_, hidden_, row_, rows_;
  S* const sums_;  // (columns, row_)
  Run runs_[4];
  int count_ = 0;
  int64_t columns_ = 0;
};

// grad (gates H, columns) += dsums^T right, over the chunk's rows; the team splits grad's rows.
// Thin columns are only gathered.
template <class T, class GateOf, class RowAt>
void accumulate_wgrad(const WgradArgs<T>& chunk, Acc<T>* grad,
                      const PackedLayout<PackedElem<T>>& panels, int first_sum, GateOf gate_of,
                      RowAt row_at, NarrowWgrad<T>& narrow) {
  using S = Acc<T>;
  const int64_t H = chunk.hidden, columns = panels.units;
  const int64_t begin = chunk.team.begin(chunk.gates * H), end = chunk.team.end(chunk.gates * H);
  const bool column_major_a = !chunk.dgates_t.data;
  const bool far = chunk.rows * chunk.gates * H * int64_t(sizeof(T)) > l2_budget_bytes();
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int64_t first = panels.first_unit(panel), left = columns - first;
    if (NarrowWgrad<T>::is_narrow(panels, panel)) {
      narrow.gather(chunk, grad, columns, first, left, row_at);
      continue;
    }
    const int64_t depth = column_major_a ? chunk.depth() : amx_padded_k(chunk.depth());
    pack_rows<T>(panels, panel, chunk.rows, chunk.serpentine(row_at), depth, chunk.panel);
    const int width = int(panels.ldb(panel));
    for (int64_t k = begin, stop; k < end; k = stop) {  // gate by gate, and block by block of it
      const int64_t s = k / H;
      stop = min((s + 1) * H, end);
      if (chunk.dgates.is_blocked()) stop = min(stop, (k / kKC + 1) * kKC);
      const PackedElem<T>* const dgates = chunk.dgates.at(0, first_sum * H + k);
      S* const out = grad + (gate_of(int(s)) - s) * H * columns + first;
      for_mc_blocks(stop - k, [&](int64_t r, int n) {
        alignas(64) S tile[kMC * kMaxNR * Vec<S>::kLanes];
        GemmOperands<PackedElem<T>> term{dgates + r, 1, chunk.dgates.ld, depth, chunk.panel, width};
        if (column_major_a) {
          const int64_t next = k + r + n;
          term.prefetch_b = far;
          if (far && next < end) term.next_b = chunk.dgates.at(0, first_sum * H + next);
        } else {
          term.a = chunk.dgates_t[first_sum * H + k + r];
          term.lda = chunk.dgates_t.stride, term.a_k_stride = 1;
        }
        gemm(n, panels.nr(panel), &term, 1, COperand<S>{nullptr, 0, tile, width});
        write_tile(tile, width, n, left, out + (k + r) * columns, columns, !chunk.first);
      });
    }
  }
}

}  // namespace rnnkern::RNNKERN_ISA
