// A layer call with its gradient as one C++ node of torch's autograd: what
// rnnkern/ops/autograd.py does in Python, at a fraction of the cost of a small call.
//
// torch has no stable ABI for autograd, so this library is built for one version of torch, which
// its name says; under any other version rnnkern uses the Python functions.
#include "autograd.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string_view>
#include <tuple>
#include <type_traits>

#include "../core/call_spec.h"
#include "direct_call.h"
#include "schemas.h"

namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Call = rnnkern::LayerCall;
using rnnkern::read_spec;

constexpr std::string_view kOutOfMemory = "CUDA out of memory";

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

template <class T>
void push(torch::jit::Stack& stack, T&& arg) {
  if constexpr (std::is_same_v<std::decay_t<T>, rnnkern::CallSpec>)
    rnnkern::CallSpec(arg).each([&](auto field) { stack.emplace_back(field); });
  else
    stack.emplace_back(std::forward<T>(arg));
}

template <class... Args>
torch::jit::Stack call_operator(const c10::OperatorHandle& op, Args&&... args) {
  torch::jit::Stack stack;
  stack.reserve(sizeof...(args) + std::tuple_size_v<rnnkern::CallSpec::Types>);
  (push(stack, std::forward<Args>(args)), ...);
  try {
    op.callBoxed(stack);
  } catch (const std::runtime_error& error) {
    // The operators' stable ABI has the words of this error, but not its type.
    TORCH_CHECK_WITH(OutOfMemoryError, !std::string_view(error.what()).starts_with(kOutOfMemory),
                     error.what());
    throw;
  }
  return stack;
}

// The tensors as the operators take them.
variable_list prepared(const Call& call, TensorList tensors) {
  variable_list all = tensors.vec();
  for (int64_t i = 0; i < int64_t(all.size()); ++i)
    if (call.lifts(i)) all[i] = all[i].unsqueeze(0);
  if (call.cast_weights)
    for (size_t i = 1 + call.states; i < all.size(); ++i) all[i] = all[i].to(all[0].scalar_type());
  return all;
}

// (input, *state, *weights, *states after resets), apart.
struct Split {
  Tensor input;
  TensorList state, weights, reset_state;

  Split(const Call& call, TensorList all)
      : input(all[0]),
        state(all.slice(1, call.states)),
        weights(all.slice(1 + call.states)) {
    if (call.resets) {
      weights = all.slice(1 + call.states, call.weights());
      reset_state = all.slice(1 + call.states + call.weights());
    }
    for (const size_t states : {state.size(), reset_state.size()})
      TORCH_CHECK(states <= 2, "rnnkern: expected at most 2 states, got ", states);
  }

  // h or c of a state, as the operators take them.
  static std::optional<Tensor> given(TensorList state, size_t i) {
    return i < state.size() ? std::optional<Tensor>(state[i]) : std::nullopt;
  }
  std::optional<Tensor> initial(size_t i) const { return given(state, i); }
  std::optional<Tensor> after_reset(size_t i) const { return given(reset_state, i); }
};

// What an operator has left on the stack, as rnnkern::direct_forward returns it.
std::array<Tensor, 5> results_of(const Call& call, torch::jit::Stack stack) {
  std::array<Tensor, 5> results;
  for (size_t i = 0; i < stack.size(); ++i) results[i] = std::move(stack[i]).toTensor();
  if (call.step) results[1] = results[1].squeeze(0);
  if (call.step && call.has_c()) results[2] = results[2].squeeze(0);
  return results;
}

// As rnnkern::direct_forward returns them.
std::array<Tensor, 5> run_forward(const Call& call, TensorList tensors, bool train) {
  static const c10::OperatorHandle op = find("rnnkern::forward");
  at::AutoDispatchBelowADInplaceOrView guard;
  if (const auto results = rnnkern::direct_forward(call, tensors, train)) return *results;
  const variable_list all = prepared(call, tensors);
  const Split split(call, all);
  return results_of(
      call, call_operator(op, split.input, call.batch_sizes, split.initial(0), split.initial(1),
                          c10::List<Tensor>(split.weights), call.spec, train, call.resets,
                          split.after_reset(0), split.after_reset(1), call.masks));
}

variable_list returned(const Call& call, const std::array<Tensor, 5>& results) {
  variable_list all;
  if (!call.step) all.push_back(results[0]);
  all.push_back(results[1]);
  if (call.has_c()) all.push_back(results[2]);
  return all;
}

PyObject* decomposition_vjp = nullptr;

pybind11::object wrapped(TensorList tensors) {
  return pybind11::reinterpret_steal<pybind11::object>(rnnkern::tensor_tuple(tensors));
}
pybind11::object wrapped(const Tensor& t) {  // None for an undefined tensor
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t));
}
pybind11::tuple as_tuple(rnnkern::CallSpec spec) {
  pybind11::list fields;
  spec.each([&](auto field) { fields.append(field); });
  return fields;
}

