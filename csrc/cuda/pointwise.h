// The bodies of the kernels, one (batch row, hidden unit) at a time, and how threads share them.
// Nothing here needs a GPU: the tests run the same functions on the CPU, thread by thread.
#pragma once
#include <type_traits>

#include "scalar.h"
#include "step.h"

namespace rnnkern::cuda {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// What the cell computes with.
template <class T>
using CellMath = std::conditional_t<sizeof(T) == 2, FastMathFloat, Acc<T>>;

// Threads cover rows and units in a grid-stride loop: 2-D, so that no index needs a division.
struct Grid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};

struct GridStride {
  int64_t row, row_step, unit, unit_step;
};

constexpr int kThreads = 256;

inline Grid make_grid(int64_t rows, int64_t units) {
  constexpr int64_t kMaxBlocksY = 65535, kMaxBlocksX = 65536;
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  Grid g;
  g.threads_x = 32;
  while (g.threads_x < kThreads && g.threads_x < units) g.threads_x *= 2;
  g.threads_y = kThreads / g.threads_x;
  g.blocks_x = unsigned(least((units + g.threads_x - 1) / g.threads_x, kMaxBlocksX));
  g.blocks_y = unsigned(least((rows + g.threads_y - 1) / g.threads_y, kMaxBlocksY));
  return g;
}

// The cell's functions, with sums and states as they are stored.
template <class Cell, class T>
RNNKERN_HD static void cell_forward(const Acc<T>* sum, const Acc<T>* prev, Acc<T>* next,
                                    Acc<T>* saved) {
  using V = CellMath<T>;
  V s[Cell::kPreacts], from[Cell::kStates], to[Cell::kStates], saved_values[Cell::kSaved + 1];
  for (int i = 0; i < Cell::kPreacts; ++i) s[i] = V(sum[i]);
  for (int i = 0; i < Cell::kStates; ++i) from[i] = V(prev[i]);
  Cell::forward(s, from, to, saved_values);
  for (int i = 0; i < Cell::kStates; ++i) next[i] = Acc<T>(to[i]);
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = Acc<T>(saved_values[i]);
}

// Where the first of `values` for each row and unit is; with one for each, it is at `row`.
RNNKERN_HD static int64_t gate_offset(int values, int64_t row, int unit) {
  return row * values - int64_t(values - 1) * unit;
}

// Where one (batch row, unit) of a step lies in the tensors, in elements.
struct ForwardOffsets {
  int64_t input, y, row;  // row: where there is one value for each row and unit
  int unit;

  RNNKERN_HD void operator+=(const ForwardOffsets& step) {
    input += step.input, y += step.y, row += step.row;
  }
};

RNNKERN_HD static ForwardOffsets forward_offsets(const StepForwardParams& p, int64_t b, int64_t u) {
  return {p.input_offset + b * p.input_row + u, p.y_offset + b * p.y_row + u,
          (p.row + b) * p.units + u, int(u)};
}

// The biases of one unit's sums.
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

// W_ih x, for the sums from kInputPreact on.
template <class Cell, class T>
RNNKERN_HD static void load_input(const StepForwardParams& p, const ForwardOffsets& at,
                                  Acc<T>* input) {
  const auto from = static_cast<const Acc<T>*>(p.input) + at.input;
  for (int s = 0; s < Cell::kGates; ++s) input[s] = from[Cell::input_gate(s) * p.units];
}

// All that a step leaves but the running states.
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

template <class Cell, class T>
RNNKERN_HD static void forward_element(const StepForwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  constexpr int G = Cell::kGates;
  const auto hidden = static_cast<const A*>(p.hidden);
  const ForwardOffsets at = forward_offsets(p, b, u);

  A sum[Cell::kPreacts], input[G];
  load_bias<Cell, T>(p, u, sum);
  load_input<Cell, T>(p, at, input);
  for (int s = 0; s < G; ++s) sum[Cell::kInputPreact + s] += input[s];
  for (int s = 0; hidden && s < G; ++s)
    sum[Cell::kHiddenPreact + s] += hidden[(b * G + Cell::hidden_gate(s)) * p.units + u];

  A prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
  load_states<Cell, T>(p, b, u, prev);
  cell_forward<Cell, T>(sum, prev, next, saved);
  store_states<Cell, T>(p, b, u, next);
  store_forward<Cell, T>(p, at, next, saved);
}

