// How a cell's gates lie in torch's weights and among the sums of the kernels.
#pragma once
#include "torch_cuda_tensors.h"

namespace rnnkern {

// Gates that are neighbours both in torch's order and among the sums: gates [gate, gate + count)
// are the sums [sum, sum + count).
struct Run {
  int sum, gate, count;
};

struct Gates {
  int sums, first_input_sum, first_hidden_sum;
  std::vector<Run> input, hidden;

  explicit Gates(CellId id) {
    visit_cell(id, [&](auto cell) {
      using Cell = decltype(cell);
      sums = Cell::kPreacts;
      first_input_sum = Cell::kInputPreact;
      first_hidden_sum = Cell::kHiddenPreact;
      input = runs(Cell::kGates, first_input_sum, Cell::input_gate);
      hidden = runs(Cell::kGates, first_hidden_sum, Cell::hidden_gate);
    });
  }

  static std::vector<Run> runs(int gates, int first_sum, int (*gate_of)(int)) {
    std::vector<Run> all;
    for (int s = 0; s < gates; ++s) {
      if (s && gate_of(s) == gate_of(s - 1) + 1)
        ++all.back().count;
      else
        all.push_back({first_sum + s, gate_of(s), 1});
    }
    return all;
  }

  // The weight with its rows in the order of the sums.
  static Tensor in_sum_order(const Tensor& weight, const std::vector<Run>& runs, int64_t units) {
    if (runs.size() == 1) return weight;
    const int64_t columns = weight.size(1);
    Tensor ordered = stable::empty_like(weight);
    for (const Run& run : runs) {
      const int64_t rows = run.count * units, from = run.gate * units;
      Tensor to =
          matrix(ordered, (run.sum - runs[0].sum) * units * columns, rows, columns, columns);
      stable::copy_(to, matrix(weight, from * columns, rows, columns, columns));
    }
    return ordered;
  }
};

}  // namespace rnnkern
