// The right operand of the backward pass's products: a weight matrix, whose rows are multiplied by
// the gradients of the sums they made.
#pragma once
#include "../gemm/gemm.h"
#include "../gemm/pack.h"
#include "../runtime/plan.h"
#include "../runtime/team.h"

namespace rnnkern::RNNKERN_ISA {

// `gates` blocks of `units` rows. Packed, or as it lies if the call is too short to repay packing;
// its rows must then fill whole vectors. Another matrix may stand beside it, from the next whole
// vector on: two narrow ones make wider tiles together.
template <class T>
struct PackedWeights {
  using S = Acc<T>;
  using F = PackedElem<T>;

  PackedLayout<F> panels;  // of all columns
  const T* weight;
  F* packed;
  int64_t units;
  int gates;
  int (*gate_of)(int s);  // the weight's block for the s-th block of the left operand
  bool unpacked_weights;
  int64_t columns = panels.units;  // of the weight matrix
  const T* appended = nullptr;

  int64_t k() const { return gates * units / kVnniFactor<T>; }  // in factors
  // The panels' column with which the matrix beside it begins.
  int64_t appended_offset() const { return PackedLayout<F>(columns, 1).padded_cols(); }
  bool unpacked() const {
    return kVnniFactor<T> == 1 && unpacked_weights && !appended &&
           panels.units % Vec<F>::kLanes == 0;
  }

  void append_columns(const T* other, int64_t other_columns) {
    appended = other;
    panels = {appended_offset() + other_columns, 1};
  }

  // Row k of a packed panel is one unit of one gate, or two such as pairs. Rows are read from end
  // to end, as the processor fetches ahead.
  void pack(Team team) const {
    constexpr int64_t kLanes = Vec<F>::kLanes;
    const int64_t split = appended_offset(), other = panels.units - split;
    const int64_t rows = unpacked() ? 0 : k(), count = panels.count();
    const bool non_temporal = panels.bytes(rows) >= kNonTemporalBytes;
    for (int64_t k = team.begin(rows); k < team.end(rows); ++k) {
      const int64_t unit = k * kVnniFactor<T>;
      const int64_t row = gate_of(int(unit / units)) * units + unit % units;
      for (int64_t panel = 0; panel < count; ++panel) {
        F* out = packed + panels.offset(panel) * rows + k * panels.ldb(panel);
        for (int w = 0; w < panels.unit_vectors(panel); ++w, out += kLanes) {
          const int64_t c = panels.first_unit(panel) + w * kLanes;
          const int64_t ld = c < split ? columns : other;
          const T* const from = c < split ? weight + row * ld + c : appended + row * ld + c - split;
          const int64_t left = (c < split ? columns : panels.units) - c;
          const Vec<F> vector = vnni_interleave(from, from + ld, int(min(left, kLanes)));
          non_temporal ? vector.stream(out) : vector.store(out);
        }
      }
    }
  }

  // Panels are walked in blocks of their depth, so that a block stays in the second-level cache
  // while all rows use it.
  static constexpr int64_t kL2KBlock = 512;

  // out += left W for some rows and a panel; rows of out are padded to whole vectors and begin
  // with the panel's first column. The panel `next` comes next, or none if -1.
  void gemm_accumulate(const BlockedMatrix<const F>& left, int64_t rows, int64_t panel,
                       StridedRows<S> out, int64_t next = -1) const {
    const int64_t depth = this->k(), step = panels.ldb(panel);
    const bool far = panels.bytes(depth) > l2_budget_bytes() && use_software_prefetch(rows);
    const auto add = [&](GemmOperands<F>* terms, int count) {
      for_mc_blocks(rows, [&](int64_t r, int n) {
        GemmOperands<F> shifted[kMaxBatch];
        for (int i = 0; i < count; ++i) {
          (shifted[i] = terms[i]).a += r * left.ld;
          shifted[i].prefetch_b = terms[i].prefetch_b && r == 0;
        }
        gemm(n, panels.nr(panel), shifted, count,
             COperand<S>{nullptr, 0, out[r], out.stride, true});
      });
    };
    GemmOperands<F> terms[kMaxBatch];
    if (unpacked()) {
      for (int s = 0; s < gates; ++s)
        terms[s] = {left.at(0, s * units),
                    left.ld,
                    1,
                    units,
                    as_packed(weight) + gate_of(s) * units * columns + panels.first_unit(panel),
                    columns,
                    left.block_stride};
      return add(terms, gates);
    }
    const F* const begin = packed + panels.offset(panel) * depth;
    for (int64_t k = 0, stop; k < depth; k = stop) {
      stop = min(k + kL2KBlock, depth);
      terms[0] = {left.at(0, k), left.ld, 1, stop - k, begin + k * step, step, left.block_stride};
      if (far) {
        terms[0].prefetch_b = true;
        if (stop < depth)
          terms[0].next_b = begin + stop * step;
        else if (next >= 0)
          terms[0].next_b = packed + panels.offset(next) * depth;
      }
      add(terms, 1);
    }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
