// The table of cells: the number that crosses the bindings, and the struct it stands for.
// rnnkern/cells.py mirrors the order.
#pragma once
#include "elman.h"
#include "gru.h"
#include "lstm.h"

namespace rnnkern {

enum class CellId : int { lstm, gru, rnn_tanh, rnn_relu };
constexpr int kCellCount = 4;

// Calls f(Cell{}) with the cell that id stands for.
template <class F>
auto visit_cell(CellId id, F&& f) {
  switch (id) {
    case CellId::gru: return f(Gru{});
    case CellId::rnn_tanh: return f(ElmanTanh{});
    case CellId::rnn_relu: return f(ElmanRelu{});
    default: return f(Lstm{});
  }
}

// The list of a layer's weights: (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each direction. D is not
// said anywhere; the length of the list tells it.
struct WeightList {
  bool bias, projection;
  int per_direction, directions;

  WeightList(int count, bool third_is_a_vector)
      : bias(third_is_a_vector),
        projection(count % (bias ? 5 : 3) == 0),
        per_direction((bias ? 4 : 2) + projection),
        directions(count / per_direction) {}

  bool fits(int count) const {
    return (directions == 1 || directions == 2) && directions * per_direction == count;
  }
};

}  // namespace rnnkern
