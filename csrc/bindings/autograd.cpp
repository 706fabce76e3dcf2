// A layer call with its gradient as one C++ node of torch's autograd: what rnnkern/autograd.py does
// in Python, at a fraction of the cost of a small call.
//
// torch has no stable ABI for autograd, so this library is built for one version of torch, which
// its name says; under any other version rnnkern uses the Python functions.
#include "autograd.h"

#include <ATen/EmptyTensor.h>
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string_view>
#include <tuple>
#include <type_traits>

#include "../core/call_spec.h"
#include "../cpu/runtime/stream.h"
#include "direct_call.h"
#include "module_weights.h"
#include "plain_call.h"
#include "schemas.h"

namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Call = rnnkern::LayerCall;

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

// (input, *state, *weights), apart.
struct Split {
  Tensor input;
  TensorList state, weights;

  Split(const Call& call, TensorList all)
      : input(all[0]),
        state(all.slice(1, call.states)),
        weights(all.slice(1 + call.states)) {
    TORCH_CHECK(call.states <= 2, "rnnkern: expected at most 2 states, got ", call.states);
  }

  // h_0 or c_0, as the operators take them.
  std::optional<Tensor> given(size_t i) const {
    return i < state.size() ? std::optional<Tensor>(state[i]) : std::nullopt;
  }
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
  return results_of(call,
                    call_operator(op, split.input, call.batch_sizes, split.given(0), split.given(1),
                                  c10::List<Tensor>(split.weights), call.spec, train));
}

variable_list returned(const Call& call, const std::array<Tensor, 5>& results) {
  variable_list all;
  if (!call.step) all.push_back(results[0]);
  all.push_back(results[1]);
  if (call.has_c()) all.push_back(results[2]);
  return all;
}

// The decomposition, in Python: (grads, input, batch_sizes, state, weights, spec, needed) ->
// gradients of (input, *state, *weights).
PyObject* decomposition_vjp = nullptr;

pybind11::object wrapped(const Tensor& t) {  // None for an undefined tensor
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t));
}
pybind11::tuple wrapped(TensorList tensors) {
  pybind11::tuple all(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) all[i] = wrapped(tensors[i]);
  return all;
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
      as_tuple(call.spec), flags);
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
  std::vector<int64_t> numbers{call.states, call.step, call.cast_weights, call.direct,
                               call.batch_sizes.has_value()};
  rnnkern::CallSpec spec = call.spec;
  spec.each([&](auto field) { numbers.push_back(field); });
  return numbers;
}

// Returns whether there were batch_sizes.
bool read_numbers(const std::vector<int64_t>& numbers, Call& call) {
  const int64_t* next = numbers.data();
  const auto read = [&](auto& field) {
    field = static_cast<std::remove_reference_t<decltype(field)>>(*next++);
  };
  bool packed;
  read(call.states), read(call.step), read(call.cast_weights), read(call.direct), read(packed);
  call.spec.each(read);
  return packed;
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
  const torch::jit::Stack stack = call_operator(
      op, maybe(grads[0]), maybe(grads[1]), maybe(grads[2]), split.input, call.batch_sizes,
      split.given(0), split.given(1), c10::List<Tensor>(split.weights), kept[0], kept[1], kept[2],
      call.spec, needs, false);
  variable_list found;
  for (int64_t i = 0; i <= call.states; ++i) found.push_back(stack[i].toTensor());
  for (const Tensor& g : stack[3].toTensorList()) found.push_back(g);
  for (int64_t i = 0; i <= call.states; ++i)
    if (call.step && found[i].dim() == 3) found[i] = found[i].squeeze(0);
  return found;
}

struct RnnkernLayer : torch::autograd::Function<RnnkernLayer> {
  static constexpr bool is_traceable = true;

