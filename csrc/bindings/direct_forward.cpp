#include "direct_forward.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/DispatchKeyExtractor.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>

#include "../cpu/engine.h"
#include "layer_params.h"
#include "torch_pool.h"

namespace rnnkern {
namespace {

using at::Tensor;
using at::TensorList;

PyObject* replaced_kernels = nullptr;  // a set

const bool kPoison = std::getenv("RNNKERN_POISON") != nullptr;  // as in torch_ops.cpp

// Whether the dispatcher would do nothing but call the operator's kernel for the CPU: no mode, no
// wrapper, no functionalization between them, and nobody who is told of calls, as profilers are.
bool dispatches_to_cpu(TensorList tensors) {
  c10::DispatchKeySet keys;
  for (const Tensor& t : tensors) keys = keys | t.key_set();
  const c10::DispatchKeySet mask =  // BackendSelect is always included, for factory functions
      c10::DispatchKeySet(c10::DispatchKeySet::FULL).remove(c10::DispatchKey::BackendSelect);
  return c10::impl::computeDispatchKeySet(keys, mask).highestPriorityTypeId() ==
             c10::DispatchKey::CPU &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

// Whether the memory that sizes and strides ask for is there: FSDP, for one, frees it.
bool has_memory(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                          t.storage_offset()) <= t.storage().nbytes();
}

bool is_ready(TensorList tensors) {
  const Tensor& input = tensors[0];
  const int64_t last = input.dim() - 1;
  if (last < 1 || (input.stride(last) != 1 && input.size(last) > 1) || !has_memory(input))
    return false;
  return std::all_of(tensors.begin() + 1, tensors.end(), [&](const Tensor& t) {
    return t.scalar_type() == input.scalar_type() && t.is_contiguous() && has_memory(t);
  });
}

struct Refused {};  // the operator says why
[[noreturn]] void refuse(const std::string&) { throw Refused(); }

// The shapes of tensors, as the operator takes them.
class Shapes {
 public:
  Shapes(const LayerCall& call, TensorList tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::IntArrayRef sizes = tensors[i].sizes();
      if (!call.lifts(int64_t(i))) {
        shapes_[i] = {sizes.data(), int64_t(sizes.size())};
        continue;
      }
      if (sizes.size() != 2) refuse("");
      lifted_[i] = {1, sizes[0], sizes[1]};
      shapes_[i] = {lifted_[i].data(), 3};
    }
  }
  static bool has_room(TensorList tensors) { return tensors.size() <= kMost; }
  const Shape& operator[](size_t i) const { return shapes_[i]; }

 private:
  static constexpr size_t kMost = 1 + CallShape::kMaxStates + CallShape::kMaxWeights;
  Shape shapes_[kMost];
  std::array<int64_t, 3> lifted_[1 + CallShape::kMaxStates];
};

// Strides: null for those of a contiguous tensor.
Tensor allocate(at::ScalarType dtype, at::IntArrayRef sizes, at::OptionalIntArrayRef strides = {}) {
  Tensor tensor = strides ? at::detail::empty_strided_cpu(sizes, *strides, dtype)
                          : at::detail::empty_cpu(sizes, dtype);
  advise_huge_pages(tensor.data_ptr(), tensor.nbytes());
  if (kPoison) tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  return tensor;
}

// (T, B, ·), or (B, T, ·) with the rows in the same order in memory.
Tensor allocate_rows(const CallShape& call, at::ScalarType dtype, int64_t features) {
  if (!call.batch_first) return allocate(dtype, {call.steps, call.batch, features});
  const int64_t row = std::max<int64_t>(features, 1), step = std::max<int64_t>(call.batch * row, 1);
  return allocate(dtype, {call.batch, call.steps, features}, at::IntArrayRef{row, step, 1});
}

// For nodes to keep. No inference tensor, whoever asks first.
Tensor nothing(at::ScalarType dtype) {
  const auto make = [](at::ScalarType type) {
    const c10::InferenceMode off(false);
    return Tensor(at::detail::empty_cpu({0}, type));
  };
  static const Tensor of_float = make(at::kFloat), of_double = make(at::kDouble);
  return dtype == at::kFloat ? of_float : of_double;
}

template <class T>
std::array<Tensor, 5> forward_as(const LayerCall& given, const CallShape& call, TensorList tensors,
                                 bool train) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const auto of_state = [&](int64_t features) {
    return given.step ? allocate(dtype, {call.batch, features})
                      : allocate(dtype, {call.directions, call.batch, features});
  };
  const auto kept = [&](int64_t size) {
    return !train ? Tensor() : size ? allocate(dtype, {size}) : nothing(dtype);
  };
  const std::array<Tensor, 5> results{allocate_rows(call, dtype, call.directions * call.width),
                                      of_state(call.width),
                                      call.has_c ? of_state(call.hidden_size) : Tensor(),
                                      kept(call.saved_size()), kept(call.c_states_size())};
  if (!call.batch) return results;
  const auto data_of = [&](size_t i) {
    return results[i].defined() ? data_or_null<T>(results[i]) : nullptr;
  };
  const Tensor& input = tensors[0];
  ForwardParams<T> p{};
  fill(p, call, input, tensors.slice(1, given.states), tensors.slice(1 + given.states));
  if (given.step) p.x = {data<const T>(input), 0, input.stride(0)};
  p.y = rows_of<T>(call, results[0]);
  p.h_n = data_of(1);
  p.c_n = data_of(2);
  p.saved = data_of(3);
  p.c_states = data_of(4);
  forward(p, kTorchPool, at::get_num_threads());
  return results;
}

}  // namespace

bool may_call_directly() {
  static PyObject* const kernel = PyUnicode_InternFromString("rnnkern/forward/CPU");
  return replaced_kernels && !PySet_Contains(replaced_kernels, kernel);
}

PyObject* use_replaced_kernels(PyObject*, PyObject* set) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PySet_Check(set), "use_replaced_kernels takes a set");
  Py_INCREF(set);
  Py_XSETREF(replaced_kernels, set);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

std::optional<std::array<Tensor, 5>> direct_forward(const LayerCall& call, TensorList tensors,
                                                    bool train) {
  const at::ScalarType dtype = tensors[0].scalar_type();
  if (!call.direct || call.batch_sizes || call.cast_weights ||
      (dtype != at::kFloat && dtype != at::kDouble) || !Shapes::has_room(tensors) ||
      !dispatches_to_cpu(tensors) || !is_ready(tensors))
    return std::nullopt;
  try {
    const size_t first_weight = 1 + call.states;
    CallShape shape(call.spec, false, tensors.size() - first_weight, call.states, refuse);
    const Shapes shapes(call, tensors);
    shape.read(shapes[0], &shapes[1], &shapes[first_weight]);
    return dtype == at::kFloat ? forward_as<float>(call, shape, tensors, train)
                               : forward_as<double>(call, shape, tensors, train);
  } catch (const Refused&) {
  } catch (const std::bad_alloc&) {
  }
  return std::nullopt;
}

}  // namespace rnnkern
