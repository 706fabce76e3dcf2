// A cell's GateLayout.
#pragma once
#include "../cells/limits.h"
#include "params.h"

namespace rnnkern::cuda {

template <class Cell>
constexpr GateLayout gate_layout_of() {
  static_assert(check_cuda_limits<Cell>() && kMaxPreacts <= GateLayout::kMax);
  GateLayout layout{Cell::kGates, Cell::kPreacts, Cell::kInputPreact, Cell::kHiddenPreact, {}, {}};
  for (int s = 0; s < Cell::kGates; ++s) {
    layout.input_gate[s] = Cell::input_gate(s);
    layout.hidden_gate[s] = Cell::hidden_gate(s);
  }
  return layout;
}

}  // namespace rnnkern::cuda
