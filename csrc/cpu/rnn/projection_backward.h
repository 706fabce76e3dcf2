// The backward pass's projection: dm = dh W_hr before the cell's step, and dW_hr per chunk.
#pragma once
#include "../../core/saved_layout.h"
#include "packed_weights.h"
#include "projection.h"
#include "wgrad.h"

namespace rnnkern::RNNKERN_ISA {

// Collects dh, the total gradient of h, and gives the cell dm = dh W_hr instead of its own dh. For
// dW_hr the cell recomputes m.
template <class Cell, class T>
class BackwardProjection {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

 public:
  static constexpr bool kExists = true;
  BackwardProjection(const BackwardParams<T>& p, const Sequence& sequence, int direction,
                     const PackedWeights<T>& weight, T* grad, int64_t chunk_rows, Arena& arena)
      : p_(p),
        seq_(sequence),
        d_(direction),
        weight_(weight),
        dh_{nullptr, pad_to_odd_lines<T>(p.proj_size)},
        m_{nullptr, p.hidden_size},
        dm_{nullptr, weight_.panels.padded_cols()},
        wgrad_(make_wgrad(grad, p.hidden_size, p.proj_size, arena)) {
    if (!weight_.weight) return;
    dh_.data = arena.alloc<T>(chunk_rows * dh_.stride);
    if (grad) m_.data = arena.alloc<T>(chunk_rows * m_.stride);
    dm_.data = arena.alloc<T>(seq_.batch * dm_.stride);
  }

  void start(Team team) const {
    const int64_t first = team.begin(seq_.batch), count = team.end(seq_.batch) - first;
    std::memset(dm_[first], 0, count * dm_.stride * sizeof(T));
  }

  // dh = carried gradient + dy, for units [u0, u1) of batch rows [b0, b1) of step t, whose rows in
  // the chunk begin with `row`. Resets the carried gradient to zero.
  void collect_dh(int64_t t, int64_t row, int64_t b0, int64_t b1, int64_t u0, int64_t u1,
                  StridedRows<T> carried) const {
    const int64_t P = p_.proj_size, flow = (d_ * p_.sequence.rows() + seq_.row(t)) * P;
    for (int64_t b = b0; b < b1; ++b) {
      const T* dy = p_.dy.data ? p_.dy.at(seq_, t) + b * p_.dy.b_stride + d_ * P : nullptr;
      for (int64_t u = u0; u < u1; u += kLanes) {
        const int lanes = int(min<int64_t>(P - u, kLanes));
        V dh = V::load(carried[b] + u);
        if (dy) dh = dh + V::load(dy + u, lanes);
        dh.store(dh_[row + b] + u);
        if (p_.flow_h) dh.store(p_.flow_h + flow + b * P + u, lanes);
        V(T(0)).store(carried[b] + u);
      }
    }
  }

  // dm += dh W_hr, and m, for a panel of hidden units. The cell resets dm to zero.
  void dgrad(int64_t t, int64_t row, int64_t b0, int64_t b1, int64_t panel) const {
    const int64_t H = p_.hidden_size, first = weight_.panels.first_unit(panel);
    weight_.gemm_accumulate({dh_[row + b0], dh_.stride, kKC}, b1 - b0, panel,
                            {dm_[b0] + first, dm_.stride});
    if (!m_.data) return;
    const int64_t last = min(first + weight_.panels.ldb(panel), H);
    const SavedStep step(p_.sequence, d_, t, H);
    const SavedValues<const T> saved_values = step.of(p_.saved, seq_.first, Cell::kSaved);
    const SavedValues<const T> c_states = step.of(p_.c_states, seq_.first);
    for (int64_t u = first; u < last; u += kLanes) {
      const int lanes = int(min<int64_t>(last - u, kLanes));
      const StridedRows<const T> saved_rows = saved_values.of(u), c_rows = c_states.of(u);
      for (int64_t b = b0; b < b1; ++b) {
        V saved[Cell::kSaved], next[2];
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k] = V::load(saved_rows[b] + k * saved_values.value_stride(u), lanes);
        next[1] = V::load(c_rows[b], lanes);
        Cell::hidden(saved, next).store(m_[row + b] + u, lanes);
      }
    }
  }

  // dW_hr += dh^T m over the chunk's rows.
  void wgrad(WgradArgs<T> chunk) {
    if (!m_.data) return;
    chunk.dgates = {dh_.data, dh_.stride, kKC};
    wgrad_.accumulate(chunk, [&](int64_t k, int64_t, int64_t) { return m_[k]; });
  }

  void write_wgrad(Team team) const { wgrad_.write(team); }

  StridedRows<T> dm() const { return dm_; }

 private:
  // dW_hr is the gradient of a weight with one gate, h itself.
  static Wgrad<T> make_wgrad(T* grad, int64_t hidden, int64_t projected, Arena& arena) {
    const WgradTarget<T> target{grad, hidden};
    return {&target, 1, 0, 1, projected, the_only_gate, arena};
  }

  const BackwardParams<T>& p_;
  const Sequence& seq_;
  const int d_;
  const PackedWeights<T>& weight_;
  StridedRows<T> dh_, m_;  // of the chunk's rows, P and H wide
  StridedRows<T> dm_;      // of one step, rows of whole vectors
  Wgrad<T> wgrad_;
};

}  // namespace rnnkern::RNNKERN_ISA
