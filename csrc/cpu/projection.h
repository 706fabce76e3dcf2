// LSTM's projection (Sak et al. 2014; torch.nn's proj_size): h' = W_hr m, R = P wide, where m, H
// wide, is what the cell alone would hand on as h'. A step of a direction that has one is a step of
// the cell that writes m to a buffer, and one more product; backward the other way round.
#pragma once
#include "../core/layer_params.h"
#include "arena.h"
#include "direct.h"
#include "kept.h"
#include "plan.h"
#include "right_operand.h"
#include "team.h"
#include "weight_gradient.h"

namespace rnnkern::RNNKERN_ISA {

inline int the_only_gate(int) { return 0; }

// How the columns of h, or other units, fall into panels.
template <class T>
PackedLayout<PackedElem<T>> unit_layout(int64_t units, const LayerParams<T>& p, const Plan& plan) {
  return balanced_layout<PackedElem<T>>(units, plan.split_units ? plan.team(p.directions) : 1);
}

// In the place of both for types that have none.
struct NoProjection {
  static constexpr bool kExists = false;
  NoProjection(const auto&...) {}
};

template <class T>
class ForwardProjection {
  static constexpr int kLanes = Vec<T>::kLanes;

 public:
  static constexpr bool kExists = true;
  ForwardProjection(const ForwardParams<T>& p, const Plan& plan, int direction, Arena& arena)
      : weight_(p.weights[direction].hr),
        depth_(p.hidden_size),
        panels_(unit_layout(p.h_size(), p, plan)),
        unpacked_(plan.unpacked_weights) {
    if (!weight_) return;
    packed_ = arena.alloc<T>(panels_.size(depth_));
    m_ = arena.alloc<T>(p.sequence.batch * depth_);
  }

  // m of one step, of batch row b and those after it.
  StridedRows<T> m(int64_t b) const { return {m_ + b * depth_, depth_}; }

  void pack(Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel)
      if (!is_unpacked(panel)) pack_gates(panels_, panel, weight_, depth_, the_only_gate, packed_);
  }

  // h = W_hr m for batch rows [b0, b1), its units split over the team.
  void run(int64_t b0, int64_t b1, StridedRows<T> h, Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int vectors = panels_.nr(panel), width = vectors * kLanes;
      const int64_t first = panels_.first_unit(panel);
      UnpackedOperands<T> rows{nullptr, depth_, depth_, {}};
      for (int v = 0; v < vectors; ++v) rows.b[v] = weight_ + (first + v * kLanes) * depth_;
      GemmOperands<T> packed{nullptr, depth_, 1, depth_, packed_ + panels_.offset(panel) * depth_,
                             width};
      for_mc_blocks(b1 - b0, [&](int64_t r, int n) {
        alignas(64) T tile[kMC * kMaxNR * kLanes];
        const COperand<T> out{nullptr, 0, tile, width};
        rows.a = packed.a = m(b0 + r).data;
        if (is_unpacked(panel))
          gemm_unpacked(n, vectors, &rows, 1, out);
        else
          gemm(n, vectors, &packed, 1, out);
        write_tile(tile, width, n, panels_.units - first, h[r] + first, h.stride, false);
      });
    }
  }

 private:
  // Whether W_hr is read as it lies.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  const T* weight_;  // (P, H); all else is for this one
  int64_t depth_;
  PackedLayout<T> panels_;
  bool unpacked_;
  T *packed_, *m_;
};

// Backward, dh, the total gradient by h, goes first: the cell is given dm = dh W_hr in the place of
// its own dh, and says once more what m was, for dW_hr.
template <class Cell, class T>
class BackwardProjection {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

 public:
  static constexpr bool kExists = true;
  BackwardProjection(const BackwardParams<T>& p, const Sequence& sequence, int direction,
                     const PackedWeights<T>& weight, int64_t chunk_rows, Arena& arena)
      : p_(p),
        seq_(sequence),
        d_(direction),
        weight_(weight),
        dh_{nullptr, pad_to_odd_lines<T>(p.proj_size)},
        m_{nullptr, p.hidden_size},
        dm_{nullptr, weight_.panels.padded_cols()},
        narrow_(p.proj_size ? NarrowWgrad<T>::columns({p.hidden_size, 1}) : 0, 1, p.proj_size,
                arena) {
    if (!weight_.weight) return;
    dh_.data = arena.alloc<T>(chunk_rows * dh_.stride);
    if (p.grads[direction].hr) m_.data = arena.alloc<T>(chunk_rows * m_.stride);
    dm_.data = arena.alloc<T>(seq_.batch * dm_.stride);
  }

  void start(Team team) const {
    const int64_t first = team.begin(seq_.batch), count = team.end(seq_.batch) - first;
    std::memset(dm_[first], 0, count * dm_.stride * sizeof(T));
  }

  // Takes what has been carried back and the output's gradient as dh, for units [u0, u1) of batch
  // rows [b0, b1) of step t, whose rows in the chunk begin with `row`; zeros are carried on.
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

  // dm += dh W_hr, which the cell takes and leaves as zeros, and m, for a panel of hidden units.
  void dgrad(int64_t t, int64_t row, int64_t b0, int64_t b1, int64_t panel) const {
    const int64_t H = p_.hidden_size, first = weight_.panels.first_unit(panel);
    weight_.gemm_accumulate({dh_[row + b0], dh_.stride, kKC}, b1 - b0, panel,
                            {dm_[b0] + first, dm_.stride});
    if (!m_.data) return;
    const int64_t last = min(first + weight_.panels.ldb(panel), H);
    const SavedStep step(p_.sequence, d_, t, H);
    const SavedValues<const T> kept = step.of(p_.saved, seq_.first, Cell::kSaved);
    const SavedValues<const T> cells = step.of(p_.c_states, seq_.first);
    for (int64_t u = first; u < last; u += kLanes) {
      const int lanes = int(min<int64_t>(last - u, kLanes));
      const StridedRows<const T> saved_rows = kept.of(u), c_rows = cells.of(u);
      for (int64_t b = b0; b < b1; ++b) {
        V saved[Cell::kSaved], next[2];
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k] = V::load(saved_rows[b] + k * kept.step(u), lanes);
        next[1] = V::load(c_rows[b], lanes);
        Cell::hidden(saved, next).store(m_[row + b] + u, lanes);
      }
    }
  }

  // dW_hr += dh^T m over the chunk's rows.
  void wgrad(WgradArgs<T> chunk, T* grad) {
    if (!m_.data) return;
    chunk.dgates = {dh_.data, dh_.stride, kKC};
    chunk.hidden = p_.proj_size, chunk.gates = 1;
    narrow_.clear();
    accumulate_wgrad(
        chunk, grad, {p_.hidden_size, 1}, 0, the_only_gate,
        [&](int64_t k, int64_t, int64_t) { return m_[k]; }, narrow_);
    narrow_.add(chunk, 0);
  }

  void finish(Team team) const { narrow_.finish(team, the_only_gate); }

  StridedRows<T> dm() const { return dm_; }

 private:
  const BackwardParams<T>& p_;
  const Sequence& seq_;
  const int d_;
  const PackedWeights<T>& weight_;
  StridedRows<T> dh_, m_;  // of the chunk's rows, P and H wide
  StridedRows<T> dm_;      // of one step, rows of whole vectors
  NarrowWgrad<T> narrow_;
};

}  // namespace rnnkern::RNNKERN_ISA
