// What one call of an operator is about: its tensors and what is said besides them, its sizes, and
// the checks that no kernel can read or write outside the tensors.
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

#include "../core/call_shape.h"
#include "schemas.h"

namespace rnnkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, Tensor, Tensor>;

// Where rows get another state before a step: a mask of the input's shape without features, and as
// many states as `state` has, or none for zeros, each (D, B, ·), or by step as the input is.
struct Resets {
  MaybeTensor mask;
  Tensors state;
};

struct ForwardArgs {
  Tensor input;
  MaybeTensor batch_sizes;
  Tensors state, weights;
  CallSpec spec;
  bool train;
  Resets resets;
  MaybeTensor masks;
};

// `flow` asks for flow_h and flow_c.
struct BackwardArgs {
  MaybeTensor grad_output, grad_h, grad_c;
  Tensor input;
  MaybeTensor batch_sizes;
  Tensors state, weights;
  Tensor output, saved, c_states;
  CallSpec spec;
  int64_t needs;
  bool flow;
  Resets resets;
  MaybeTensor masks;
};

// The states that a call was given.
inline Tensors given(const MaybeTensor& h_0, const MaybeTensor& c_0) {
  STD_TORCH_CHECK(h_0 || !c_0, "rnnkern: expected h with c");
  Tensors state;
  for (const MaybeTensor* s : {&h_0, &c_0})
    if (*s) state.push_back(**s);
  return state;
}

// The operators with their arguments one by one, as torch calls them.
template <ForwardResult (*run)(ForwardArgs), class SpecTypes = CallSpec::Types>
struct ForwardOp;
template <ForwardResult (*run)(ForwardArgs), class... Spec>
struct ForwardOp<run, std::tuple<Spec...>> {
  static ForwardResult call(Tensor input, MaybeTensor batch_sizes, MaybeTensor h_0, MaybeTensor c_0,
                            Tensors weights, Spec... spec, bool train, MaybeTensor resets,
                            MaybeTensor reset_h, MaybeTensor reset_c, MaybeTensor masks) {
    return run({std::move(input),
                std::move(batch_sizes),
                given(h_0, c_0),
                std::move(weights),
                CallSpec{spec...},
                train,
                {std::move(resets), given(reset_h, reset_c)},
                std::move(masks)});
  }
};

template <BackwardResult (*run)(BackwardArgs), class SpecTypes = CallSpec::Types>
struct BackwardOp;
template <BackwardResult (*run)(BackwardArgs), class... Spec>
struct BackwardOp<run, std::tuple<Spec...>> {
  static BackwardResult call(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                             Tensor input, MaybeTensor batch_sizes, MaybeTensor h_0,
                             MaybeTensor c_0, Tensors weights, Tensor output, Tensor saved,
                             Tensor c_states, Spec... spec, int64_t needs, bool flow,
                             MaybeTensor resets, MaybeTensor reset_h, MaybeTensor reset_c,
                             MaybeTensor masks) {
    return run({std::move(grad_output),
                std::move(grad_h),
                std::move(grad_c),
                std::move(input),
                std::move(batch_sizes),
                given(h_0, c_0),
                std::move(weights),
                std::move(output),
                std::move(saved),
                std::move(c_states),
                CallSpec{spec...},
                needs,
                flow,
                {std::move(resets), given(reset_h, reset_c)},
                std::move(masks)});
  }
};

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

// The masks of a row, (kMasks, H), must be neighbours in memory; rows may lie anywhere.
inline Tensor with_dense_masks(const Tensor& masks) {
  const Tensor t = with_dense_rows(masks);
  const int64_t last = t.dim() - 1;
  const bool adjoin = t.size(last - 1) <= 1 || t.stride(last - 1) == t.size(last);
  return adjoin ? t : torch::stable::contiguous(t);
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

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.data(), int64_t(sizes.size())};
}

// What is to be true of a tensor whose shape is right.
inline void check_kind(const Tensor& t, const Shape& shape, const Kind& input, const char* name) {
  const Kind kind(t);
  STD_TORCH_CHECK(kind.dtype == input.dtype, "rnnkern: ", name, " and input differ in dtype");
  STD_TORCH_CHECK(kind.on_device_of(input), "rnnkern: ", name,
                  " and input are on different devices");
  check_memory(t, name, {shape.sizes, size_t(shape.rank)}, kind.dtype);
}

[[noreturn]] inline void fail(const std::string& message) {
  STD_TORCH_CHECK(false, message);
  throw;  // never reached: the macro does not say so
}

