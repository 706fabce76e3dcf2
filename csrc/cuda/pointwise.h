// The bodies of the kernels, one (batch row, hidden unit) at a time, and how threads share them.
// Nothing here needs a GPU: the tests run the same functions on the CPU, thread by thread.
#pragma once
#include <type_traits>

#include "scalar.h"
#include "step.h"

namespace rnnkern::cuda {

template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Accumulated = typename Accumulation<T>::type;

// What the cell computes with.
template <class T>
using CellValue = std::conditional_t<sizeof(T) == 2, Quick, Accumulated<T>>;

// Threads cover rows and units in a grid-stride loop: 2-D, so that no index needs a division.
struct Grid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};

struct Lane {
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
RNNKERN_HD static void cell_forward(const Accumulated<T>* sum, const Accumulated<T>* prev,
                                    Accumulated<T>* next, Accumulated<T>* saved) {
  using V = CellValue<T>;
  V s[Cell::kPreacts], from[Cell::kStates], to[Cell::kStates], kept[Cell::kSaved + 1];
  for (int i = 0; i < Cell::kPreacts; ++i) s[i] = V(sum[i]);
  for (int i = 0; i < Cell::kStates; ++i) from[i] = V(prev[i]);
  Cell::forward(s, from, to, kept);
  for (int i = 0; i < Cell::kStates; ++i) next[i] = Accumulated<T>(to[i]);
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = Accumulated<T>(kept[i]);
}

// Where the first of `values` for each row and unit is; with one for each, it is at `row`.
RNNKERN_HD static int64_t first_of(int values, int64_t row, int unit) {
  return row * values - int64_t(values - 1) * unit;
}

// Where one (batch row, unit) of a step lies in the tensors, in elements.
struct ForwardAt {
  int64_t input, y, row;  // row: where there is one value for each row and unit
  int unit;

