// One (batch row, hidden unit) of a time step: its offsets in the tensors of params.h, what it
// loads, the cell, and what it stores. Both engines are made of these functions, for one thread.
// Where pre-activations come from and how threads share a step is not known here.
// Nothing needs a GPU: the tests run the same functions on the CPU.
#pragma once
#include "../cells/call.h"
#include "cell_math.h"
#include "params.h"

namespace rnnkern::cuda {

// Values of one unit that are no states: learned ones, and the masks of one row and step.
template <class Cell, class T>
struct UnitOperands {
  Acc<T> params[Cell::kParams + 1], masks[Cell::kMasks + 1];
};

// Cell::forward, from and to the accumulation type.
template <class Cell, class T>
RNNKERN_HD static void cell_forward(const Acc<T>* preact, const Acc<T>* prev, Acc<T>* next,
                                    Acc<T>* saved, const UnitOperands<Cell, T>& of_unit = {}) {
  using V = CellMath<T>;
  V x[Cell::kPreacts], from[Cell::kStates], to[Cell::kStates], kept[Cell::kSaved + 1];
  V params[Cell::kParams + 1], masks[Cell::kMasks + 1];
  for (int i = 0; i < Cell::kPreacts; ++i) x[i] = V(preact[i]);
  for (int i = 0; i < Cell::kStates; ++i) from[i] = V(prev[i]);
  for (int i = 0; i < Cell::kParams; ++i) params[i] = V(of_unit.params[i]);
  for (int i = 0; i < Cell::kMasks; ++i) masks[i] = V(of_unit.masks[i]);
  call_forward<Cell>(x, from, params, masks, to, kept);
  for (int i = 0; i < Cell::kStates; ++i) next[i] = Acc<T>(to[i]);
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = Acc<T>(kept[i]);
}

// Layout (rows, values, H): the offset of a unit's first value, from `row`, its offset in a layout
// (rows, H).
RNNKERN_HD static int64_t gate_offset(int values, int64_t row, int unit) {
  return row * values - int64_t(values - 1) * unit;
}
// The states but h of a unit, c, are such values: the offset of state k >= 1.
template <class Cell>
RNNKERN_HD static int64_t c_offset(int k, int64_t row, int unit, int64_t units) {
  return gate_offset(Cell::kStates - 1, row, unit) + (k - 1) * units;
}

template <class Cell, class T>
RNNKERN_HD static UnitOperands<Cell, T> load_unit_operands(const CellOperands& p, int64_t units,
                                                           int64_t b, int64_t u) {
  UnitOperands<Cell, T> of_unit;
  for (int i = 0; i < Cell::kParams; ++i)
    of_unit.params[i] = Acc<T>(static_cast<const T*>(p.params)[i * units + u]);
  const int64_t first_mask = p.masks_offset + b * p.masks_stride + u;
  for (int i = 0; i < Cell::kMasks; ++i)
    of_unit.masks[i] = Acc<T>(static_cast<const T*>(p.masks)[first_mask + i * units]);
  return of_unit;
}

template <class V>
RNNKERN_HD static int64_t row_offset(const RowsByStep<V>& rows, int64_t t, int64_t b) {
  return t * rows.t_stride + b * rows.b_stride;
}

RNNKERN_HD static bool is_reset(const ResetParams& p, int64_t t, int64_t b) {
  return p.mask.data && t < p.steps && p.mask.data[row_offset(p.mask, t, b)];
}

// A unit of a state that batch row b gets before step t.
template <class T>
RNNKERN_HD static T state_after_reset(const RowsByStep<const void>& rows, int64_t t, int64_t b,
                                      int64_t u) {
  return rows.data ? static_cast<const T*>(rows.data)[row_offset(rows, t, b) + u] : T(0.f);
}

// Offsets of one (batch row, unit) of a step, in elements.
struct ForwardOffsets {
  int64_t input, y, row;  // row: in a layout (rows, H)
  int unit;