variable_list differentiable_backward(const Call& call, const std::array<Tensor, 3>& grads,
                                      TensorList tensors, const std::vector<bool>& needed) {
  const variable_list all = prepared(call, tensors);
  const Split split(call, all);
  pybind11::gil_scoped_acquire gil;
  pybind11::tuple flags(needed.size());
  for (size_t i = 0; i < needed.size(); ++i) flags[i] = pybind11::bool_(needed[i]);
  const pybind11::object found = pybind11::handle(decomposition_vjp)(
      wrapped(TensorList(grads)), wrapped(split.input),
      wrapped(call.batch_sizes.value_or(Tensor())), wrapped(split.state), wrapped(split.weights),
      as_tuple(call.spec), wrapped(call.resets.value_or(Tensor())), wrapped(split.reset_state),
      wrapped(call.masks.value_or(Tensor())), flags);
  variable_list result;
  for (const pybind11::handle item : found)
    result.push_back(item.is_none() ? Tensor() : THPVariable_Unpack(item.ptr()));
  return result;
}

// Whether a graph of this backward pass is wanted, or a transform looks on: the kernels would hide
// what they do.
bool needs_decomposition(const std::array<Tensor, 3>& grads) {
  if (at::GradMode::is_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return true;
  for (const Tensor& g : grads)
    if (g.defined() && at::isBatchedTensor(g)) return true;
  return false;
}

// A call without its tensor, as a node of torch's keeps it.
std::vector<int64_t> as_numbers(const Call& call) {
  std::vector<int64_t> numbers{call.states,
                               call.step,
                               call.cast_weights,
                               call.direct,
                               call.batch_sizes.has_value(),
                               call.resets.has_value(),
                               call.masks.has_value()};
  rnnkern::CallSpec spec = call.spec;
  spec.each([&](auto field) { numbers.push_back(field); });
  return numbers;
}

// Of a call whose optional tensors are the last ones kept.
Call read_call(const std::vector<int64_t>& numbers, variable_list& kept) {
  Call call;
  const int64_t* next = numbers.data();
  const auto read = [&](auto& field) {
    field = static_cast<std::remove_reference_t<decltype(field)>>(*next++);
  };
  bool has_sizes, has_resets, has_masks;
  read(call.states), read(call.step), read(call.cast_weights), read(call.direct);
  read(has_sizes), read(has_resets), read(has_masks);
  call.spec.each(read);
  const auto take_last = [&](bool is_there, std::optional<Tensor>& to) {
    if (!is_there) return;
    to = std::move(kept.back());
    kept.pop_back();
  };
  take_last(has_masks, call.masks), take_last(has_resets, call.resets);
  take_last(has_sizes, call.batch_sizes);
  return call;
}

// As rnnkern::direct_backward does it.
variable_list operator_backward(const Call& call, const std::array<Tensor, 3>& grads,
                                TensorList tensors, TensorList kept, int64_t needs) {
  static const c10::OperatorHandle op = find("rnnkern::backward");
  const auto maybe = [](const Tensor& t) {
    return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
  };
  const variable_list all = prepared(call, tensors);
  const Split split(call, all);
  const torch::jit::Stack stack =
      call_operator(op, maybe(grads[0]), maybe(grads[1]), maybe(grads[2]), split.input,
                    call.batch_sizes, split.initial(0), split.initial(1),
                    c10::List<Tensor>(split.weights), kept[0], kept[1], kept[2], call.spec, needs,
                    false, call.resets, split.after_reset(0), split.after_reset(1), call.masks);
  variable_list found;
  for (int64_t i = 0; i <= call.states; ++i) found.push_back(stack[i].toTensor());
  for (const Tensor& g : stack[3].toTensorList()) found.push_back(g);
  found.resize(1 + call.states + split.weights.size());
  for (size_t i = 0; i < split.reset_state.size(); ++i) found.push_back(stack[6 + i].toTensor());
  for (int64_t i = 0; i <= call.states; ++i)
    if (call.step && found[i].dim() == 3) found[i] = found[i].squeeze(0);
  return found;
}

struct RnnkernLayer : torch::autograd::Function<RnnkernLayer> {
  static constexpr bool is_traceable = true;

  // tensors: input, *state, *weights, *states after resets
  static variable_list forward(AutogradContext* ctx, const Call& call, TensorList tensors) {
    const std::array<Tensor, 5> results = run_forward(call, tensors, true);
    const variable_list outputs = returned(call, results);
    variable_list kept = tensors.vec();
    kept.insert(kept.end(), {results[0], results[3], results[4]});
    for (const std::optional<Tensor>& t : {call.batch_sizes, call.resets, call.masks})
      if (t) kept.push_back(*t);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["call"] = as_numbers(call);
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list given) {
    variable_list kept = ctx->get_saved_variables();
    const Call call = read_call(ctx->saved_data.at("call").toIntVector(), kept);
    const size_t count = kept.size() - 3;
    const TensorList tensors(kept.data(), count);
    std::array<Tensor, 3> grads;  // of output, h_n, c_n
    for (size_t i = 0; i < given.size(); ++i)
      grads[i + call.step] =
          call.step && given[i].defined() ? given[i].unsqueeze(0) : std::move(given[i]);
    std::vector<bool> needed(count);
    int64_t needs = 0;
    for (size_t i = 0; i < count; ++i) {
      needed[i] = ctx->needs_input_grad(i);
      if (needed[i])
        needs |= i == 0                                       ? rnnkern::kNeedInput
                 : int64_t(i) <= call.states                  ? rnnkern::kNeedState
                 : int64_t(i) <= call.states + call.weights() ? rnnkern::kNeedWeights
                                                              : rnnkern::kNeedResetState;
    }

    variable_list found;
    if (needs_decomposition(grads)) {
      found = differentiable_backward(call, grads, tensors, needed);
      for (int64_t i = 0; i <= call.states; ++i)
        if (call.step && found[i].defined()) found[i] = found[i].squeeze(0);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      auto direct = rnnkern::direct_backward(call, grads, tensors, {&kept[count], 3}, needs);
      found = direct ? std::move(*direct)
                     : operator_backward(call, grads, tensors, {&kept[count], 3}, needs);
    }
    found.resize(count);
    for (size_t i = 0; i < count; ++i) {
      if (!needed[i]) found[i] = Tensor();
      if (call.cast_weights && found[i].defined()) found[i] = found[i].to(tensors[i].scalar_type());
    }
    found.insert(found.begin(), Tensor());  // of `call`
    return found;
  }
};

// As rnnkern::direct_forward_prepacked returns them.
std::array<Tensor, 5> run_prepacked(const Call& call, const variable_list& tensors,
                                    const Tensor& prepacked, int64_t hidden_size,
                                    int64_t proj_size) {
  static const c10::OperatorHandle op = find("rnnkern::forward_prepacked");
  at::AutoDispatchBelowADInplaceOrView guard;
  if (const auto results =
          rnnkern::direct_forward_prepacked(call, tensors, prepacked, hidden_size, proj_size))
    return *results;
  const variable_list all = prepared(call, tensors);
  const Split split(call, all);
  return results_of(
      call, call_operator(op, split.input, call.batch_sizes, split.initial(0), split.initial(1),
                          prepacked, call.spec, hidden_size, proj_size));
}

}  // namespace

