#include "direct_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/DispatchKeyExtractor.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <limits>
#include <new>
#include <string>

#include "../cpu/engine.h"
#include "layer_params.h"
#include "schemas.h"
#include "torch_pool.h"

namespace rnnkern {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::variable_list;

PyObject* replaced_kernels = nullptr;  // a set

const bool kPoison = std::getenv("RNNKERN_POISON") != nullptr;  // as in torch_ops.cpp

// Whether the dispatcher would do nothing but call the operator's kernel for the CPU: no mode, no
// wrapper, no functionalization between them, and nobody who is told of calls, as profilers are.
bool dispatches_to_cpu(std::initializer_list<TensorList> arguments) {
  c10::DispatchKeySet keys;
  for (const TensorList& tensors : arguments)
    for (const Tensor& t : tensors)
      if (t.defined()) keys = keys | t.key_set();
  const c10::DispatchKeySet mask =  // BackendSelect is always included, for factory functions
      c10::DispatchKeySet(c10::DispatchKeySet::FULL).remove(c10::DispatchKey::BackendSelect);
  return c10::impl::computeDispatchKeySet(keys, mask).highestPriorityTypeId() ==
             c10::DispatchKey::CPU &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
}

// The features of a row must be neighbours in memory; rows may lie anywhere.
bool has_dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return last >= 1 && (t.stride(last) == 1 || t.size(last) <= 1);
}

// (input, *others) or (output, saved, c_states).
bool is_ready(TensorList tensors) {
  const Tensor& input = tensors[0];
  if (!has_dense_rows(input) || !has_memory(input)) return false;
  return std::all_of(tensors.begin() + 1, tensors.end(), [&](const Tensor& t) {
    return t.scalar_type() == input.scalar_type() && t.is_contiguous() && has_memory(t);
  });
}

struct Refused : std::exception {};  // the operator says why
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

Tensor allocate_state(const LayerCall& given, const CallShape& call, at::ScalarType dtype,
                      int64_t which) {
  const int64_t features = which ? call.c_width : call.width;
  return given.step ? allocate(dtype, {call.batch, features})
                    : allocate(dtype, {call.directions, call.batch, features});
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
T* data_if_any(const Tensor& t) {
  return t.defined() ? data_or_null<T>(t) : nullptr;
}

template <class T>
void fill_layer(LayerParams<T>& p, const LayerCall& given, const CallShape& call,
                TensorList tensors) {
  const Tensor& input = tensors[0];
  fill(p, call, input, tensors.slice(1, given.states), tensors.slice(1 + given.states));
  if (given.step) p.x = {data<const T>(input), 0, input.stride(0)};
}

template <class T>
std::array<Tensor, 5> forward_as(const LayerCall& given, const CallShape& call, TensorList tensors,
                                 bool train, const PrepackedHeader* prepacked = nullptr) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  const auto kept = [&](int64_t size) {
    return !train ? Tensor() : size ? allocate(dtype, {size}) : nothing(dtype);
  };
  const std::array<Tensor, 5> results{allocate_rows(call, dtype, call.directions * call.width),
                                      allocate_state(given, call, dtype, 0),
                                      call.has_c ? allocate_state(given, call, dtype, 1) : Tensor(),
                                      kept(call.saved_size()), kept(call.c_states_size())};
  if (!call.batch) return results;
  ForwardParams<T> p{};
  fill_layer(p, given, call, tensors);
  p.prepacked = prepacked;
  p.y = rows_of<T>(call, results[0]);
  p.h_n = data_if_any<T>(results[1]);
  p.c_n = data_if_any<T>(results[2]);
  p.saved = data_if_any<T>(results[3]);
  p.c_states = data_if_any<T>(results[4]);
  forward(p, kTorchPool, at::get_num_threads());
  return results;
}

// A gradient that autograd hands over, often an expanded scalar, as the engine takes it.
Tensor taken(const Tensor& grad, at::ScalarType dtype, bool any_rows) {
  if (!grad.defined()) return grad;
  if (grad.scalar_type() != dtype || !has_memory(grad)) refuse("");
  return any_rows && has_dense_rows(grad) ? grad : grad.contiguous();
}

void check_grads(const CallShape& call, TensorList grads, TensorList kept) {
  const auto shape_of = [](const Tensor& t) { return Shape{t.sizes().data(), t.dim()}; };
  call.check_output(shape_of(kept[0]), "");
  call.check_saved(kept[1].numel(), kept[2].numel());
  if (grads[0].defined()) call.check_output(shape_of(grads[0]), "");
  for (size_t i = 1; i < 3; ++i) {
    const int64_t features = i == 1 ? call.width : call.c_width;
    if (grads[i].defined())
      call.check(shape_of(grads[i]), "", {call.directions, call.batch, features});
  }
}

