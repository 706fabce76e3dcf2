// One (batch row, hidden unit) of a time step: its offsets in the tensors of params.h, what it
// loads, the cell, and what it stores. Both engines are made of these functions, for one thread.
// Where pre-activations come from and how threads share a step is not known here.
// Nothing needs a GPU: the tests run the same functions on the CPU.
#pragma once
#include "cell_math.h"
#include "params.h"

namespace rnnkern::cuda {

// Cell::forward, from and to the accumulation type.
template <class Cell, class T>
RNNKERN_HD static void cell_forward(const Acc<T>* preact, const Acc<T>* prev, Acc<T>* next,
                                    Acc<T>* saved) {
  using V = CellMath<T>;
  static_assert(check_cuda_limits<Cell>());
  V x[Cell::kPreacts], from[Cell::kStates], to[Cell::kStates], kept[Cell::kSaved + 1];
  for (int i = 0; i < Cell::kPreacts; ++i) x[i] = V(preact[i]);
  for (int i = 0; i < Cell::kStates; ++i) from[i] = V(prev[i]);
  Cell::forward(x, from, to, kept);
  for (int i = 0; i < Cell::kStates; ++i) next[i] = Acc<T>(to[i]);
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = Acc<T>(kept[i]);
}

// Layout (rows, values, H): the offset of a unit's first value, from `row`, its offset in a layout
// (rows, H).
RNNKERN_HD static int64_t gate_offset(int values, int64_t row, int unit) {
  return row * values - int64_t(values - 1) * unit;
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
  if constexpr (Cell::kStates == 2)
    if (p.c_states) static_cast<A*>(p.c_states)[at.row] = next[1];
}

template <class Cell, class T>
RNNKERN_HD static void load_states(const StepForwardParams& p, int64_t b, int64_t u,
                                   Acc<T>* state) {
  using A = Acc<T>;
  const int64_t at = b * p.units + u;
  state[0] = p.h ? static_cast<A*>(p.h)[at] : A(0);
  if constexpr (Cell::kStates == 2) state[1] = static_cast<A*>(p.c)[at];
}

template <class Cell, class T>
RNNKERN_HD static void store_states(const StepForwardParams& p, int64_t b, int64_t u,
                                    const Acc<T>* state) {
  using A = Acc<T>;
  const int64_t at = b * p.units + u;
  if (p.h) static_cast<A*>(p.h)[at] = state[0];
  if (p.h_operand) static_cast<T*>(p.h_operand)[at] = T(state[0]);
  if constexpr (Cell::kStates == 2) static_cast<A*>(p.c)[at] = state[1];
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
  Acc<T> c_prev, c, saved[Cell::kSaved + 1];
};

template <class Cell, class T>
RNNKERN_HD static void load_saved(const StepBackwardParams& p, const BackwardOffsets& at,
                                  const PrevStepOffset& prev, SavedValues<Cell, T>* v) {
  using A = Acc<T>;
  const auto y = static_cast<const T*>(p.y), h0 = static_cast<const T*>(p.h0);
  const auto c0 = static_cast<const T*>(p.c0);
  const auto c_states = static_cast<const A*>(p.c_states);
  if (!p.dm) {
    v->h = y[at.y];
    if (!at.began)
      v->h_prev = y[at.y + prev.y];
    else
      v->h_prev = h0 ? h0[at.first] : T(0.f);
  }
  if constexpr (Cell::kStates == 2) {
    v->c = c_states[at.row];
    if (!at.began)
      v->c_prev = c_states[at.row + prev.row];
    else
      v->c_prev = c0 ? A(c0[at.first]) : A(0);
  }
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
  if constexpr (Cell::kStates == 2) v->c_prev = Acc<T>(state_after_reset<T>(p.resets.c, t, b, u));
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

// Cell::backward: dnext becomes the total derivative.
template <class Cell, class T>
RNNKERN_HD static void cell_backward(const SavedValues<Cell, T>& v, Acc<T>* dnext, Acc<T>* dprev,
                                     Acc<T>* dgates) {
  using A = Acc<T>;
  using V = CellMath<T>;
  V saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates], dn[Cell::kStates];
  V dp[Cell::kStates], ds[Cell::kPreacts];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(v.saved[i]);
  prev[0] = V(A(v.h_prev));
  next[0] = V(A(v.h));
  if constexpr (Cell::kStates == 2) prev[1] = V(v.c_prev), next[1] = V(v.c);
  for (int i = 0; i < Cell::kStates; ++i) dn[i] = V(dnext[i]);
  Cell::backward(saved, prev, next, dn, dp, ds);
  for (int i = 0; i < Cell::kStates; ++i) dnext[i] = A(dn[i]), dprev[i] = A(dp[i]);
  for (int i = 0; i < Cell::kPreacts; ++i) dgates[i] = A(ds[i]);
}

// Operands of the weight gradients, and flows; the running derivatives are not stored.
template <class Cell, class T>
RNNKERN_HD static void store_backward(const StepBackwardParams& p, const BackwardOffsets& at,
                                      const SavedValues<Cell, T>& v, const Acc<T>* dnext,
                                      const Acc<T>* dgates) {
  using A = Acc<T>;
  using V = CellMath<T>;
  for (int s = 0; s < Cell::kPreacts; ++s)
    static_cast<T*>(p.dgates)[gate_offset(Cell::kPreacts, at.chunk_row, at.unit) + s * p.units] =
        T(dgates[s]);
  if (!p.dm) {
    if (p.h_prev) static_cast<T*>(p.h_prev)[at.chunk_row] = v.h_prev;
    if (p.flow_h) static_cast<A*>(p.flow_h)[at.row] = dnext[0];
  }
  if constexpr (Cell::kStates == 2)
    if (p.flow_c) static_cast<A*>(p.flow_c)[at.row] = dnext[1];
  if constexpr (Cell::kProjects)
    if (p.m) {
      V saved[Cell::kSaved + 1], next[Cell::kStates];
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(v.saved[i]);
      next[0] = V(0), next[Cell::kStates - 1] = V(v.c);
      static_cast<T*>(p.m)[at.chunk_row] = T(A(Cell::hidden(saved, next)));
    }
}

}  // namespace rnnkern::cuda
