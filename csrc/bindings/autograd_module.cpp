// The functions that this library has for Python: their arguments, and the table of them.
#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/runtime/stream.h"
#include "autograd.h"
#include "direct_call.h"
#include "module_weights.h"
#include "plain_call.h"
#include "plain_module.h"
#include "torch_pool.h"

namespace {

using at::Tensor;
using torch::autograd::variable_list;

using Call = rnnkern::LayerCall;

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

PyObject* run(Call call, PyObject* input, PyObject* state, PyObject* weights,
              PyObject* reset_state = nullptr) {
  TORCH_CHECK_TYPE(THPVariable_Check(input), "expected a tensor, got ", Py_TYPE(input)->tp_name);
  variable_list tensors{THPVariable_Unpack(input)};
  tensors.reserve(12);
  append(tensors, state);
  call.states = int64_t(tensors.size()) - 1;
  append(tensors, weights);
  if (reset_state) append(tensors, reset_state);
  return rnnkern::tensor_tuple(rnnkern::run_layer(std::move(call), tensors));
}

std::optional<Tensor> read_optional(PyObject* tensor, const char* name) {
  if (tensor == Py_None) return std::nullopt;
  TORCH_CHECK_TYPE(THPVariable_Check(tensor), name, " must be a tensor");
  return THPVariable_Unpack(tensor);
}

// layer(input, batch_sizes, state, weights, spec, cast_weights[, resets, reset_state[, masks]])
PyObject* layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6 || count == 8 || count == 9, "layer takes 6, 8 or 9 arguments");
  Call call{.spec = rnnkern::read_spec(args[4]), .cast_weights = args[5] == Py_True};
  call.batch_sizes = read_optional(args[1], "batch_sizes");
  if (count > 6) call.resets = read_optional(args[6], "resets");
  if (count > 8) call.masks = read_optional(args[8], "masks");
  PyObject* const reset_state = call.resets ? args[7] : nullptr;
  return run(std::move(call), args[0], args[2], args[3], reset_state);
  END_HANDLE_TH_ERRORS
}

// step(input, state, weights, spec)
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "step takes 4 arguments");
  return run({.spec = rnnkern::read_spec(args[3]), .step = true}, args[0], args[1], args[2]);
  END_HANDLE_TH_ERRORS
}

// frozen(input, state, prepacked, spec, hidden_size, proj_size, is_step)
PyObject* frozen(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7 && THPVariable_Check(args[0]) && THPVariable_Check(args[2]),
                   "frozen takes 7 arguments");
  Call call{.spec = rnnkern::read_spec(args[3]), .step = args[6] == Py_True};
  variable_list tensors{THPVariable_Unpack(args[0])};
  append(tensors, args[1]);
  call.states = int64_t(tensors.size()) - 1;
  const int64_t hidden_size = PyLong_AsLongLong(args[4]), proj_size = PyLong_AsLongLong(args[5]);
  if (PyErr_Occurred()) throw python_error();
  const Tensor& prepacked = THPVariable_Unpack(args[2]);
  return rnnkern::tensor_tuple(
      rnnkern::run_frozen(std::move(call), tensors, prepacked, hidden_size, proj_size));
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
    stream->run(rnnkern::kTorchPool, rows.const_data_ptr(), rank == 2 ? 1 : x.size(0),
                y.mutable_data_ptr());
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

PyObject* use_decomposition(PyObject*, PyObject* function) {
  rnnkern::use_decomposition(function);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer)), METH_FASTCALL,
     "layer(input, batch_sizes, state, weights, spec, cast_weights[, resets, reset_state[, "
     "masks]]) -> (output, h_n[, c_n])"},
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
     METH_FASTCALL,
     "plain_layer(module, input, hx[, resets, reset_state]) -> (output, states), or None"},
    {"plain_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::plain_cell)),
     METH_FASTCALL, "plain_cell(module, names, mode, input, hx) -> states, or None"},
    {"plain_frozen",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnnkern::plain_frozen)),
     METH_FASTCALL,
     "plain_frozen(input, hx, prepacked, spec, hidden_size, proj_size, is_step) -> (output, "
     "states) or, of a step, states; or None"},
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

#define RNNKERN_INIT_OF(name) PyInit_##name
#define RNNKERN_INIT(name) RNNKERN_INIT_OF(name)
PyMODINIT_FUNC RNNKERN_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
