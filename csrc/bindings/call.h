// What one call of an operator is about: its sizes, checked against its tensors, so that no kernel
// can read or write outside them.
#pragma once
// clang-format off
#include "shim_errors.h"  // before torch's headers, which report errors by it
// clang-format on
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
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

// What a tensor's kernels must agree on.
struct Kind {
  int32_t dtype, device_type, device_index;

  explicit Kind(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  }
  bool on_device_of(const Kind& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

// A tensor's storage may be smaller than its sizes and strides ask for: freed by FSDP, a pipeline,
// or untyped_storage().resize_(0).
inline void check_memory(const Tensor& t, const char* name,
                         torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t dtype) {
  int64_t *strides, first, bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &first));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  int64_t end = first + 1;  // of its last element
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    end += (sizes[i] - 1) * strides[i];
  }
  const int64_t needed = end * int64_t(aoti_torch_dtype_element_size(dtype));
  STD_TORCH_CHECK(needed <= bytes, "rnnkern: the memory of ", name, " is not there: it needs ",
                  needed, " bytes, but its storage has ", bytes);
}

inline void check_memory(const Tensor& t, const char* name) {
  check_memory(t, name, t.sizes(), Kind(t).dtype);
}

inline void check_device(const Tensor& t, const Kind& input, const char* name) {
  STD_TORCH_CHECK(Kind(t).on_device_of(input), "rnnkern: ", name,
                  " and input are on different devices");
}

inline void check(const Tensor& t, const Kind& input, const char* name,
                  std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    std::string wanted, got;
    for (int64_t s : expected) wanted += " " + std::to_string(s);
    for (int64_t s : sizes) got += " " + std::to_string(s);
    STD_TORCH_CHECK(false, "rnnkern: ", name, " must have the sizes", wanted, ", got", got);
  }
  const Kind kind(t);
  STD_TORCH_CHECK(kind.dtype == input.dtype, "rnnkern: ", name, " and input differ in dtype");
  STD_TORCH_CHECK(kind.on_device_of(input), "rnnkern: ", name,
                  " and input are on different devices");
  check_memory(t, name, sizes, kind.dtype);
}

inline int64_t size_or_zero(const Tensor& t, int64_t dim) {
  return dim < t.dim() ? t.size(dim) : 0;
}

// The size that most tensors speak for, the first of the most frequent ones.
inline int64_t majority(const std::vector<int64_t>& sizes) {
  const auto frequency = [&](int64_t size) { return std::count(sizes.begin(), sizes.end(), size); };
  return *std::max_element(sizes.begin(), sizes.end(),
                           [&](int64_t a, int64_t b) { return frequency(a) < frequency(b); });
}

// The states that a call was given.
inline Tensors given(const MaybeTensor& h_0, const MaybeTensor& c_0) {
  STD_TORCH_CHECK(h_0 || !c_0, "rnnkern: expected h_0 with c_0");
  Tensors state;
  for (const MaybeTensor* s : {&h_0, &c_0})
    if (*s) state.push_back(**s);
  return state;
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
    const Kind kind(input);
    check_memory(input, "input");
    input_size = input.size(input.dim() - 1);
    read_sizes(weights, state, list.projection);
    if (packed) {
      read_offsets(*batch_sizes, input.size(0));
    } else {
      steps = input.size(batch_first ? 1 : 0);
      batch = input.size(batch_first ? 0 : 1);
      rows = steps * batch;
    }
    STD_TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    check_weights(kind, weights);
    STD_TORCH_CHECK(state.empty() || state.size() == (has_c ? 2 : 1), "rnnkern: expected ",
                    has_c ? 2 : 1, " states, got ", state.size());
    for (size_t i = 0; i < state.size(); ++i)
      check(state[i], kind, i ? "the state c_0" : "the state h_0",
            {directions, batch, i ? hidden_size : width});
  }

  // The tensors of a backward pass besides those of the forward pass.
  void check_backward(const Tensor& input, const MaybeTensor& grad_output,
                      const MaybeTensor& grad_h, const MaybeTensor& grad_c, const Tensor& output,
                      const Tensor& saved, const Tensor& cells, ScalarType saved_type) const {
    const Kind kind(input);
    const int64_t features = directions * width;
    const auto check_rows = [&](const Tensor& t, const char* name) {
      if (packed) return check(t, kind, name, {rows, features});
      check(t, kind, name, {batch_first ? batch : steps, batch_first ? steps : batch, features});
    };
    check_rows(output, "output");
    if (grad_output) check_rows(*grad_output, "grad_output");
    if (grad_h) check(*grad_h, kind, "grad_h", {directions, batch, width});
    if (grad_c && has_c) check(*grad_c, kind, "grad_c", {directions, batch, hidden_size});
    const ScalarType wide = is_half(input.scalar_type()) ? ScalarType::Float : input.scalar_type();
    const int64_t units = directions * rows * hidden_size;
    STD_TORCH_CHECK(saved.numel() == units * saved_values && cells.numel() == (has_c ? units : 0) &&
                        saved.scalar_type() == saved_type && cells.scalar_type() == wide,
                    "rnnkern: the forward pass was not run with train=True");
    for (const auto& [t, name] : {std::pair(&saved, "saved"), std::pair(&cells, "cells")}) {
      check_device(*t, kind, name);
      check_memory(*t, name);
    }
  }

 private:
  // H, P and R.
  void read_sizes(const Tensors& weights, const Tensors& state, bool projected) {
    const Tensor& last = weights[projected ? per_direction - 1 : 1];
    hidden_size = size_or_zero(last, 1);
    width = size_or_zero(weights[1], 1);
    if (size_or_zero(weights[0], 0) != gates * hidden_size ||
        (projected && size_or_zero(last, 0) != width))
      settle_sizes(weights, state, projected);
    proj_size = projected ? width : 0;
    if (!projected) return;
    STD_TORCH_CHECK(0 < proj_size && proj_size < hidden_size,
                    "rnnkern: proj_size has to be smaller than hidden_size");
    visit_cell(cell,
               [](auto c) { STD_TORCH_CHECK(c.kProjects, "rnnkern: only LSTM has a projection"); });
  }

  // Where the tensors contradict each other: the sizes that most of them speak for, so that the
  // checks name the one that is wrong.
  void settle_sizes(const Tensors& weights, const Tensors& state, bool projected) {
    std::vector<int64_t> hidden, widths;
    for (int d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * per_direction];
      for (int i : {0, 2, 3})
        if (i == 0 || bias) hidden.push_back(size_or_zero(w[i], 0) / gates);
      hidden.push_back(size_or_zero(w[projected ? per_direction - 1 : 1], 1));
      widths.push_back(size_or_zero(w[1], 1));
      if (projected) widths.push_back(size_or_zero(w[per_direction - 1], 0));
    }
    for (size_t i = 0; i < state.size(); ++i)
      (projected && i == 0 ? widths : hidden).push_back(size_or_zero(state[i], 2));
    hidden_size = majority(hidden);
    width = projected ? majority(widths) : hidden_size;
  }

  void read_offsets(const Tensor& batch_sizes, int64_t given_rows) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu() &&
                        batch_sizes.scalar_type() == ScalarType::Long,
                    "rnnkern: batch_sizes must be a 1-D int64 tensor on the CPU");
    check_memory(batch_sizes, "batch_sizes");
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

  void check_weights(const Kind& input, const Tensors& weights) const {
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