namespace rnnkern {

PyObject* tensor_tuple(TensorList tensors) {
  PyObject* const tuple = PyTuple_New(Py_ssize_t(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i)
    PyTuple_SET_ITEM(tuple, Py_ssize_t(i), THPVariable_Wrap(tensors[i]));
  return tuple;
}

void use_decomposition(PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(decomposition_vjp, function);
}

variable_list run_layer(LayerCall call, const variable_list& tensors) {
  call.direct = may_call_directly();
  pybind11::gil_scoped_release without_gil;
  const bool wanted =
      at::GradMode::is_enabled() &&
      std::any_of(tensors.begin(), tensors.end(), [](auto& t) { return t.requires_grad(); });
  return wanted ? RnnkernLayer::apply(call, TensorList(tensors))
                : returned(call, run_forward(call, tensors, false));
}

variable_list run_frozen(LayerCall call, const variable_list& tensors, const Tensor& prepacked,
                         int64_t hidden_size, int64_t proj_size) {
  call.direct = may_call_directly();
  pybind11::gil_scoped_release without_gil;
  return returned(call, run_prepacked(call, tensors, prepacked, hidden_size, proj_size));
}

CallSpec read_spec(PyObject* tuple) {
  CallSpec spec;
  constexpr Py_ssize_t count = std::tuple_size_v<CallSpec::Types>;
  TORCH_CHECK_TYPE(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == count,
                   "expected a CallSpec, got ", Py_TYPE(tuple)->tp_name);
  Py_ssize_t i = 0;
  spec.each([&](auto& field) {
    PyObject* const item = PyTuple_GET_ITEM(tuple, i++);
    if constexpr (std::is_same_v<decltype(field), bool&>) {
      field = item == Py_True;
    } else {
      field = PyLong_AsLongLong(item);
      if (field == -1 && PyErr_Occurred()) throw python_error();
    }
  });
  return spec;
}

}  // namespace rnnkern