  RNNKERN_HD void operator+=(const ForwardOffsets& step) {
    input += step.input, y += step.y, row += step.row;
  }
};

RNNKERN_HD static ForwardOffsets forward_offsets(const StepForwardParams& p, int64_t b, int64_t u) {
  return {p.input_offset + b * p.input_stride + u, p.y_offset + b * p.y_stride + u,
          (p.row + b) * p.units + u, int(u)};
}

// The biases of one unit, by pre-activation.
template <class Cell, class T>
RNNKERN_HD static void load_bias(const StepForwardParams& p, int64_t u, Acc<T>* bias) {
  using A = Acc<T>;
  const auto bias_ih = static_cast<const T*>(p.bias_ih);
  const auto bias_hh = static_cast<const T*>(p.bias_hh);
  for (int s = 0; s < Cell::kPreacts; ++s) bias[s] = A(0);
  for (int s = 0; s < Cell::kGates; ++s) {
    if (bias_ih) bias[Cell::kInputPreact + s] += A(bias_ih[Cell::input_gate(s) * p.units + u]);
    if (bias_hh) bias[Cell::kHiddenPreact + s] += A(bias_hh[Cell::hidden_gate(s) * p.units + u]);
  }
}

// W_ih x, for the pre-activations from kInputPreact on.
template <class Cell, class T>
RNNKERN_HD static void load_input(const StepForwardParams& p, const ForwardOffsets& at,
                                  Acc<T>* input) {
  const auto from = static_cast<const Acc<T>*>(p.input) + at.input;
  for (int s = 0; s < Cell::kGates; ++s) input[s] = from[Cell::input_gate(s) * p.units];
}

// y and what backward needs; the running states are not stored.
template <class Cell, class T>
RNNKERN_HD static void store_forward(const StepForwardParams& p, const ForwardOffsets& at,
                                     const Acc<T>* next, const Acc<T>* saved) {
  using A = Acc<T>;
  if (p.y) static_cast<T*>(p.y)[at.y] = T(next[0]);
  if (p.saved)
    for (int s = 0; s < Cell::kSaved; ++s)
      static_cast<A*>(p.saved)[gate_offset(Cell::kSaved, at.row, at.unit) + s * p.units] = saved[s];
  for (int k = 1; k < Cell::kStates && p.c_states; ++k)
    static_cast<A*>(p.c_states)[c_offset<Cell>(k, at.row, at.unit, p.units)] = next[k];
}

template <class Cell, class T>
RNNKERN_HD static void load_states(const StepForwardParams& p, int64_t b, int64_t u,
                                   Acc<T>* state) {
  using A = Acc<T>;
  const int64_t at = b * p.units + u;
  state[0] = p.h ? static_cast<A*>(p.h)[at] : A(0);
  for (int k = 1; k < Cell::kStates; ++k)
    state[k] = static_cast<A*>(p.c)[c_offset<Cell>(k, at, int(u), p.units)];
}

template <class Cell, class T>
RNNKERN_HD static void store_states(const StepForwardParams& p, int64_t b, int64_t u,
                                    const Acc<T>* state) {
  using A = Acc<T>;
  const int64_t at = b * p.units + u;
  if (p.h) static_cast<A*>(p.h)[at] = state[0];
  if (p.h_operand) static_cast<T*>(p.h_operand)[at] = T(state[0]);
  for (int k = 1; k < Cell::kStates; ++k)
    static_cast<A*>(p.c)[c_offset<Cell>(k, at, int(u), p.units)] = state[k];
}

// The states that a row gets before step t. If it keeps its own: false, and `state` is as it was.
// So is state[0] with a projection, of which no kernel has the h.
template <class Cell, class T>
RNNKERN_HD static bool load_reset(const StepForwardParams& p, int64_t t, int64_t b, int64_t u,
                                  Acc<T>* state) {
  if (!is_reset(p.resets, t, b)) return false;
  if (p.h) state[0] = Acc<T>(state_after_reset<T>(p.resets.h, t, b, u));
  if constexpr (Cell::kStates == 2) state[1] = Acc<T>(state_after_reset<T>(p.resets.c, t, b, u));
  return true;
}

struct BackwardOffsets {
  int64_t y, dy, row;  // as in ForwardOffsets
  int64_t chunk_row;   // row, within the chunk
  int64_t first;       // in the states, (batch, H)
  int unit;
  bool began;  // at this step, from h0 and c0

