// What the CUDA operators know of a cell: its stepwise kernels, and the order of its gates, torch's
// in weights and biases, the cell's in pre-activations.
#pragma once
#include "../cells/registry.h"
#include "../core/cuda_cells.h"
#include "../cuda/gate_layout.h"
#include "torch_cuda_tensors.h"

namespace rnnkern {

// Gates that are neighbours in both orders: gates [gate, gate + count) of torch's order are the
// pre-activations [preact, preact + count).
struct GateRange {
  int preact, gate, count;

  bool operator==(const GateRange& other) const {
    return preact == other.preact && gate == other.gate && count == other.count;
  }
};

class CudaCell {
 public:
  explicit CudaCell(CellId id) : id_(id), added_(added_kernels(int64_t(id))) {
    STD_TORCH_CHECK(int(id) < kCellCount || added_,
                    "rnnkern: the CUDA kernels of this cell are not there");
    const cuda::GateLayout layout = added_ ? added_->layout : built_in_layout(id);
    preacts = layout.preacts;
    first_input_preact = layout.input_preact;
    first_hidden_preact = layout.hidden_preact;
    input = ranges(layout.gates, first_input_preact, layout.input_gate);
    hidden = ranges(layout.gates, first_hidden_preact, layout.hidden_gate);
  }

  template <class... Args>
  void forward(const Args&... args) const {
    check_launch(added_ ? added_->forward(args...) : cuda::launch_forward(int(id_), args...));
  }
  template <class... Args>
  void backward(const Args&... args) const {
    check_launch(added_ ? added_->backward(args...) : cuda::launch_backward(int(id_), args...));
  }

  // Whether both biases have the same gradient.
  bool shares_preacts() const { return input == hidden; }

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

  int preacts, first_input_preact, first_hidden_preact;
  std::vector<GateRange> input, hidden;

 private:
  static cuda::GateLayout built_in_layout(CellId id) {
    return visit_cell(id, [](auto cell) { return cuda::gate_layout_of<decltype(cell)>(); });
  }

  static std::vector<GateRange> ranges(int gates, int first_preact, const int* gate_of) {
    std::vector<GateRange> all;
    for (int s = 0; s < gates; ++s) {
      if (s && gate_of[s] == gate_of[s - 1] + 1)
        ++all.back().count;
      else
        all.push_back({first_preact + s, gate_of[s], 1});
    }
    return all;
  }

  CellId id_;
  const cuda::AddedKernels* added_;  // null for a built-in cell
};

}  // namespace rnnkern
