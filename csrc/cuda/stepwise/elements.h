// The kernels of the stepwise engine without the launch: what one thread does with its
// (row, unit) pairs. Pre-activations, states and running derivatives are in global memory.
#pragma once
#include "../step.h"
#include "grid.h"

namespace rnnkern::cuda {

// The s-th pre-activation's part of the product with W_hh, in a layout (rows, gates, H), or with
// heads (heads, rows, gates, H / heads), for `rows` rows of memory: its offset.
template <class Cell>
RNNKERN_HD static int64_t hidden_offset(int s, int64_t heads, int64_t rows, int64_t units,
                                        int64_t b, int64_t u) {
  if constexpr (Cell::kRecurrent == Recurrent::heads) {
    const uint32_t head_units = uint32_t(units) / uint32_t(heads);
    const uint32_t head = uint32_t(u) / head_units, unit = uint32_t(u) % head_units;
    return ((head * rows + b) * Cell::kGates + Cell::hidden_gate(s)) * head_units + unit;
  } else {
    return (b * Cell::kGates + Cell::hidden_gate(s)) * units + u;
  }
}

template <class Cell, class T>
RNNKERN_HD static void forward_element(const StepForwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  constexpr int G = Cell::kGates;
  const auto hidden = static_cast<const A*>(p.hidden);
  const ForwardOffsets at = forward_offsets(p, b, u);

  A preact[Cell::kPreacts], input[G];
  load_bias<Cell, T>(p, u, preact);
  load_input<Cell, T>(p, at, input);
  for (int s = 0; s < G; ++s) preact[Cell::kInputPreact + s] += input[s];
  for (int s = 0; hidden && s < G; ++s)
    preact[Cell::kHiddenPreact + s] +=
        hidden[hidden_offset<Cell>(s, p.cell.heads, p.batch, p.units, b, u)];

  A prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
  load_states<Cell, T>(p, b, u, prev);
  const auto of_unit = load_unit_operands<Cell, T>(p.cell, p.units, b, u);
  cell_forward<Cell, T>(preact, prev, next, saved, of_unit);
  store_forward<Cell, T>(p, at, next, saved);
  load_reset<Cell, T>(p, p.t + 1, b, u, next);
  store_states<Cell, T>(p, b, u, next);
}

// h before the step.
template <class T>
RNNKERN_HD static T prev_h(const StepBackwardParams& p, int64_t b, int64_t u) {
  if (is_reset(p.resets, p.t, b)) return state_after_reset<T>(p.resets.h, p.t, b, u);
  if (b < p.prev_batch) return static_cast<const T*>(p.y)[p.prev_y_offset + b * p.y_stride + u];
  return p.h0 ? static_cast<const T*>(p.h0)[b * p.width + u] : T(0.f);
}

// dL/dh_t: from the cell and W_hh of the next step, and from y.
template <class T>
RNNKERN_HD static Acc<T> dh_total_of(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const int64_t state = b * p.width + u;
  A sum = static_cast<const A*>(p.dh)[state] + static_cast<const A*>(p.dh_recurrent)[state];
  if (is_reset(p.resets, p.t + 1, b)) end_gradient(p.dreset_h, p.t + 1, b, u, &sum);
  if (p.dy) sum += A(static_cast<const T*>(p.dy)[p.dy_offset + b * p.dy_stride + u]);
  return sum;
}

template <class T>
RNNKERN_HD static void dh_total_element(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const int64_t R = p.width, at = (p.chunk_row + b) * R + u;
  const A total = dh_total_of<T>(p, b, u);
  static_cast<T*>(p.dh_total)[at] = T(total);
  static_cast<A*>(p.dh)[b * R + u] = A(0);
  if (p.h_prev) static_cast<T*>(p.h_prev)[at] = prev_h<T>(p, b, u);
  if (p.flow_h) static_cast<A*>(p.flow_h)[(p.row + b) * R + u] = total;
}

// The derivatives by W_hh h, as the rows of W_hh in heads are.
template <class Cell, class T>
RNNKERN_HD static void store_head_dgates(const StepBackwardParams& p, int64_t b, int64_t u,
                                         const Acc<T>* dgates) {
  const int64_t row = p.chunk_row + b;
  for (int s = 0; s < Cell::kGates; ++s)
    static_cast<T*>(
        p.head_dgates)[hidden_offset<Cell>(s, p.cell.heads, p.chunk_rows, p.units, row, u)] =
        T(dgates[Cell::kHiddenPreact + s]);
}

template <class Cell, class T>
RNNKERN_HD static void backward_element(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const BackwardOffsets at = backward_offsets(p, b, u);
  SavedValues<Cell, T> values{};
  A dnext[Cell::kStates], dprev[Cell::kStates], dgates[kGradValues<Cell>];
  load_saved<Cell, T>(p, at, prev_step_offset(p), &values);
  load_reset<Cell, T>(p, p.t, b, u, &values);
  dnext[0] = p.dm ? static_cast<const A*>(p.dm)[at.first] : dh_total_of<T>(p, b, u);
  for (int k = 1; k < Cell::kStates; ++k)
    dnext[k] = static_cast<A*>(p.dc)[c_offset<Cell>(k, at.first, at.unit, p.units)];
  if constexpr (Cell::kStates == 2)
    if (is_reset(p.resets, p.t + 1, b)) end_gradient(p.dreset_c, p.t + 1, b, u, &dnext[1]);
  const auto of_unit = load_unit_operands<Cell, T>(p.cell, p.units, b, u);
  cell_backward<Cell, T>(values, dnext, dprev, dgates, of_unit);
  store_backward<Cell, T>(p, at, values, dnext, dgates);
  if constexpr (Cell::kRecurrent == Recurrent::heads) store_head_dgates<Cell, T>(p, b, u, dgates);
  if (!p.dm) static_cast<A*>(p.dh)[at.first] = dprev[0];
  for (int k = 1; k < Cell::kStates; ++k)
    static_cast<A*>(p.dc)[c_offset<Cell>(k, at.first, at.unit, p.units)] = dprev[k];
}

template <class T>
RNNKERN_HD static void end_gradients_element(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const int64_t t = p.t + 1;
  if (!is_reset(p.resets, t, b)) return;
  if (u < p.width) {
    A* const dh = static_cast<A*>(p.dh) + b * p.width + u;
    A* const dh_recurrent = static_cast<A*>(p.dh_recurrent) + b * p.width + u;
    A sum = *dh + *dh_recurrent;
    end_gradient(p.dreset_h, t, b, u, &sum);
    *dh = *dh_recurrent = A(0);
  }
  if (p.dc) end_gradient(p.dreset_c, t, b, u, static_cast<A*>(p.dc) + b * p.units + u);
}

// One thread's part of a kernel: f(row, unit) for its elements.
template <class F>
RNNKERN_HD static void grid_stride(const GridStride& at, int64_t rows, int64_t units, F&& f) {
  for (int64_t b = at.row; b < rows; b += at.row_step)
    for (int64_t u = at.unit; u < units; u += at.unit_step) f(b, u);
}

// The kernels: each is what one thread of a grid does.
template <class Cell, class T>
struct ForwardKernel {
  StepForwardParams p;