  RNNKERN_HD void operator+=(const BackwardOffsets& step) {
    y += step.y, dy += step.dy, row += step.row, chunk_row += step.chunk_row;
  }
};

RNNKERN_HD static BackwardOffsets backward_offsets(const StepBackwardParams& p, int64_t b,
                                                   int64_t u) {
  const int64_t H = p.units;
  return {p.y_offset + b * p.y_stride + u,
          p.dy_offset + b * p.dy_stride + u,
          (p.row + b) * H + u,
          (p.chunk_row + b) * H + u,
          b * H + u,
          int(u),
          b >= p.prev_batch};
}

// Distance from a step's elements to those of the step before in time.
struct PrevStepOffset {
  int64_t y, row;
};

RNNKERN_HD static PrevStepOffset prev_step_offset(const StepBackwardParams& p) {
  return {p.prev_y_offset - p.y_offset, (p.prev_row - p.row) * p.units};
}

// What the forward pass saved of one unit at one step. A projected cell reads neither h.
template <class Cell, class T>
struct SavedValues {
  T h_prev, h;
  static constexpr int kOthers = Cell::kStates > 1 ? Cell::kStates - 1 : 1;
  Acc<T> c_prev[kOthers], c[kOthers], saved[Cell::kSaved + 1];  // c: the states but h
};

// State k, and those after it, before and after the step. Not a loop, which makes other code of the
// persistent kernels.
template <class Cell, class T, int k = 1>
RNNKERN_HD static void load_c(const StepBackwardParams& p, const BackwardOffsets& at,
                              const PrevStepOffset& prev, SavedValues<Cell, T>* v) {
  using A = Acc<T>;
  if constexpr (k < Cell::kStates) {
    const auto c0 = static_cast<const T*>(p.c0);
    const auto c_states = static_cast<const A*>(p.c_states);
    v->c[k - 1] = c_states[c_offset<Cell>(k, at.row, at.unit, p.units)];
    if (!at.began)
      v->c_prev[k - 1] = c_states[c_offset<Cell>(k, at.row + prev.row, at.unit, p.units)];
    else
      v->c_prev[k - 1] = c0 ? A(c0[c_offset<Cell>(k, at.first, at.unit, p.units)]) : A(0);
    load_c<Cell, T, k + 1>(p, at, prev, v);
  }
}

template <class Cell, class T>
RNNKERN_HD static void load_saved(const StepBackwardParams& p, const BackwardOffsets& at,
                                  const PrevStepOffset& prev, SavedValues<Cell, T>* v) {
  using A = Acc<T>;
  const auto y = static_cast<const T*>(p.y), h0 = static_cast<const T*>(p.h0);
  if (!p.dm) {
    v->h = y[at.y];
    if (!at.began)
      v->h_prev = y[at.y + prev.y];
    else
      v->h_prev = h0 ? h0[at.first] : T(0.f);
  }
  load_c<Cell, T>(p, at, prev, v);
  for (int s = 0; s < Cell::kSaved; ++s)
    v->saved[s] =
        static_cast<const A*>(p.saved)[gate_offset(Cell::kSaved, at.row, at.unit) + s * p.units];
}

// In a row that is reset before step t: the states it began the step with. False in others.
template <class Cell, class T>
RNNKERN_HD static bool load_reset(const StepBackwardParams& p, int64_t t, int64_t b, int64_t u,
                                  SavedValues<Cell, T>* v) {
  if (!is_reset(p.resets, t, b)) return false;
  if (!p.dm) v->h_prev = state_after_reset<T>(p.resets.h, t, b, u);
  if constexpr (Cell::kStates == 2)
    v->c_prev[0] = Acc<T>(state_after_reset<T>(p.resets.c, t, b, u));
  return true;
}

// The gradient of a state that is replaced before step t goes to what replaces it. Only this thread
// adds to that element, so the order is fixed; an atomic sum is one that it need not wait for.
template <class A>
RNNKERN_HD static void end_gradient(const RowsByStep<void>& to, int64_t t, int64_t b, int64_t u,
                                    A* grad) {
  if (to.data) {
    A* const sum = static_cast<A*>(to.data) + row_offset(to, t, b) + u;
#if defined(__CUDA_ARCH__)
    atomicAdd(sum, *grad);
#else
    *sum += *grad;
#endif
  }
  *grad = A(0);
}

// Values of a row of `dgates`, H each: the derivatives by the pre-activations, then by the learned
// values, of this row and step.
template <class Cell>
constexpr int kGradValues = Cell::kPreacts + Cell::kParams;

// Cell::backward: dnext becomes the total derivative.
template <class Cell, class T>
RNNKERN_HD static void cell_backward(const SavedValues<Cell, T>& v, Acc<T>* dnext, Acc<T>* dprev,
                                     Acc<T>* dgates, const UnitOperands<Cell, T>& of_unit = {}) {
  using A = Acc<T>;
  using V = CellMath<T>;
  V saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates], dn[Cell::kStates];
  V params[Cell::kParams + 1], masks[Cell::kMasks + 1], dp[Cell::kStates], ds[kGradValues<Cell>];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(v.saved[i]);
  prev[0] = V(A(v.h_prev));
  next[0] = V(A(v.h));
  for (int k = 1; k < Cell::kStates; ++k) prev[k] = V(v.c_prev[k - 1]), next[k] = V(v.c[k - 1]);
  for (int i = 0; i < Cell::kStates; ++i) dn[i] = V(dnext[i]);
  for (int i = 0; i < Cell::kParams; ++i) params[i] = V(of_unit.params[i]);
  for (int i = 0; i < Cell::kMasks; ++i) masks[i] = V(of_unit.masks[i]);
  call_backward<Cell>(saved, prev, params, masks, next, dn, dp, ds, ds + Cell::kPreacts);
  for (int i = 0; i < Cell::kStates; ++i) dnext[i] = A(dn[i]), dprev[i] = A(dp[i]);
  for (int i = 0; i < kGradValues<Cell>; ++i) dgates[i] = A(ds[i]);
}

