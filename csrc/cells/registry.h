// The table of cells: the number that crosses the bindings, and the struct it stands for.
// The library exports the table (table.h), which rnnkern/cell_spec.py reads.
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

}  // namespace rnnkern
