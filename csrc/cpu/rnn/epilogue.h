// The epilogue of the gate GEMM: bias, the cell's forward(), and the stores of what it makes, for
// the pre-activations of a few rows and a panel, while they are in the L1.
#pragma once
#include "../../cells/call.h"
#include "../../core/saved_layout.h"
#include "../simd/math.h"
#include "gate_weights.h"
#include "masks.h"
#include "row_norm.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

// What a step reads and writes, for batch rows from r0 on.
template <class Cell, class T>
struct StepOperands : StepMasks<Acc<T>, Cell::kMasks>,
                      StepSums<Cell, const T>,
                      StepScales<Cell, Acc<T>> {
  StridedRows<const T> h_prev;
  StridedRows<const Acc<T>> h_fp32_prev;  // h unrounded, for the cell itself
  StridedRows<T> h_next;
  StridedRows<Acc<T>> h_fp32_next;
  CStates<const Acc<T>> c_prev;
  CStates<Acc<T>> c_next;
  SavedValues<T> saved;
};

template <class Cell, class T>
class Epilogue {
  using S = Acc<T>;
  using V = Vec<S>;
  using StepOperands = RNNKERN_ISA::StepOperands<Cell, T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kCValues = Cell::kStates - 1;  // states besides h
  static constexpr bool kHasC = kCValues > 0;
  static constexpr int kProducts = Products<Cell>::kCount, kFirst = Products<Cell>::kFirst;

 public:
  // Whether h is also carried unrounded.
  static constexpr bool kKeepsFp32H = !Cell::kProjects && !std::is_same_v<T, S>;

  Epilogue(const PackedGateWeights<Cell, T>& weights, const PackedLayout<PackedElem<T>>& panels,
           int64_t hidden_size)
      : weights_(weights),
        panels_(panels),
        hidden_size_(hidden_size) {}

  // The cell, for n rows of a panel from row r on.
  void operator()(int64_t panel, int64_t r, int n, const StepOperands& step,
                  const S* preacts) const {
    const int width = panels_.unit_vectors(panel), gate_stride = panels_.gate_stride(panel);
    const int64_t row = weights_.preacts_ld(panel);
    for (int w = 0; w < width; ++w) {
      const int64_t unit = panels_.first_unit(panel) + w * kLanes;
      V bias[Cell::kPreacts];
      for (int k = 0; k < Cell::kPreacts; ++k)
        bias[k] = V::load(weights_.bias(panel) + (k * width + w) * kLanes);
      UnitOperands of{};
      if (kHasC) of.c_prev = step.c_prev.of(unit), of.c_next = step.c_next.of(unit);
      if (kCValues > 1) {
        of.c_prev_stride = step.c_prev.value_stride(unit);
        of.c_next_stride = step.c_next.value_stride(unit);
      }
      if (Cell::kParams > 0)
        of.params = weights_.params(panel) + w * kLanes, of.params_stride = width * kLanes;
      if (step.saved.data)
        of.saved = step.saved.of(unit), of.value_stride = step.saved.value_stride(unit);
      const auto over_rows = [&](int lanes) __attribute__((always_inline)) {
        for_pairs_and_rest(n, [&](auto count, int64_t i) __attribute__((always_inline)) {
          epilogue_rows<count>(step, of, r + i, unit, lanes, preacts + i * row + w * kLanes, row,
                               gate_stride, bias);
        });
      };
      const int64_t left = hidden_size_ - unit;
      left >= kLanes ? over_rows(kLanes) : over_rows(int(left));
    }
  }

 private:
  // The rows of one vector of units, in the saved layout.
  struct UnitOperands {
    StridedRows<const S> c_prev;
    StridedRows<S> c_next;
    StridedRows<T> saved;
    int64_t value_stride, c_prev_stride, c_next_stride;  // from one value of a unit to the next
    const S* params;
    int64_t params_stride;
  };

  // The cell for one vector of units of kRows rows.
  template <int kRows>
  RNNKERN_INLINE void epilogue_rows(const StepOperands& step, const UnitOperands& of, int64_t r,
                                    int64_t unit, int lanes, const S* preacts, int64_t preacts_ld,
                                    int gate_stride, const V* bias) const {
    VecArray<S, kRows> preact[Cell::kPreacts], prev[Cell::kStates], next[Cell::kStates],
        saved[Cell::kSaved + 1], params[Cell::kParams + 1], masks[Cell::kMasks + 1];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < kProducts; ++k)
        preact[kFirst + k].v[i] =
            V::load(preacts + i * preacts_ld + k * gate_stride) + bias[kFirst + k];
      step.add_sums(preact, i, r + i, unit, hidden_size_, lanes);
      if constexpr (kKeepsFp32H)
        prev[0].v[i] = V::load(step.h_fp32_prev[r + i] + unit, lanes);
      else if constexpr (!Cell::kProjects)
        prev[0].v[i] = V::load(step.h_prev[r + i] + unit, lanes);
      for (int k = 0; k < kCValues; ++k)
        prev[1 + k].v[i] = V::load(of.c_prev[r + i] + k * of.c_prev_stride, lanes);
      step.load_masks(masks, i, r + i, unit, hidden_size_, lanes);
    }
    for (int k = 0; k < Cell::kParams; ++k)
      for (int i = 0; i < kRows; ++i) params[k].v[i] = V::load(of.params + k * of.params_stride);
    call_forward<Cell>(preact, prev, params, masks, next, saved);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      step.save_sums(saved, preact, i, r + i);
      next[0].v[i].store(step.h_next[r + i] + unit, lanes);
      if constexpr (kKeepsFp32H) next[0].v[i].store(step.h_fp32_next[r + i] + unit, lanes);
      for (int k = 0; k < kCValues; ++k)
        next[1 + k].v[i].store(of.c_next[r + i] + k * of.c_next_stride, lanes);
      if (Cell::kSaved > 0 && of.saved.data)
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k].v[i].store(of.saved[r + i] + k * of.value_stride, lanes);
    }
  }

  const PackedGateWeights<Cell, T>& weights_;
  const PackedLayout<PackedElem<T>>& panels_;
  const int64_t hidden_size_;
};

}  // namespace rnnkern::RNNKERN_ISA
