// Cells whose input sums are given: the caller's W_ih x, of kGates * hidden columns for each
// direction. The epilogue adds them to what the recurrent product makes; the cell's adjoint writes
// their gradients. No product and no copy besides.
#pragma once
#include "../../core/layer_params.h"
#include "../../core/strided_rows.h"
#include "../simd/vec.h"

namespace rnnkern::RNNKERN_ISA {

// The pre-activations that products make, and whose gradients products read: all of a cell's, or of
// a cell whose input sums are given those of W_hh h alone.
template <class Cell>
struct Products {
  static constexpr bool kGiven = Cell::kInput == Input::given;
  static constexpr bool kRecurs = Cell::kRecurrent != Recurrent::none;
  static constexpr int kCount = !kGiven ? Cell::kPreacts : kRecurs ? Cell::kGates : 0;
  static constexpr int kFirst = kGiven ? Cell::kHiddenPreact : 0;  // of the cell's
  static constexpr int kHidden = Cell::kHiddenPreact - kFirst;     // of those, the first of W_hh h
};

// The sums of a step's batch rows, a part of the step's operands: given ones, or their gradients.
// Nothing for a cell with a W_ih.
template <class Cell, class T, bool kGiven = Products<Cell>::kGiven>
struct StepSums {
  StridedRows<T> sums;

  // Of `rows`, whose first is that of all directions.
  void set_sums(StridedRows<T> rows, int direction, int64_t units) {
    sums = {rows.data ? rows.data + direction * Cell::kGates * units : nullptr, rows.stride};
  }

  // Adds those of one vector of units of row r.
  template <class S, int kCount>
  RNNKERN_INLINE void add_sums(VecArray<S, kCount>* preact, int i, int64_t r, int64_t unit,
                               int64_t units, int lanes) const {
    using V = Vec<S>;
    for (int s = 0; s < Cell::kGates; ++s) {
      const int k = Cell::kInputPreact + s - Products<Cell>::kFirst;
      V& to = preact[Cell::kInputPreact + s].v[i];
      const V sum = V::load(sums[r] + Cell::input_gate(s) * units + unit, lanes);
      to = k >= 0 && k < Products<Cell>::kCount ? to + sum : sum;
    }
  }

  template <class S, int kCount>
  RNNKERN_INLINE void store_sums(const VecArray<S, kCount>* dgates, int i, int64_t r, int64_t unit,
                                 int64_t units, int lanes) const {
    if (!sums.data) return;
    for (int s = 0; s < Cell::kGates; ++s)
      dgates[Cell::kInputPreact + s].v[i].store(sums[r] + Cell::input_gate(s) * units + unit,
                                                lanes);
  }
};

template <class Cell, class T>
struct StepSums<Cell, T, false> {
  void set_sums(StridedRows<T>, int, int64_t) {}
  template <class S, int kCount>
  RNNKERN_INLINE void add_sums(VecArray<S, kCount>*, int, int64_t, int64_t, int64_t, int) const {}
  template <class S, int kCount>
  RNNKERN_INLINE void store_sums(const VecArray<S, kCount>*, int, int64_t, int64_t, int64_t,
                                 int) const {}
};

}  // namespace rnnkern::RNNKERN_ISA