// h before the step.
template <class T>
RNNKERN_HD static T prev_h(const StepBackwardParams& p, int64_t b, int64_t u) {
  if (b < p.prev_batch) return static_cast<const T*>(p.y)[p.prev_y_offset + b * p.y_row + u];
  return p.h0 ? static_cast<const T*>(p.h0)[b * p.width + u] : T(0.f);
}

// The derivative of the loss by h after the step, from all that uses it later.
template <class T>
RNNKERN_HD static Acc<T> dh_total_of(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const int64_t state = b * p.width + u;
  A sum = static_cast<const A*>(p.dh)[state] + static_cast<const A*>(p.dh_recurrent)[state];
  if (p.dy) sum += A(static_cast<const T*>(p.dy)[p.dy_offset + b * p.dy_row + u]);
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

struct BackwardOffsets {
  int64_t y, dy, row;  // as in ForwardOffsets
  int64_t chunk_row;   // row, within the chunk
  int64_t first;       // among the initial states
  int unit;
  bool began;  // at this step, from the initial states

  RNNKERN_HD void operator+=(const BackwardOffsets& step) {
    y += step.y, dy += step.dy, row += step.row, chunk_row += step.chunk_row;
  }
};

RNNKERN_HD static BackwardOffsets backward_offsets(const StepBackwardParams& p, int64_t b,
                                                   int64_t u) {
  const int64_t H = p.units;
  return {p.y_offset + b * p.y_row + u,
          p.dy_offset + b * p.dy_row + u,
          (p.row + b) * H + u,
          (p.chunk_row + b) * H + u,
          b * H + u,
          int(u),
          b >= p.prev_batch};
}

// How far before a step's elements those of the step before in time lie.
struct PrevStepOffset {
  int64_t y, row;
};

RNNKERN_HD static PrevStepOffset prev_step_offset(const StepBackwardParams& p) {
  return {p.prev_y_offset - p.y_offset, (p.prev_row - p.row) * p.units};
}

// What forward left of one unit at one step. A cell that is projected asks for neither h.
template <class Cell, class T>
struct SavedValues {
  T h_prev, h;
  Acc<T> c_prev, c, saved[Cell::kSaved + 1];
};

template <class Cell, class T>
RNNKERN_HD static void load_saved(const StepBackwardParams& p, const BackwardOffsets& at,
                                  const PrevStepOffset& before,
                                  SavedValues<Cell, T>* saved_values) {
  using A = Acc<T>;
  const auto y = static_cast<const T*>(p.y), h0 = static_cast<const T*>(p.h0);
  const auto c0 = static_cast<const T*>(p.c0);
  const auto c_states = static_cast<const A*>(p.c_states);
  if (!p.dm) {
    saved_values->h = y[at.y];
    if (!at.began)
      saved_values->h_prev = y[at.y + before.y];
    else
      saved_values->h_prev = h0 ? h0[at.first] : T(0.f);
  }
  if constexpr (Cell::kStates == 2) {
    saved_values->c = c_states[at.row];
    if (!at.began)
      saved_values->c_prev = c_states[at.row + before.row];
    else
      saved_values->c_prev = c0 ? A(c0[at.first]) : A(0);
  }
  for (int s = 0; s < Cell::kSaved; ++s)
    saved_values->saved[s] =
        static_cast<const A*>(p.saved)[gate_offset(Cell::kSaved, at.row, at.unit) + s * p.units];
}

// The cell's adjoint (csrc/cells/cell.h): dnext becomes total.
template <class Cell, class T>
RNNKERN_HD static void cell_backward(const SavedValues<Cell, T>& saved_values, Acc<T>* dnext,
                                     Acc<T>* dprev, Acc<T>* dgates) {
  using A = Acc<T>;
  using V = CellMath<T>;
  V saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates], dn[Cell::kStates];
  V dp[Cell::kStates], ds[Cell::kPreacts];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(saved_values.saved[i]);
  prev[0] = V(A(saved_values.h_prev));
  next[0] = V(A(saved_values.h));
  if constexpr (Cell::kStates == 2) prev[1] = V(saved_values.c_prev), next[1] = V(saved_values.c);
  for (int i = 0; i < Cell::kStates; ++i) dn[i] = V(dnext[i]);
  Cell::backward(saved, prev, next, dn, dp, ds);
  for (int i = 0; i < Cell::kStates; ++i) dnext[i] = A(dn[i]), dprev[i] = A(dp[i]);
  for (int i = 0; i < Cell::kPreacts; ++i) dgates[i] = A(ds[i]);
}

