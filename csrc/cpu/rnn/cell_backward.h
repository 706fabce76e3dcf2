// The adjoint of the cell in a step: from the gradients of the states after it to those of the
// states before it and of the pre-activations.
#pragma once
#include "../../cells/call.h"
#include "../../core/saved_layout.h"
#include "../simd/math.h"
#include "gate_grads.h"
#include "given_sums.h"
#include "masks.h"
#include "row_norm.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

// What the cell reads and writes in a step, by batch row. Null data: not there.
template <class Cell, class T>
struct BackwardOperands : StepMasks<Acc<T>, Cell::kMasks>,
                          StepSums<Cell, Acc<T>>,
                          StepNormGrads<Cell, Acc<T>> {
  using S = Acc<T>;
  StridedRows<const T> h, h_prev, dy;
  SavedValues<const T> saved;
  SavedValues<const S> c_next;
  CStates<const S> c_prev;
  StridedRows<S> dh, dc;          // gradients of the states: after the step, then before it
  StridedRows<S> flow_h, flow_c;  // dL/dh_t, dL/dc_t
  BlockedMatrix<PackedElem<T>> dgates;
};

template <class Cell, class T>
class CellBackward {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using V = Vec<S>;
  using StepOperands = BackwardOperands<Cell, T>;
  static constexpr int kLanes = V::kLanes, kPanel = kMaxNR * kLanes;
  static constexpr int kCValues = Cell::kStates - 1;  // states besides h
  static constexpr int kProducts = Products<Cell>::kCount;
  static constexpr bool kHasC = kCValues > 0, kSaves = Cell::kSaved > 0 || kHasC;

 public:
  // `units`: the layout of a row of dh, and of each value of dc.
  CellBackward(const BackwardParams<T>& p, int direction, const PackedLayout<F>& units)
      : params_(p.weights[direction].params),
        hidden_size_(p.hidden_size),
        units_(units) {}

  // The adjoint of the cell for batch rows [b0, b1) of a step. Panel by panel, as the forward pass
  // saved its values; row by row if there are none.
  void operator()(StepOperands step, const WorkRange& range, int64_t b0, int64_t b1) const {
    if constexpr (RowNorm<Cell>::kAny) {
      for (int64_t b = b0; b < b1; ++b) {
        output_backward(step, b);
        panels(step, range, b, b + 1);
        sums_backward(step, b);
      }
    } else {
      panels(step, range, b0, b1);
    }
  }

 private:
  RNNKERN_INLINE void panels(const StepOperands& step, const WorkRange& range, int64_t b0,
                             int64_t b1) const {
    const int64_t H = hidden_size_;
    const int64_t end = min(units_.first_unit(range.p1), H);
    for (int64_t first = units_.first_unit(range.p0), last; first < end; first = last) {
      last = kSaves ? min(first + kPanel, end) : end;
      UnitOperands of[kMaxNR];
      if constexpr (kSaves)
        for (int64_t v = 0; first + v * kLanes < last; ++v) of[v] = unit_operands(step, first, v);
      const int64_t whole = (last - first) / kLanes;
      const int left = int(last - first - whole * kLanes);
      for (int64_t b = b0; b < b1; ++b) {
        for_pairs_and_rest(whole, [&](auto count, int64_t v) __attribute__((always_inline)) {
          vectors<count>(step, of + v, b, first + v * kLanes, kLanes);
        });
        if (left) vectors<1>(step, of + whole, b, first + whole * kLanes, left);
      }
    }
  }

