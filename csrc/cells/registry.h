// The built-in cells: the number that crosses the bindings, the struct it stands for, and its
// facts. Numbers from kCellCount on are cells that users' libraries add (core/cell_facts.h).
#pragma once
#include <cstdint>

#include "elman.h"
#include "facts.h"
#include "gru.h"
#include "lstm.h"

namespace rnnkern {

enum class CellId : int { lstm, gru, rnn_tanh, rnn_relu };
constexpr int kCellCount = 4;

// By CellId. The modes are torch.nn's.
inline constexpr CellFacts kCellFacts[kCellCount] = {
    facts_of<Lstm>("LSTM"),
    facts_of<Gru>("GRU"),
    facts_of<ElmanTanh>("RNN_TANH"),
    facts_of<ElmanRelu>("RNN_RELU"),
};

// Calls f(Cell{}) with the built-in cell that id stands for.
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