struct Call : CallShape {
  Call(const Tensor& input, const MaybeTensor& batch_sizes, const Tensors& state,
       const Tensors& weights, const CallSpec& spec, bool masks = false)
      : CallShape(spec, batch_sizes.has_value(), weights.size(), state.size(), fail, masks) {
    Shape weight_shapes[kMaxWeights];
    for (size_t i = 0; i < weights.size(); ++i) weight_shapes[i] = shape_of(weights[i]);
    read_tensors(input, batch_sizes, state, weight_shapes);
    const Kind kind(input);
    for (size_t i = 0; i < weights.size(); ++i)
      check_kind(weights[i], weight_shapes[i], kind, weight_name(int(i) % places.count));
  }

  // With prepacked weights, of which the header tells the shapes.
  Call(const Tensor& input, const MaybeTensor& batch_sizes, const Tensors& state,
       const std::vector<Shape>& weights, const CallSpec& spec, bool masks)
      : CallShape(spec, batch_sizes.has_value(), weights.size(), state.size(), fail, masks) {
    read_tensors(input, batch_sizes, state, weights.data());
  }

  void check_resets(const Resets& resets, const Kind& input) const {
    Shape states[kMaxStates];
    for (size_t i = 0; i < resets.state.size(); ++i) states[i] = shape_of(resets.state[i]);
    if (!resets.mask) {
      STD_TORCH_CHECK(resets.state.empty(),
                      "rnnkern: expected a mask with the states after resets");
      return;
    }
    CallShape::check_resets(shape_of(*resets.mask), states, resets.state.size());
    STD_TORCH_CHECK(resets.mask->scalar_type() == ScalarType::Bool,
                    "rnnkern: resets must be torch.bool");
    check_device(*resets.mask, input, "resets");
    check_memory(*resets.mask, "resets");
    for (size_t i = 0; i < resets.state.size(); ++i)
      check_kind(resets.state[i], states[i], input, reset_name(int(i)));
  }

  void check_masks(const MaybeTensor& masks, const Kind& input) const {
    if (!masks) return;
    CallShape::check_masks(shape_of(*masks));
    check_kind(*masks, shape_of(*masks), input, "masks");
  }

  // Those of all steps and rows, (kMasks, H).
  void check_constant_masks(const MaybeTensor& masks, const Kind& input) const {
    if (!masks) return;
    CallShape::check_constant_masks(shape_of(*masks));
    check_kind(*masks, shape_of(*masks), input, "masks");
  }

  // The tensors of a backward pass besides those of the forward pass.
  void check_backward(const BackwardArgs& args, ScalarType saved_type) const {
    const Kind kind(args.input);
    check_resets(args.resets, kind);
    check_masks(args.masks, kind);
    const auto check_sizes = [&](const MaybeTensor& t, const char* name, int64_t features) {
      if (!t) return;
      check(shape_of(*t), name, {directions, batch, features});
      check_kind(*t, shape_of(*t), kind, name);
    };
    const auto check_rows = [&](const Tensor& t, const char* name) {
      check_output(shape_of(t), name);
      check_kind(t, shape_of(t), kind, name);
    };
    check_rows(args.output, "output");
    if (args.grad_output) check_rows(*args.grad_output, "grad_output");
    check_sizes(args.grad_h, "grad_h", width);
    if (has_c) check_sizes(args.grad_c, "grad_c", c_width);
    const ScalarType dtype = args.input.scalar_type();
    check_saved(args.saved.numel(), args.c_states.numel());
    STD_TORCH_CHECK(
        args.saved.scalar_type() == saved_type &&
            args.c_states.scalar_type() == (is_half(dtype) ? ScalarType::Float : dtype),
        "rnnkern: saved or c_states has a dtype that the forward pass does not give it");
    for (const auto& [t, name] :
         {std::pair(&args.saved, "saved"), std::pair(&args.c_states, "c_states")}) {
      check_device(*t, kind, name);
      check_memory(*t, name);
    }
  }

 private:
  void read_tensors(const Tensor& input, const MaybeTensor& batch_sizes, const Tensors& state,
                    const Shape* weight_shapes) {
    Shape state_shapes[kMaxStates];
    for (size_t i = 0; i < state.size(); ++i) state_shapes[i] = shape_of(state[i]);
    check_memory(input, "input");
    if (batch_sizes) {
      const Tensor sizes = dense_sizes(*batch_sizes);
      read(shape_of(input), state_shapes, weight_shapes,
           static_cast<const int64_t*>(sizes.const_data_ptr()), sizes.numel());
    } else {
      read(shape_of(input), state_shapes, weight_shapes);
    }
    const Kind kind(input);
    for (size_t i = 0; i < state.size(); ++i)
      check_kind(state[i], state_shapes[i], kind, state_name(int(i)));
  }

  static Tensor dense_sizes(const Tensor& batch_sizes) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu() &&
                        batch_sizes.scalar_type() == ScalarType::Long,
                    "rnnkern: batch_sizes must be a 1-D int64 tensor on the CPU");
    check_memory(batch_sizes, "batch_sizes");
    return dense(batch_sizes);
  }
};

}  // namespace rnnkern