  // The adjoint of output() and of the standardised state, for batch row b.
  void output_backward(const StepOperands& step, int64_t b) const {
    if constexpr (RowNorm<Cell>::kState) {
      using A = VecArray<S, 1>;
      const int64_t H = hidden_size_;
      const auto state = [&](int64_t u) {
        return step.c_next.of(u)[b] + RowNorm<Cell>::kCValue * step.c_next.value_stride(u);
      };
      const Moments<S> moments = moments_of<S>(H, Cell::kNormEpsilon, [&](auto&& f) {
        for_unit_vectors<S>(H, [&](int64_t u, int lanes) { f(state(u), lanes); });
      });
      for_unit_vectors<S>(H, [&](int64_t u, int lanes) {
        A saved[Cell::kSaved + 1], params[Cell::kParams + 1], norm, dh;
        const UnitOperands of = unit_operands(step, u, 0);
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k].v[0] = V::load(of.saved[b] + k * of.value_stride, lanes);
        for (int k = 0; k < Cell::kParams; ++k)
          params[k].v[0] = V::load(params_ + k * H + u, lanes);
        norm.v[0] = moments.standardized(V::load(state(u), lanes));
        dh.v[0] = V::load(step.dh[b] + u, lanes);
        if (step.dy.data) dh.v[0] = dh.v[0] + V::load(step.dy[b] + u, lanes);
        norm.v[0].store(step.normalized + u, lanes);
        Cell::output_backward(saved, norm, params, dh).v[0].store(step.dstate + u, lanes);
      });
      standardize_backward<S>(H, moments.scale, [&](auto&& f) {
        for_unit_vectors<S>(
            H, [&](int64_t u, int lanes) { f(step.normalized + u, step.dstate + u, lanes); });
      });
    }
  }

  // From the gradients of the standardised sums to those of W_hh h, for batch row b.
  void sums_backward(const StepOperands& step, int64_t b) const {
    if constexpr (RowNorm<Cell>::kSums) {
      using Norm = RowNorm<Cell>;
      const int64_t H = hidden_size_;
      const S scale = step.saved.of(0)[b][Norm::kSavedScale * step.saved.value_stride(0)];
      standardize_backward<S>(Cell::kGates * H, scale, [&](auto&& f) {
        for_unit_vectors<S>(H, [&](int64_t u, int lanes) {
          const UnitOperands of = unit_operands(step, u, 0);
          for (int s = 0; s < Cell::kGates; ++s)
            f(of.saved[b] + (Norm::kSavedSums + s) * of.value_stride,
              GateGrads<T>::element(step.dgates, b, s * H + u), lanes);
        });
      });
    }
  }

  // The rows of one vector of units, in the saved layout.
  struct UnitOperands {
    StridedRows<const T> saved;
    StridedRows<const S> c_prev, c_next;
    int64_t value_stride, c_prev_stride, c_next_stride;  // from one value of a unit to the next
  };

  RNNKERN_INLINE UnitOperands unit_operands(const StepOperands& step, int64_t first,
                                            int64_t v) const {
    const int64_t u = first + v * kLanes;
    UnitOperands of;
    if (Cell::kSaved) of.saved = step.saved.of(u), of.value_stride = step.saved.value_stride(u);
    if (kHasC) of.c_prev = step.c_prev.of(u), of.c_next = step.c_next.of(u);
    if (kCValues > 1)
      of.c_prev_stride = step.c_prev.value_stride(u),
      of.c_next_stride = step.c_next.value_stride(u);
    return of;
  }

  // kVectors vectors of units from `unit` on, of `lanes` units each, of batch row b.
  template <int kVectors>
  RNNKERN_INLINE void vectors(const StepOperands& step, const UnitOperands* of, int64_t b,
                              int64_t unit, int lanes) const {
    using A = VecArray<S, kVectors>;
    const int64_t H = hidden_size_;
    S *const dh = step.dh[b], *const dc = step.dc[b];
    A saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates], dnext[Cell::kStates],
        dprev[Cell::kStates], dgates[Cell::kPreacts], params[Cell::kParams + 1],
        dparams[Cell::kParams + 1], masks[Cell::kMasks + 1];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const int64_t u = unit + i * kLanes;
      for (int k = 0; k < Cell::kSaved; ++k)
        saved[k].v[i] = V::load(of[i].saved[b] + k * of[i].value_stride, lanes);
      if constexpr (!Cell::kProjects) {
        prev[0].v[i] = V::load(step.h_prev[b] + u, lanes);
        next[0].v[i] = V::load(step.h[b] + u, lanes);
      }
      dnext[0].v[i] = V::load(dh + u);
      if (step.dy.data) dnext[0].v[i] = dnext[0].v[i] + V::load(step.dy[b] + u, lanes);
      for (int k = 0; k < kCValues; ++k) {
        prev[1 + k].v[i] = V::load(of[i].c_prev[b] + k * of[i].c_prev_stride, lanes);
        next[1 + k].v[i] = V::load(of[i].c_next[b] + k * of[i].c_next_stride, lanes);
        dnext[1 + k].v[i] = V::load(dc + k * units_.padded_cols() + u);
      }
      step.load_normalized(next, dnext, i, u, lanes);
      for (int k = 0; k < Cell::kParams; ++k) params[k].v[i] = V::load(params_ + k * H + u, lanes);
      step.load_masks(masks, i, b, u, H, lanes);
    }
    call_backward<Cell>(saved, prev, params, masks, next, dnext, dprev, dgates, dparams);
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
      const int64_t u = unit + i * kLanes;
      for (int k = 0; k < kProducts; ++k)
        dgates[Products<Cell>::kFirst + k].v[i].store(
            GateGrads<T>::element(step.dgates, b, k * H + u), lanes);
      step.store_sums(dgates, i, b, u, H, lanes);
      for (int k = 0; k < Cell::kParams; ++k)
        dparams[k].v[i].store(GateGrads<T>::element(step.dgates, b, (kProducts + k) * H + u),
                              lanes);
      if (step.flow_h.data) dnext[0].v[i].store(step.flow_h[b] + u, lanes);
      dprev[0].v[i].store(dh + u);
      for (int k = 0; k < kCValues; ++k) {
        if (step.flow_c.data) dnext[1 + k].v[i].store(step.flow_c[b] + k * H + u, lanes);
        dprev[1 + k].v[i].store(dc + k * units_.padded_cols() + u);
      }
    }
  }

  const T* const params_;
  const int64_t hidden_size_;
  const PackedLayout<F>& units_;
};

}  // namespace rnnkern::RNNKERN_ISA
