#include "plain_module.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <unordered_map>

#include "../core/cell_facts.h"
#include "module_weights.h"

namespace rnnkern {
namespace {

// See use_plain_calls.
PyObject* is_plain = nullptr;    // class -> bool
PyObject* methods = nullptr;     // tuple of names that a module must not hide
PyObject* observer = nullptr;    // a ContextVar
PyObject* forward_ad = nullptr;  // the namespace of torch.autograd.forward_ad

class Name {  // of an attribute
 public:
  explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  PyObject* in(PyObject* dict) const { return PyDict_GetItemWithError(dict, name_); }  // borrowed

 private:
  PyObject* name_;
};

bool is_observed() {
  PyObject* value = nullptr;
  if (PyContextVar_Get(observer, nullptr, &value)) throw python_error();
  const bool found = value && value != Py_None;
  Py_XDECREF(value);
  return found;
}

bool has_dual_level() {
  static const Name name("_current_level");
  PyObject* const level = name.in(forward_ad);
  return !level || PyLong_AsLong(level) >= 0;
}

// Whether is_plain says so of the class: asked again whenever the class or a base has changed,
// which gives it a new version.
bool is_plain_class(PyTypeObject* type) {
  struct Judged {
    unsigned version;
    bool plain;
  };
  static std::unordered_map<PyTypeObject*, Judged> judged;
  unsigned version = type->tp_version_tag;
#if PY_VERSION_HEX < 0x030B0000
  if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG)) version = 0;
#endif
  const auto known = judged.find(type);
  if (version && known != judged.end() && known->second.version == version)
    return known->second.plain;
  const auto answer = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_CallOneArg(is_plain, reinterpret_cast<PyObject*>(type)));
  if (!answer) throw python_error();
  judged[type] = {version, answer.ptr() == Py_True};
  return answer.ptr() == Py_True;
}

// Between layers; masks are drawn in Python.
bool drops_out(PyObject* attributes) {
  static const Name training("training"), dropout("dropout");
  PyObject *const active = training.in(attributes), *const rate = dropout.in(attributes);
  if (active == Py_False) return false;
  return !rate || !PyFloat_CheckExact(rate) || PyFloat_AS_DOUBLE(rate) != 0;
}

}  // namespace

bool is_watched() {
  using c10::DispatchKey;
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet transforms{DispatchKey::FuncTorchDynamicLayerFrontMode,
                                       DispatchKey::FuncTorchDynamicLayerBackMode};
  return keys.included_.has_any(transforms) ||
         !keys.excluded_.isSupersetOf(c10::autocast_dispatch_keyset) ||
         torch::jit::tracer::isTracing() || at::impl::PythonTorchFunctionTLS::stack_len() ||
         has_dual_level() || is_observed();
}

bool read(PyObject* value, int64_t& number) {
  if (!value || !PyLong_CheckExact(value)) return false;
  int overflow;
  number = PyLong_AsLongLongAndOverflow(value, &overflow);
  return !overflow;
}
bool read(PyObject* value, bool& flag) {
  flag = value == Py_True;
  return flag || value == Py_False;
}

bool read_mode(PyObject* value, int64_t& cell) {
  if (!value || !PyUnicode_Check(value)) return false;
  for (cell = 0; cell < kCellCount; ++cell)
    if (!PyUnicode_CompareWithASCIIString(value, kCellFacts[cell].mode)) return true;
  return false;
}

bool read_sizes(PyObject* attributes, Settings& settings) {
  static const Name input_size("input_size"), hidden_size("hidden_size");
  return read(input_size.in(attributes), settings.input_size) && settings.input_size &&
         read(hidden_size.in(attributes), settings.hidden_size) && settings.hidden_size;
}

bool read_layer(PyObject* attributes, Settings& settings) {
  static const Name mode("mode"), num_layers("num_layers"), bidirectional("bidirectional"),
      bias("bias"), proj_size("proj_size"), batch_first("batch_first");
  bool two;
  CallSpec& spec = settings.spec;
  if (!(read_mode(mode.in(attributes), spec.cell) &&
        read(num_layers.in(attributes), settings.layers) && settings.layers > 0 &&
        read(bidirectional.in(attributes), two) && read(bias.in(attributes), spec.bias) &&
        read(proj_size.in(attributes), settings.proj_size) &&
        read(batch_first.in(attributes), spec.batch_first) && read_sizes(attributes, settings)))
    return false;
  spec.directions = two ? 2 : 1;
  spec.projection = settings.proj_size > 0;
  return settings.layers == 1 || !drops_out(attributes);
}

std::optional<Module> find_module(PyObject* module, PyObject* names, bool flat) {
  static const Name flat_weights("_flat_weights"), flat_names("_flat_weights_names");
  if (!is_plain_class(Py_TYPE(module))) return std::nullopt;
  Module found{
      pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr)), {}};
  if (!found.attributes) throw python_error();
  PyObject* const own = found.attributes.ptr();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(methods); ++i)
    if (PyDict_Contains(own, PyTuple_GET_ITEM(methods, i))) return std::nullopt;
  PyObject* list = Py_None;
  if (flat) {
    list = flat_weights.in(own);
    names = flat_names.in(own);
    if (!list || !PyList_Check(list) || !names || !PyList_Check(names)) return std::nullopt;
  }
  found.weights =
      pybind11::reinterpret_steal<pybind11::object>(find_weights(module, names, list, own));
  if (PyErr_Occurred()) throw python_error();
  if (!found.weights) return std::nullopt;
  return found;
}

bool knows_plain_calls() { return is_plain; }

PyObject* use_plain_calls(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyCallable_Check(args[0]) && PyTuple_Check(args[1]) &&
                       PyContextVar_CheckExact(args[2]) && PyDict_Check(args[3]),
                   "use_plain_calls takes a function, a tuple, a ContextVar and a dict");
  PyObject** const places[] = {&is_plain, &methods, &observer, &forward_ad};
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(args[i]);
    Py_XSETREF(*places[i], args[i]);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace rnnkern