// Operands of the weight gradients, and flows; the running derivatives are not stored.
template <class Cell, class T>
RNNKERN_HD static void store_backward(const StepBackwardParams& p, const BackwardOffsets& at,
                                      const SavedValues<Cell, T>& v, const Acc<T>* dnext,
                                      const Acc<T>* dgates) {
  using A = Acc<T>;
  using V = CellMath<T>;
  constexpr int kValues = kGradValues<Cell>;
  for (int s = 0; s < kValues; ++s)
    static_cast<T*>(p.dgates)[gate_offset(kValues, at.chunk_row, at.unit) + s * p.units] =
        T(dgates[s]);
  if (!p.dm) {
    if (p.h_prev) static_cast<T*>(p.h_prev)[at.chunk_row] = v.h_prev;
    if (p.flow_h) static_cast<A*>(p.flow_h)[at.row] = dnext[0];
  }
  for (int k = 1; k < Cell::kStates && p.flow_c; ++k)
    static_cast<A*>(p.flow_c)[c_offset<Cell>(k, at.row, at.unit, p.units)] = dnext[k];
  if constexpr (Cell::kProjects)
    if (p.m) {
      V saved[Cell::kSaved + 1], next[Cell::kStates];
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(v.saved[i]);
      next[0] = V(A(0)), next[1] = V(v.c[0]);
      static_cast<T*>(p.m)[at.chunk_row] = T(A(Cell::hidden(saved, next)));
    }
}

}  // namespace rnnkern::cuda