  // tensors: input, *state, *weights
  static variable_list forward(AutogradContext* ctx, const Call& call, TensorList tensors) {
    const std::array<Tensor, 5> results = run_forward(call, tensors, true);
    const variable_list outputs = returned(call, results);
    variable_list kept = tensors.vec();
    kept.insert(kept.end(), {results[0], results[3], results[4]});
    if (call.batch_sizes) kept.push_back(*call.batch_sizes);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["call"] = as_numbers(call);
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list given) {
    variable_list kept = ctx->get_saved_variables();
    Call call;
    if (read_numbers(ctx->saved_data.at("call").toIntVector(), call)) {
      call.batch_sizes = std::move(kept.back());
      kept.pop_back();
    }
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
        needs |= i == 0                      ? rnnkern::kNeedInput
                 : int64_t(i) <= call.states ? rnnkern::kNeedState
                                             : rnnkern::kNeedWeights;
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

void append(variable_list& tensors, PyObject* sequence) {
  const auto fast = pybind11::reinterpret_steal<pybind11::object>(
      PySequence_Fast(sequence, "expected a sequence of tensors"));
  if (!fast) throw python_error();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(fast.ptr(), i);
    TORCH_CHECK_TYPE(THPVariable_Check(item), "expected a tensor, got ", Py_TYPE(item)->tp_name);
    tensors.push_back(THPVariable_Unpack(item));
  }
}

PyObject* run(Call call, PyObject* input, PyObject* state, PyObject* weights) {
  TORCH_CHECK_TYPE(THPVariable_Check(input), "expected a tensor, got ", Py_TYPE(input)->tp_name);
  variable_list tensors{THPVariable_Unpack(input)};
  tensors.reserve(12);
  append(tensors, state);
  call.states = int64_t(tensors.size()) - 1;
  append(tensors, weights);
  return wrapped(TensorList(rnnkern::run_layer(call, tensors))).release().ptr();
}

// The fields of a CallSpec of Python's, a tuple.
rnnkern::CallSpec read_spec(PyObject* tuple) {
  rnnkern::CallSpec spec;
  constexpr Py_ssize_t count = std::tuple_size_v<rnnkern::CallSpec::Types>;
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

// layer(input, batch_sizes, state, weights, spec, cast_weights)
PyObject* layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "layer takes 6 arguments");
  Call call{.spec = read_spec(args[4]), .cast_weights = args[5] == Py_True};
  if (args[1] != Py_None) {
    TORCH_CHECK_TYPE(THPVariable_Check(args[1]), "batch_sizes must be a tensor");
    call.batch_sizes = THPVariable_Unpack(args[1]);
  }
  return run(std::move(call), args[0], args[2], args[3]);
  END_HANDLE_TH_ERRORS
}

// step(input, state, weights, spec)
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "step takes 4 arguments");
  return run({.spec = read_spec(args[3]), .step = true}, args[0], args[1], args[2]);
  END_HANDLE_TH_ERRORS
}

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
  return results_of(call,
                    call_operator(op, split.input, call.batch_sizes, split.given(0), split.given(1),
                                  prepacked, call.spec, hidden_size, proj_size));
}

// frozen(input, state, prepacked, spec, hidden_size, proj_size, is_step)
PyObject* frozen(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7 && THPVariable_Check(args[0]) && THPVariable_Check(args[2]),
                   "frozen takes 7 arguments");
  Call call{.spec = read_spec(args[3]), .step = args[6] == Py_True};
  call.direct = rnnkern::may_call_directly();
  variable_list tensors{THPVariable_Unpack(args[0])};
  append(tensors, args[1]);
  call.states = int64_t(tensors.size()) - 1;
  const int64_t hidden_size = PyLong_AsLongLong(args[4]), proj_size = PyLong_AsLongLong(args[5]);
  if (PyErr_Occurred()) throw python_error();
  const Tensor& prepacked = THPVariable_Unpack(args[2]);
  variable_list results;
  {
    pybind11::gil_scoped_release without_gil;
    results = returned(call, run_prepacked(call, tensors, prepacked, hidden_size, proj_size));
  }
  return wrapped(TensorList(results)).release().ptr();
  END_HANDLE_TH_ERRORS
}

at::ScalarType dtype_of(const rnnkern::Stream::Sizes& sizes) {
  return sizes.element_size == 2   ? at::kBFloat16
         : sizes.element_size == 8 ? at::kDouble
                                   : at::kFloat;
}