// All that a step leaves but the running derivatives by the states.
template <class Cell, class T>
RNNKERN_HD static void store_backward(const StepBackwardParams& p, const BackwardOffsets& at,
                                      const SavedValues<Cell, T>& saved_values, const Acc<T>* dnext,
                                      const Acc<T>* dgates) {
  using A = Acc<T>;
  using V = CellMath<T>;
  for (int s = 0; s < Cell::kPreacts; ++s)
    static_cast<T*>(p.dgates)[gate_offset(Cell::kPreacts, at.chunk_row, at.unit) + s * p.units] =
        T(dgates[s]);
  if (!p.dm) {
    if (p.h_prev) static_cast<T*>(p.h_prev)[at.chunk_row] = saved_values.h_prev;
    if (p.flow_h) static_cast<A*>(p.flow_h)[at.row] = dnext[0];
  }
  if constexpr (Cell::kStates == 2)
    if (p.flow_c) static_cast<A*>(p.flow_c)[at.row] = dnext[1];
  if constexpr (Cell::kProjects)
    if (p.m) {
      V saved[Cell::kSaved + 1], next[Cell::kStates];
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(saved_values.saved[i]);
      next[0] = V(0), next[Cell::kStates - 1] = V(saved_values.c);
      static_cast<T*>(p.m)[at.chunk_row] = T(A(Cell::hidden(saved, next)));
    }
}

template <class Cell, class T>
RNNKERN_HD static void backward_element(const StepBackwardParams& p, int64_t b, int64_t u) {
  using A = Acc<T>;
  const BackwardOffsets at = backward_offsets(p, b, u);
  SavedValues<Cell, T> saved_values{};
  A dnext[Cell::kStates], dprev[Cell::kStates], dgates[Cell::kPreacts];
  load_saved<Cell, T>(p, at, prev_step_offset(p), &saved_values);
  dnext[0] = p.dm ? static_cast<const A*>(p.dm)[at.first] : dh_total_of<T>(p, b, u);
  if constexpr (Cell::kStates == 2) dnext[1] = static_cast<A*>(p.dc)[at.first];
  cell_backward<Cell, T>(saved_values, dnext, dprev, dgates);
  store_backward<Cell, T>(p, at, saved_values, dnext, dgates);
  if (!p.dm) static_cast<A*>(p.dh)[at.first] = dprev[0];
  if constexpr (Cell::kStates == 2) static_cast<A*>(p.dc)[at.first] = dprev[1];
}

// What one thread does.
template <class Cell, class T>
RNNKERN_HD static void forward_grid_stride(const StepForwardParams& p, const GridStride& at) {
  for (int64_t b = at.row; b < p.batch; b += at.row_step)
    for (int64_t u = at.unit; u < p.units; u += at.unit_step) forward_element<Cell, T>(p, b, u);
}

template <class Cell, class T>
RNNKERN_HD static void backward_grid_stride(const StepBackwardParams& p, const GridStride& at) {
  for (int64_t b = at.row; b < p.batch; b += at.row_step)
    for (int64_t u = at.unit; u < p.units; u += at.unit_step) backward_element<Cell, T>(p, b, u);
}

template <class T>
RNNKERN_HD static void dh_total_grid_stride(const StepBackwardParams& p, const GridStride& at) {
  for (int64_t b = at.row; b < p.batch; b += at.row_step)
    for (int64_t u = at.unit; u < p.width; u += at.unit_step) dh_total_element<T>(p, b, u);
}

// S is the type of both operands.
template <class T, class S>
RNNKERN_HD static void add_grid_stride(int64_t count, const S* a, const S* b, T* out, int64_t first,
                                       int64_t step) {
  using A = Acc<T>;
  for (int64_t i = first; i < count; i += step) out[i] = T(A(a[i]) + A(b[i]));
}

}  // namespace rnnkern::cuda