  RNNKERN_HD void operator+=(const ForwardAt& step) {
    input += step.input, y += step.y, row += step.row;
  }
};

RNNKERN_HD static ForwardAt forward_at(const ForwardStep& p, int64_t b, int64_t u) {
  return {p.input_offset + b * p.input_row + u, p.y_offset + b * p.y_row + u,
          (p.row + b) * p.units + u, int(u)};
}

// The biases of one unit's sums.
template <class Cell, class T>
RNNKERN_HD static void load_bias(const ForwardStep& p, int64_t u, Accumulated<T>* bias) {
  using A = Accumulated<T>;
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
RNNKERN_HD static void load_input(const ForwardStep& p, const ForwardAt& at,
                                  Accumulated<T>* input) {
  const auto from = static_cast<const Accumulated<T>*>(p.input) + at.input;
  for (int s = 0; s < Cell::kGates; ++s) input[s] = from[Cell::input_gate(s) * p.units];
}

// All that a step leaves but the running states.
template <class Cell, class T>
RNNKERN_HD static void store_forward(const ForwardStep& p, const ForwardAt& at,
                                     const Accumulated<T>* next, const Accumulated<T>* saved) {
  using A = Accumulated<T>;
  if (p.y) static_cast<T*>(p.y)[at.y] = T(next[0]);
  if (p.saved)
    for (int s = 0; s < Cell::kSaved; ++s)
      static_cast<A*>(p.saved)[first_of(Cell::kSaved, at.row, at.unit) + s * p.units] = saved[s];
  if constexpr (Cell::kStates == 2)
    if (p.cells) static_cast<A*>(p.cells)[at.row] = next[1];
}

template <class Cell, class T>
RNNKERN_HD static void load_states(const ForwardStep& p, int64_t b, int64_t u,
                                   Accumulated<T>* state) {
  using A = Accumulated<T>;
  const int64_t at = b * p.units + u;
  state[0] = p.h ? static_cast<A*>(p.h)[at] : A(0);
  if constexpr (Cell::kStates == 2) state[1] = static_cast<A*>(p.c)[at];
}

template <class Cell, class T>
RNNKERN_HD static void store_states(const ForwardStep& p, int64_t b, int64_t u,
                                    const Accumulated<T>* state) {
  using A = Accumulated<T>;
  const int64_t at = b * p.units + u;
  if (p.h) static_cast<A*>(p.h)[at] = state[0];
  if (p.h_operand) static_cast<T*>(p.h_operand)[at] = T(state[0]);
  if constexpr (Cell::kStates == 2) static_cast<A*>(p.c)[at] = state[1];
}

template <class Cell, class T>
RNNKERN_HD static void forward_element(const ForwardStep& p, int64_t b, int64_t u) {
  using A = Accumulated<T>;
  constexpr int G = Cell::kGates;
  const auto hidden = static_cast<const A*>(p.hidden);
  const ForwardAt at = forward_at(p, b, u);

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
RNNKERN_HD static T previous_h(const BackwardStep& p, int64_t b, int64_t u) {
  if (b < p.previous_batch)
    return static_cast<const T*>(p.y)[p.previous_y_offset + b * p.y_row + u];
  return p.h0 ? static_cast<const T*>(p.h0)[b * p.width + u] : T(0.f);
}

// The derivative of the loss by h after the step, from all that uses it later.
template <class T>
RNNKERN_HD static Accumulated<T> total_dh(const BackwardStep& p, int64_t b, int64_t u) {
  using A = Accumulated<T>;
  const int64_t state = b * p.width + u;
  A sum = static_cast<const A*>(p.dh)[state] + static_cast<const A*>(p.recurrent)[state];
  if (p.dy) sum += A(static_cast<const T*>(p.dy)[p.dy_offset + b * p.dy_row + u]);
  return sum;
}

template <class T>
RNNKERN_HD static void total_element(const BackwardStep& p, int64_t b, int64_t u) {
  using A = Accumulated<T>;
  const int64_t R = p.width, at = (p.chunk_row + b) * R + u;
  const A total = total_dh<T>(p, b, u);
  static_cast<T*>(p.total)[at] = T(total);
  static_cast<A*>(p.dh)[b * R + u] = A(0);
  if (p.previous) static_cast<T*>(p.previous)[at] = previous_h<T>(p, b, u);
  if (p.flow_h) static_cast<A*>(p.flow_h)[(p.row + b) * R + u] = total;
}

struct BackwardAt {
  int64_t y, dy, row;  // as in ForwardAt
  int64_t chunk_row;   // row, within the chunk
  int64_t first;       // among the initial states
  int unit;
  bool began;  // at this step, from the initial states

  RNNKERN_HD void operator+=(const BackwardAt& step) {
    y += step.y, dy += step.dy, row += step.row, chunk_row += step.chunk_row;
  }
};

RNNKERN_HD static BackwardAt backward_at(const BackwardStep& p, int64_t b, int64_t u) {
  const int64_t H = p.units;
  return {p.y_offset + b * p.y_row + u,
          p.dy_offset + b * p.dy_row + u,
          (p.row + b) * H + u,
          (p.chunk_row + b) * H + u,
          b * H + u,
          int(u),
          b >= p.previous_batch};
}

// How far before a step's elements those of the step before in time lie.
struct Before {
  int64_t y, row;
};

RNNKERN_HD static Before before_step(const BackwardStep& p) {
  return {p.previous_y_offset - p.y_offset, (p.previous_row - p.row) * p.units};
}

// What forward left of one unit at one step. A cell that is projected asks for neither h.
template <class Cell, class T>
struct Kept {
  T h_before, h;
  Accumulated<T> c_before, c, saved[Cell::kSaved + 1];
};

template <class Cell, class T>
RNNKERN_HD static void load_kept(const BackwardStep& p, const BackwardAt& at, const Before& before,
                                 Kept<Cell, T>* kept) {
  using A = Accumulated<T>;
  const auto y = static_cast<const T*>(p.y), h0 = static_cast<const T*>(p.h0);
  const auto c0 = static_cast<const T*>(p.c0);
  const auto cells = static_cast<const A*>(p.cells);
  if (!p.dm) {
    kept->h = y[at.y];
    if (!at.began)
      kept->h_before = y[at.y + before.y];
    else
      kept->h_before = h0 ? h0[at.first] : T(0.f);
  }
  if constexpr (Cell::kStates == 2) {
    kept->c = cells[at.row];
    if (!at.began)
      kept->c_before = cells[at.row + before.row];
    else
      kept->c_before = c0 ? A(c0[at.first]) : A(0);
  }
  for (int s = 0; s < Cell::kSaved; ++s)
    kept->saved[s] =
        static_cast<const A*>(p.saved)[first_of(Cell::kSaved, at.row, at.unit) + s * p.units];
}

// The cell's adjoint (csrc/cells/cell.h): dnext becomes total.
template <class Cell, class T>
RNNKERN_HD static void cell_backward(const Kept<Cell, T>& kept, Accumulated<T>* dnext,
                                     Accumulated<T>* dprev, Accumulated<T>* dsum) {
  using A = Accumulated<T>;
  using V = CellValue<T>;
  V saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates], dn[Cell::kStates];
  V dp[Cell::kStates], ds[Cell::kPreacts];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(kept.saved[i]);
  prev[0] = V(A(kept.h_before));
  next[0] = V(A(kept.h));
  if constexpr (Cell::kStates == 2) prev[1] = V(kept.c_before), next[1] = V(kept.c);
  for (int i = 0; i < Cell::kStates; ++i) dn[i] = V(dnext[i]);
  Cell::backward(saved, prev, next, dn, dp, ds);
  for (int i = 0; i < Cell::kStates; ++i) dnext[i] = A(dn[i]), dprev[i] = A(dp[i]);
  for (int i = 0; i < Cell::kPreacts; ++i) dsum[i] = A(ds[i]);
}

// All that a step leaves but the running derivatives by the states.
template <class Cell, class T>
RNNKERN_HD static void store_backward(const BackwardStep& p, const BackwardAt& at,
                                      const Kept<Cell, T>& kept, const Accumulated<T>* dnext,
                                      const Accumulated<T>* dsum) {
  using A = Accumulated<T>;
  using V = CellValue<T>;
  for (int s = 0; s < Cell::kPreacts; ++s)
    static_cast<T*>(p.dsum)[first_of(Cell::kPreacts, at.chunk_row, at.unit) + s * p.units] =
        T(dsum[s]);
  if (!p.dm) {
    if (p.previous) static_cast<T*>(p.previous)[at.chunk_row] = kept.h_before;
    if (p.flow_h) static_cast<A*>(p.flow_h)[at.row] = dnext[0];
  }
  if constexpr (Cell::kStates == 2)
    if (p.flow_c) static_cast<A*>(p.flow_c)[at.row] = dnext[1];
  if constexpr (Cell::kProjects)
    if (p.m) {
      V saved[Cell::kSaved + 1], next[Cell::kStates];
      for (int i = 0; i < Cell::kSaved; ++i) saved[i] = V(kept.saved[i]);
      next[0] = V(0), next[Cell::kStates - 1] = V(kept.c);
      static_cast<T*>(p.m)[at.chunk_row] = T(A(Cell::hidden(saved, next)));
    }
}

template <class Cell, class T>
RNNKERN_HD static void backward_element(const BackwardStep& p, int64_t b, int64_t u) {
  using A = Accumulated<T>;
  const BackwardAt at = backward_at(p, b, u);
  Kept<Cell, T> kept{};
  A dnext[Cell::kStates], dprev[Cell::kStates], dsum[Cell::kPreacts];
  load_kept<Cell, T>(p, at, before_step(p), &kept);
  dnext[0] = p.dm ? static_cast<const A*>(p.dm)[at.first] : total_dh<T>(p, b, u);
  if constexpr (Cell::kStates == 2) dnext[1] = static_cast<A*>(p.dc)[at.first];
  cell_backward<Cell, T>(kept, dnext, dprev, dsum);
  store_backward<Cell, T>(p, at, kept, dnext, dsum);
  if (!p.dm) static_cast<A*>(p.dh)[at.first] = dprev[0];
  if constexpr (Cell::kStates == 2) static_cast<A*>(p.dc)[at.first] = dprev[1];
}

// What one thread does.
template <class Cell, class T>
RNNKERN_HD static void forward_lane(const ForwardStep& p, const Lane& lane) {
  for (int64_t b = lane.row; b < p.batch; b += lane.row_step)
    for (int64_t u = lane.unit; u < p.units; u += lane.unit_step) forward_element<Cell, T>(p, b, u);
}

template <class Cell, class T>
RNNKERN_HD static void backward_lane(const BackwardStep& p, const Lane& lane) {
  for (int64_t b = lane.row; b < p.batch; b += lane.row_step)
    for (int64_t u = lane.unit; u < p.units; u += lane.unit_step)
      backward_element<Cell, T>(p, b, u);
}

template <class T>
RNNKERN_HD static void total_lane(const BackwardStep& p, const Lane& lane) {
  for (int64_t b = lane.row; b < p.batch; b += lane.row_step)
    for (int64_t u = lane.unit; u < p.width; u += lane.unit_step) total_element<T>(p, b, u);
}

// S is the type of both operands.
template <class T, class S>
RNNKERN_HD static void add_lane(int64_t count, const S* a, const S* b, T* out, int64_t first,
                                int64_t step) {
  using A = Accumulated<T>;
  for (int64_t i = first; i < count; i += step) out[i] = T(A(a[i]) + A(b[i]));
}

}  // namespace rnnkern::cuda
