// What one call of an operator is about: its sizes, checked against its tensors, so that no kernel
// can read or write outside them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cells/registry.h"
#include "../core/weight_list.h"

namespace rnnkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor, Tensor>;

enum Needs : int64_t { kNeedInput = 1, kNeedState = 2, kNeedWeights = 4 };

inline bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
inline Tensors dense(Tensors&& tensors) {
  for (Tensor& t : tensors)
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  return std::move(tensors);
}

// The features of a row must be neighbours in memory; rows may lie anywhere.
inline Tensor with_dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

inline void check(const Tensor& t, const Tensor& input, const char* name,
                  std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(int64_t(i)) == sizes.begin()[i];
  if (!same) {
    std::string expected, got;
    for (int64_t s : sizes) expected += " " + std::to_string(s);
    for (int64_t i = 0; i < t.dim(); ++i) got += " " + std::to_string(t.size(i));
    STD_TORCH_CHECK(false, "rnnkern: ", name, " must have the sizes", expected, ", got", got);
  }
  STD_TORCH_CHECK(t.scalar_type() == input.scalar_type(), "rnnkern: ", name,
                  " and input differ in dtype");
  STD_TORCH_CHECK(t.is_cpu() == input.is_cpu() && t.get_device_index() == input.get_device_index(),
                  "rnnkern: ", name, " and input are on different devices");
}

struct Call {
  CellId cell;
  int gates, saved_values;
  bool has_c, bias, packed, batch_first;
  int directions, per_direction;
  int64_t steps, batch, rows, input_size, hidden_size;
  int64_t proj_size, width;      // P, 0 without a projection; R, of h
  std::vector<int64_t> offsets;  // packed: the first row of each step, and their number

  Call(const Tensor& input, const MaybeTensor& batch_sizes, const Tensors& state,
       const Tensors& weights, int64_t cell_id, bool batch_first_)
      : cell(CellId(cell_id)),
        packed(batch_sizes.has_value()),
        batch_first(batch_first_ && !packed) {
    STD_TORCH_CHECK(cell_id >= 0 && cell_id < kCellCount, "rnnkern: no cell ", cell_id);
    visit_cell(cell,
               [&](auto c) { gates = c.kGates, saved_values = c.kSaved, has_c = c.kStates > 1; });
    STD_TORCH_CHECK(weights.size() >= 2, "rnnkern: expected at least two weights");
    const WeightList list(int(weights.size()), weights.size() > 2 && weights[2].dim() == 1);
    STD_TORCH_CHECK(list.fits(int(weights.size())), "rnnkern: unexpected number of weights, ",
                    weights.size());
    bias = list.bias, per_direction = list.per_direction, directions = list.directions;
    STD_TORCH_CHECK(input.dim() == (packed ? 2 : 3), "rnnkern: input must have ", packed ? 2 : 3,
                    " dimensions, got ", input.dim());
    STD_TORCH_CHECK(weights[1].dim() == 2, "rnnkern: weight_hh must be a matrix");
    input_size = input.size(input.dim() - 1);
    width = hidden_size = weights[1].size(1);
    proj_size = 0;
    if (list.projection) read_projection(weights[per_direction - 1]);
    if (packed) {
      read_offsets(*batch_sizes, input.size(0));
    } else {
      steps = input.size(batch_first ? 1 : 0);
      batch = input.size(batch_first ? 0 : 1);
      rows = steps * batch;
    }
    STD_TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    check_weights(input, weights);
    STD_TORCH_CHECK(state.empty() || state.size() == (has_c ? 2 : 1), "rnnkern: expected ",
                    has_c ? 2 : 1, " states, got ", state.size());
    for (size_t i = 0; i < state.size(); ++i)
      check(state[i], input, "state", {directions, batch, i ? hidden_size : width});
  }

  // The tensors of a backward pass besides those of the forward pass.
  void check_backward(const Tensor& input, const MaybeTensor& grad_output,
                      const MaybeTensor& grad_h, const MaybeTensor& grad_c, const Tensor& output,
                      const Tensor& saved, const Tensor& cells, ScalarType saved_type) const {
    const int64_t features = directions * width;
    const auto check_rows = [&](const Tensor& t, const char* name) {
      if (packed) return check(t, input, name, {rows, features});
      check(t, input, name, {batch_first ? batch : steps, batch_first ? steps : batch, features});
    };
    check_rows(output, "output");
    if (grad_output) check_rows(*grad_output, "grad_output");
    if (grad_h) check(*grad_h, input, "grad_h", {directions, batch, width});
    if (grad_c && has_c) check(*grad_c, input, "grad_c", {directions, batch, hidden_size});
    const ScalarType wide = is_half(input.scalar_type()) ? ScalarType::Float : input.scalar_type();
    const int64_t units = directions * rows * hidden_size;
    STD_TORCH_CHECK(saved.numel() == units * saved_values && cells.numel() == (has_c ? units : 0) &&
                        saved.scalar_type() == saved_type && cells.scalar_type() == wide,
                    "rnnkern: the forward pass was not run with train=True");
  }

 private:
  void read_projection(const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2, "rnnkern: weight_hr must be a matrix");
    proj_size = width;
    hidden_size = weight.size(1);
    STD_TORCH_CHECK(0 < proj_size && proj_size < hidden_size,
                    "rnnkern: proj_size has to be smaller than hidden_size");
    visit_cell(cell,
               [](auto c) { STD_TORCH_CHECK(c.kProjects, "rnnkern: only LSTM has a projection"); });
  }

  void read_offsets(const Tensor& batch_sizes, int64_t given_rows) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu() &&
                        batch_sizes.scalar_type() == ScalarType::Long,
                    "rnnkern: batch_sizes must be a 1-D int64 tensor on the CPU");
    const Tensor sizes = dense(batch_sizes);
    const auto size = static_cast<const int64_t*>(sizes.const_data_ptr());
    steps = sizes.numel();
    offsets.resize(steps + 1);
    batch = steps ? size[0] : 0;
    for (int64_t t = 0; t < steps; ++t) {
      STD_TORCH_CHECK(size[t] >= 0 && (t == 0 || size[t] <= size[t - 1]),
                      "rnnkern: batch_sizes must not grow");
      offsets[t + 1] = offsets[t] + size[t];
    }
    rows = offsets[steps];
    STD_TORCH_CHECK(rows == given_rows, "rnnkern: batch_sizes add up to ", rows,
                    " rows, but the data has ", given_rows);
  }

  void check_weights(const Tensor& input, const Tensors& weights) const {
    const int64_t gate_rows = gates * hidden_size;
    for (int d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * per_direction];
      check(w[0], input, "weight_ih", {gate_rows, input_size});
      check(w[1], input, "weight_hh", {gate_rows, width});
      if (bias) {
        check(w[2], input, "bias_ih", {gate_rows});
        check(w[3], input, "bias_hh", {gate_rows});
      }
      if (proj_size) check(w[per_direction - 1], input, "weight_hr", {proj_size, hidden_size});
    }
  }
};

}  // namespace rnnkern