  RNNKERN_HD void operator()(const GridStride& at) const {
    grid_stride(at, p.batch, p.units,
                [&](int64_t b, int64_t u) { forward_element<Cell, T>(p, b, u); });
  }
};

template <class Cell, class T>
struct BackwardKernel {
  StepBackwardParams p;

  RNNKERN_HD void operator()(const GridStride& at) const {
    grid_stride(at, p.batch, p.units,
                [&](int64_t b, int64_t u) { backward_element<Cell, T>(p, b, u); });
  }
};

template <class T>
struct DhTotalKernel {
  StepBackwardParams p;

  RNNKERN_HD void operator()(const GridStride& at) const {
    grid_stride(at, p.batch, p.width, [&](int64_t b, int64_t u) { dh_total_element<T>(p, b, u); });
  }
};

template <class T>
struct EndGradientsKernel {
  StepBackwardParams p;

  RNNKERN_HD void operator()(const GridStride& at) const {
    grid_stride(at, p.batch, p.units,
                [&](int64_t b, int64_t u) { end_gradients_element<T>(p, b, u); });
  }
};

// `state` is before step t; S is its type, T or A.
template <class T, class S>
struct ResetKernel {
  ResetParams p;
  RowsByStep<const void> from;
  int64_t t, batch, width;
  S* state;

  RNNKERN_HD void operator()(const GridStride& at) const {
    grid_stride(at, batch, width, [&](int64_t b, int64_t u) {
      if (is_reset(p, t, b)) state[b * width + u] = S(state_after_reset<T>(from, t, b, u));
    });
  }
};

// S is the type of both operands, T or A.
template <class T, class S>
struct AddKernel {
  int64_t count;
  const S *a, *b;
  T* out;

  RNNKERN_HD void operator()(const GridStride& at) const {
    for (int64_t i = at.unit; i < count; i += at.unit_step) out[i] = T(Acc<T>(a[i]) + Acc<T>(b[i]));
  }
};

}  // namespace rnnkern::cuda