template <class T>
variable_list backward_as(const LayerCall& given, const CallShape& call, TensorList grads,
                          TensorList tensors, TensorList kept, int64_t needs) {
  constexpr at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  check_grads(call, grads, kept);
  const Tensor dy = taken(grads[0], dtype, true), dh_n = taken(grads[1], dtype, false),
               dc_n = taken(grads[2], dtype, false);
  const int64_t first_weight = 1 + given.states, count = int64_t(tensors.size());
  variable_list found(count);
  if (needs & kNeedInput)
    found[0] = given.step ? allocate(dtype, {call.batch, call.input_size})
                          : allocate_rows(call, dtype, call.input_size);
  for (int64_t i = 0; i < given.states && needs & kNeedState; ++i)
    found[1 + i] = allocate_state(given, call, dtype, i);
  for (int64_t i = first_weight; i < count && needs & kNeedWeights; ++i)
    found[i] = allocate(dtype, tensors[i].sizes());
  BackwardParams<T> p{};
  fill_layer(p, given, call, tensors);
  p.y = rows_of<const T>(call, kept[0]);
  p.saved = data_if_any<T>(kept[1]);
  p.c_states = data_if_any<T>(kept[2]);
  if (dy.defined()) p.dy = rows_of<const T>(call, dy);
  p.dh_n = data_if_any<T>(dh_n);
  p.dc_n = call.has_c ? data_if_any<T>(dc_n) : nullptr;
  if (needs & kNeedInput)
    p.dx = given.step ? SequenceView<T>{data<T>(found[0]), 0, call.input_size}
                      : rows_of<T>(call, found[0]);
  if (given.states > 0) p.dh_0 = data_if_any<T>(found[1]);
  if (given.states > 1) p.dc_0 = data_if_any<T>(found[2]);
  if (needs & kNeedWeights) fill_grads(p, call, TensorList(found).slice(first_weight));
  backward(p, kTorchPool, at::get_num_threads());
  return found;
}

// f(shape, T{}) where the engine may take the call as it is. `kept`, `grads`: of a backward pass.
template <class F>
auto call_engine(const LayerCall& call, TensorList tensors, TensorList kept, TensorList grads,
                 F&& f) -> std::optional<decltype(f(std::declval<CallShape&>(), float{}))> {
  const at::ScalarType dtype = tensors[0].scalar_type();
  if (!call.direct || call.batch_sizes || call.resets || call.masks || call.cast_weights ||
      (dtype != at::kFloat && dtype != at::kDouble) || !Shapes::has_room(tensors) ||
      !dispatches_to_cpu({tensors, kept, grads}) || !is_ready(tensors) ||
      (!kept.empty() && (!is_ready(kept) || kept[0].scalar_type() != dtype)))
    return std::nullopt;
  try {
    const size_t first_weight = 1 + call.states;
    CallShape shape(call.spec, false, tensors.size() - first_weight, call.states, refuse);
    const Shapes shapes(call, tensors);
    shape.read(shapes[0], &shapes[1], &shapes[first_weight]);
    if (dtype == at::kFloat) return f(shape, float{});
    return f(shape, double{});
  } catch (const Refused&) {
    return std::nullopt;
  } catch (const std::bad_alloc&) {
    return std::nullopt;
  }
}

}  // namespace

bool has_memory(const Tensor& t) {
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(),
                                          t.storage_offset()) <= t.storage().nbytes();
}

bool may_call_directly() {
  static PyObject* const kernels[] = {PyUnicode_InternFromString("rnnkern/forward/CPU"),
                                      PyUnicode_InternFromString("rnnkern/backward/CPU"),
                                      PyUnicode_InternFromString("rnnkern/forward_prepacked/CPU")};
  return replaced_kernels && std::none_of(std::begin(kernels), std::end(kernels), [](auto name) {
           return PySet_Contains(replaced_kernels, name);
         });
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
  return call_engine(call, tensors, {}, {}, [&]<class T>(const CallShape& shape, T) {
    return forward_as<T>(call, shape, tensors, train);
  });
}

std::optional<std::array<Tensor, 5>> direct_forward_prepacked(const LayerCall& call,
                                                              TensorList tensors,
                                                              const Tensor& prepacked,
                                                              int64_t hidden_size,
                                                              int64_t proj_size) {
  const at::ScalarType dtype = tensors[0].scalar_type();
  if (!call.direct || (dtype != at::kFloat && dtype != at::kDouble) || !Shapes::has_room(tensors) ||
      !dispatches_to_cpu({tensors, prepacked}) || !is_ready(tensors) ||
      !prepacked.is_contiguous() || !has_memory(prepacked) ||
      prepacked_refusal(prepacked.const_data_ptr(), prepacked.nbytes()))
    return std::nullopt;
  const auto& header = *static_cast<const PrepackedHeader*>(prepacked.const_data_ptr());
  if (header.tag != int32_t(dtype) || !is_of(header, call.spec, hidden_size, proj_size))
    return std::nullopt;
  try {
    const WeightShapes weights(call.spec, header);
    const std::vector<Shape> weight_shapes = weights.shapes();
    CallShape shape(call.spec, false, weight_shapes.size(), call.states, refuse, has_masks(header));
    const Shapes shapes(call, tensors);
    shape.read(shapes[0], &shapes[1], weight_shapes.data());
    if (dtype == at::kFloat) return forward_as<float>(call, shape, tensors, false, &header);
    return forward_as<double>(call, shape, tensors, false, &header);
  } catch (const Refused&) {
    return std::nullopt;
  } catch (const std::bad_alloc&) {
    return std::nullopt;
  }
}

std::optional<variable_list> direct_backward(const LayerCall& call, TensorList grads,
                                             TensorList tensors, TensorList kept, int64_t needs) {
  if (!tensors[0].numel()) return std::nullopt;
  return call_engine(call, tensors, kept, grads, [&]<class T>(const CallShape& shape, T) {
    return backward_as<T>(call, shape, grads, tensors, kept, needs);
  });
}

}  // namespace rnnkern
