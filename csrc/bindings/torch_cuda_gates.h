// The order of a cell's gates: torch's in weights and biases, the cell's in pre-activations.
#pragma once
#include "torch_cuda_tensors.h"

namespace rnnkern {

// Gates that are neighbours in both orders: gates [gate, gate + count) of torch's order are the
// pre-activations [preact, preact + count).
struct GateRange {
  int preact, gate, count;
};

struct GateOrder {
  int preacts, first_input_preact, first_hidden_preact;
  std::vector<GateRange> input, hidden;

  explicit GateOrder(CellId id) {
    STD_TORCH_CHECK(int(id) < kCellCount,
                    "rnnkern: cells that are not built in have no CUDA kernels yet");
    visit_cell(id, [&](auto cell) {
      using Cell = decltype(cell);
      preacts = Cell::kPreacts;
      first_input_preact = Cell::kInputPreact;
      first_hidden_preact = Cell::kHiddenPreact;
      input = ranges(Cell::kGates, first_input_preact, Cell::input_gate);
      hidden = ranges(Cell::kGates, first_hidden_preact, Cell::hidden_gate);
    });
  }

  bool shares_preacts() const { return first_input_preact == first_hidden_preact; }

  static std::vector<GateRange> ranges(int gates, int first_preact, int (*gate_of)(int)) {
    std::vector<GateRange> all;
    for (int s = 0; s < gates; ++s) {
      if (s && gate_of(s) == gate_of(s - 1) + 1)
        ++all.back().count;
      else
        all.push_back({first_preact + s, gate_of(s), 1});
    }
    return all;
  }

  // The weight with its rows in the order of the pre-activations.
  static Tensor in_preact_order(const Tensor& weight, const std::vector<GateRange>& ranges,
                                int64_t units) {
    if (ranges.size() == 1) return weight;
    const int64_t columns = weight.size(1);
    Tensor ordered = stable::empty_like(weight);
    for (const GateRange& range : ranges) {
      const int64_t rows = range.count * units, from = range.gate * units;
      const int64_t first = (range.preact - ranges[0].preact) * units;
      Tensor to = matrix_view(ordered, first * columns, rows, columns, columns);
      stable::copy_(to, matrix_view(weight, from * columns, rows, columns, columns));
    }
    return ordered;
  }
};

}  // namespace rnnkern