// stream(address, x): the next output of the engine's stream at that address.
PyObject* stream(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyLong_Check(args[0]) && THPVariable_Check(args[1]),
                   "a stream takes a tensor, got ", Py_TYPE(args[count - 1])->tp_name);
  auto* const stream = static_cast<rnnkern::Stream*>(PyLong_AsVoidPtr(args[0]));
  const Tensor& x = THPVariable_Unpack(args[1]);
  const rnnkern::Stream::Sizes& sizes = stream->sizes();
  const int64_t rank = x.dim();
  TORCH_CHECK((rank == 2 || rank == 3) && x.size(rank - 1) == sizes.input_size &&
                  x.size(rank - 2) == sizes.batch && (rank == 2 || x.size(0) > 0),
              "expected input of shape (", sizes.batch, ", ", sizes.input_size, ") or (steps, ",
              sizes.batch, ", ", sizes.input_size, "), got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == dtype_of(sizes) && x.is_cpu() && x.layout() == at::kStrided,
              "expected input of ", dtype_of(sizes), " on the CPU, got ", x.scalar_type(), " on ",
              x.device());
  TORCH_CHECK(!x.requires_grad() || !at::GradMode::is_enabled(),
              "a stream computes no gradients: call it under torch.no_grad(), or detach its input");
  Tensor y;
  {
    pybind11::gil_scoped_release without_gil;
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = x.contiguous();
    y = rank == 2 ? at::detail::empty_cpu({sizes.batch, sizes.width}, x.scalar_type())
                  : at::detail::empty_cpu({x.size(0), sizes.batch, sizes.width}, x.scalar_type());
    stream->run(rows.const_data_ptr(), rank == 2 ? 1 : x.size(0), y.mutable_data_ptr());
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

PyObject* use_decomposition(PyObject*, PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(decomposition_vjp, function);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer)), METH_FASTCALL,
     "layer(input, batch_sizes, state, weights, spec, cast_weights) -> (output, h_n[, c_n])"},
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
     "step(input, state, weights, spec) -> (h[, c]), without the dimensions of T and D"},
    {"frozen", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(frozen)), METH_FASTCALL,
     "frozen(input, state, prepacked, spec, hidden_size, proj_size, is_step): layer() or step() on "
     "prepacked weights, without gradients"},
    {"stream", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(stream)), METH_FASTCALL,
     "stream(address, x) -> y: the next step or steps of the engine's stream"},
    {"use_decomposition", use_decomposition, METH_O, "The vjp for double backward and transforms."},
    {"registered_weights",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::registered_weights)),
     METH_FASTCALL,
     "registered_weights(module, names, flat, input, hx) -> list, or None: ask torch's own code"},
    {"cast_weights",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::cast_weights)),
     METH_FASTCALL, "cast_weights(weights, dtype) -> list, cast once in a block of autocast"},
    {"plain_layer",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::plain_layer)),
     METH_FASTCALL, "plain_layer(module, input, hx) -> (output, states), or None"},
    {"plain_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::plain_cell)),
     METH_FASTCALL, "plain_cell(module, names, mode, input, hx) -> states, or None"},
    {"is_watched", rnnkern::is_call_watched, METH_NOARGS,
     "Whether a mode, transform, trace, cast or observer is active."},
    {"use_plain_calls",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::use_plain_calls)),
     METH_FASTCALL, "use_plain_calls(is_plain, methods, observer, forward_ad)"},
    {"use_replaced_kernels", rnnkern::use_replaced_kernels, METH_O,
     "The set of kernels that torch.library was given."},
    {"use_lookups", rnnkern::use_lookups, METH_O, "torch.nn's methods that look weights up."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module{
    PyModuleDef_HEAD_INIT, "autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

namespace rnnkern {

variable_list run_layer(LayerCall call, const variable_list& tensors) {
  call.direct = may_call_directly();
  pybind11::gil_scoped_release without_gil;
  const bool wanted =
      at::GradMode::is_enabled() &&
      std::any_of(tensors.begin(), tensors.end(), [](auto& t) { return t.requires_grad(); });
  return wanted ? RnnkernLayer::apply(call, TensorList(tensors))
                : returned(call, run_forward(call, tensors, false));
}

}  // namespace rnnkern

#define RNNKERN_INIT_OF(name) PyInit_##name
#define RNNKERN_INIT(name) RNNKERN_INIT_OF(name)
PyMODINIT_FUNC RNNKERN_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
