// B of the backward pass's GEMMs: a weight matrix whose rows are k, multiplied by gate gradients.
#pragma once
#include "../gemm/gemm.h"
#include "../gemm/pack.h"
#include "../runtime/team.h"
#include "../runtime/tuning.h"

namespace rnnkern::RNNKERN_ISA {

// `gates` blocks of `units` rows. Packed; or unpacked if the call is too short to repay packing and
// rows are whole vectors. Another matrix's columns may be appended, from the next whole vector on:
// two narrow matrices make wider tiles together.
template <class T>
struct PackedWeights {
  using S = Acc<T>;
  using F = PackedElem<T>;

  PackedLayout<F> panels;  // of all columns
  const T* weight;
  F* packed;
  int64_t units;
  int gates;
  int (*gate_of)(int s);  // the weight's block for A's block s
  bool unpacked_weights;
  int64_t columns = panels.units;  // of the weight matrix
  const T* appended = nullptr;

  int64_t k() const { return gates * units / kVnniFactor<T>; }  // in packed elements
  // The panels' first column of the appended matrix.
  int64_t appended_offset() const { return PackedLayout<F>(columns, 1).padded_cols(); }
  bool unpacked() const {
    return kVnniFactor<T> == 1 && unpacked_weights && !appended &&
           panels.units % Vec<F>::kLanes == 0;
  }

  void append_columns(const T* other, int64_t other_columns) {
    appended = other;
    panels = {appended_offset() + other_columns, 1};
  }

  // Row k of a packed panel is one unit of one gate, or two interleaved. Reads whole rows, which
  // the hardware prefetcher follows.
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

  // k per pass over the rows: this block of a panel stays in the L2 meanwhile.
  static constexpr int64_t kL2KBlock = 512;

  // out += A W for some rows and a panel. Rows of `out` begin with the panel's first column and are
  // padded to whole vectors. `next` is the panel that comes next, or -1.
  void gemm_accumulate(const BlockedMatrix<const F>& a, int64_t rows, int64_t panel,
                       StridedRows<S> out, int64_t next = -1) const {
    const int64_t depth = k(), ldb = panels.ldb(panel);
    const bool prefetch = panels.bytes(depth) > l2_budget_bytes() && use_software_prefetch(rows);
    GemmOperands<F> pairs[kMaxBatch];
    if (unpacked()) {
      for (int s = 0; s < gates; ++s)
        pairs[s] = {a.at(0, s * units),
                    a.ld,
                    1,
                    units,
                    as_packed(weight) + gate_of(s) * units * columns + panels.first_unit(panel),
                    columns,
                    a.block_stride};
      return multiply(pairs, gates, rows, panels.nr(panel), out);
    }
    const F* const begin = packed + panels.offset(panel) * depth;
    for (int64_t k = 0, stop; k < depth; k = stop) {
      stop = min(k + kL2KBlock, depth);
      pairs[0] = {a.at(0, k), a.ld, 1, stop - k, begin + k * ldb, ldb, a.block_stride};
      if (prefetch) {
        pairs[0].prefetch_b = true;
        if (stop < depth)
          pairs[0].next_b = begin + stop * ldb;
        else if (next >= 0)
          pairs[0].next_b = packed + panels.offset(next) * depth;
      }
      multiply(pairs, 1, rows, panels.nr(panel), out);
    }
  }

  // out += the sum of the pairs' products.
  static RNNKERN_INLINE void multiply(const GemmOperands<F>* pairs, int count, int64_t rows, int nr,
                                      StridedRows<S> out) {
    for_mc_blocks(rows, [&](int64_t r, int n) {
      GemmOperands<F> shifted[kMaxBatch];
      for (int i = 0; i < count; ++i) {
        (shifted[i] = pairs[i]).a += r * pairs[i].lda;
        shifted[i].prefetch_b = pairs[i].prefetch_b && r == 0;
      }
      gemm(n, nr, shifted, count, COperand<S>{nullptr, 0, out[r], out.stride, true});
    });
  }
};

}  // namespace rnnkern::RNNKERN_ISA
