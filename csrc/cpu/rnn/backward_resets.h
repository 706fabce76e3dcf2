// Resets in the backward pass: which rows are reset before a step, the states that they then have,
// and where the gradients of the states before a step end.
#pragma once
#include "../../core/layer_params.h"
#include "../../core/saved_layout.h"
#include "../../core/strided_rows.h"
#include "../gemm/packed_layout.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BackwardResets {
  using S = Acc<T>;
  using F = PackedElem<T>;

 public:
  // Of the batch rows of `seq`. `h_columns`, `units`: the layouts of a row of dh and of dc.
  BackwardResets(const BackwardParams<T>& p, const Sequence& seq, const S* zeros,
                 const PackedLayout<F>& h_columns, const PackedLayout<F>& units)
      : p_(p),
        seq_(seq),
        zeros_(zeros),
        h_columns_(h_columns),
        units_(units) {}

  bool is_reset(int64_t t, int64_t b) const {
    return p_.resets.data && p_.resets.at(seq_, t)[b * p_.resets.b_stride];
  }

  // The states before step t of rows that are reset; zeros if none are given.
  StridedRows<const T> h(int64_t t) const { return given(p_.reset_h, t); }
  CStates<const S> c(int64_t t) const {
    return {{}, given(p_.reset_c, t), p_.reset_c.data ? p_.hidden_size : 0};
  }

  // The gradients of states that step t does not see go no further; those of what it sees instead
  // are taken.
  __attribute__((noinline)) void end_gradients(int64_t t, StridedRows<S> dh, const WorkRange& mine,
                                               const WorkRange& of_h, StridedRows<S> dc) const {
    const auto take = [&](S* carried, const SequenceView<S>& to, int64_t b, int64_t u0,
                          int64_t u1) {
      if (to.data) {
        S* const sum = to.at(seq_, t) + b * to.b_stride;
        for (int64_t u = u0; u < u1; ++u) sum[u] += carried[u];
      }
      if (u0 < u1) std::memset(carried + u0, 0, (u1 - u0) * sizeof(S));
    };
    const auto first_unit = [](const PackedLayout<F>& columns, int64_t panel, int64_t units) {
      return min(columns.first_unit(panel), units);
    };
    const int64_t H = p_.hidden_size, R = p_.h_size();
    for (int64_t b = mine.b0; b < mine.b1; ++b) {
      if (!is_reset(t, b)) continue;
      take(dh[b], p_.dreset_h, b, first_unit(h_columns_, of_h.p0, R),
           first_unit(h_columns_, of_h.p1, R));
      for (int k = 0; k < Cell::kStates - 1; ++k) {
        SequenceView<S> to = p_.dreset_c;
        if (to.data) to.data += k * H;
        take(dc[b] + k * units_.padded_cols(), to, b, first_unit(units_, mine.p0, H),
             first_unit(units_, mine.p1, H));
      }
    }
  }

 private:
  template <class U>
  StridedRows<const U> given(const SequenceView<const U>& rows, int64_t t) const {
    if (!rows.data) return {reinterpret_cast<const U*>(zeros_), 0};
    return {rows.at(seq_, t), rows.b_stride};
  }

  const BackwardParams<T>& p_;
  const Sequence& seq_;
  const S* const zeros_;
  const PackedLayout<F>&h_columns_, &units_;
};

}  // namespace rnnkern::RNNKERN_ISA
