// torch.nn asks `getattr(module, name)` for every weight at every call, so that a tensor laid over
// a parameter (by an instance or class attribute, or by an overridden lookup) takes its place.
// Asking in Python costs as much as a small layer. Here the places are looked at directly.
#include "module_weights.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

namespace rnnkern {
namespace {

PyObject* torch_lookups = nullptr;  // dict: name of a method -> torch's function

// Whether nothing but torch's own methods decide what an attribute of the module is.
bool has_torch_lookups(PyObject* module, PyObject* attributes) {
  PyObject *name, *function;
  for (Py_ssize_t at = 0; PyDict_Next(torch_lookups, &at, &name, &function);) {
    PyObject* const found = _PyType_Lookup(Py_TYPE(module), name);  // borrowed
    if ((found && found != function) || PyDict_Contains(attributes, name)) return false;
  }
  return true;
}

// The parameter of that name if `getattr` would find it: no attribute of the instance or the class
// comes before it. Borrowed; null if it would not, None for a parameter registered as None.
PyObject* parameter(PyObject* module, PyObject* attributes, PyObject* parameters, PyObject* name) {
  if (PyDict_Contains(attributes, name) || _PyType_Lookup(Py_TYPE(module), name)) return nullptr;
  return PyDict_GetItemWithError(parameters, name);
}

// Whether every tensor in a tree of tuples and lists is a torch.Tensor or Parameter, no subclass.
bool holds_plain_tensors(PyObject* value) {
  if (value == Py_None || THPVariable_CheckExact(value)) return true;
  if (!PyTuple_Check(value) && !PyList_Check(value)) return false;
  PyObject* const* const items = PySequence_Fast_ITEMS(value);
  return std::all_of(items, items + PySequence_Fast_GET_SIZE(value), holds_plain_tensors);
}

}  // namespace

PyObject* find_weights(PyObject* module, PyObject* names, PyObject* flat, PyObject* attributes) {
  static PyObject* const key = PyUnicode_InternFromString("_parameters");
  PyObject* const parameters = PyDict_GetItemWithError(attributes, key);
  if (!parameters || !PyDict_Check(parameters)) return nullptr;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(names);
  if (flat != Py_None && PyList_GET_SIZE(flat) != count) return nullptr;
  auto found = pybind11::reinterpret_steal<pybind11::object>(PyList_New(0));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const name = PySequence_Fast_GET_ITEM(names, i);
    PyObject* const weight = parameter(module, attributes, parameters, name);
    if (!weight) return nullptr;
    if (flat != Py_None && PyList_GET_ITEM(flat, i) != weight) return nullptr;
    if (weight == Py_None) continue;
    if (!THPVariable_CheckExact(weight)) return nullptr;
    if (PyList_Append(found.ptr(), weight)) throw python_error();
  }
  // Without a bias a cell has two weights; one bias alone is torch's to refuse.
  const Py_ssize_t size = PyList_GET_SIZE(found.ptr());
  return size == count || (flat == Py_None && size == 2) ? found.release().ptr() : nullptr;
}

PyObject* registered_weights(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && torch_lookups &&
                       (PyTuple_Check(args[1]) || PyList_Check(args[1])) &&
                       (args[2] == Py_None || PyList_Check(args[2])),
                   "registered_weights takes a module, names, a list or None, input and hx");
  PyObject* const module = args[0];
  const auto attributes =
      pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw python_error();
  PyObject* found = nullptr;
  if (holds_plain_tensors(args[3]) && holds_plain_tensors(args[4]) &&
      has_torch_lookups(module, attributes.ptr()))
    found = find_weights(module, args[1], args[2], attributes.ptr());
  if (PyErr_Occurred()) throw python_error();
  if (!found) Py_RETURN_NONE;
  return found;
  END_HANDLE_TH_ERRORS
}

PyObject* use_lookups(PyObject*, PyObject* mapping) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyDict_Check(mapping), "use_lookups takes a dict");
  Py_INCREF(mapping);
  Py_XSETREF(torch_lookups, mapping);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* cast_weights(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyList_Check(args[0]) && THPDtype_Check(args[1]),
                   "cast_weights takes a list and a dtype");
  const at::ScalarType dtype = reinterpret_cast<THPDtype*>(args[1])->scalar_type;
  const Py_ssize_t size = PyList_GET_SIZE(args[0]);
  auto cast = pybind11::reinterpret_steal<pybind11::object>(PyList_New(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor& weight = THPVariable_Unpack(PyList_GET_ITEM(args[0], i));
    // torch's own cache: it holds leaves that need a gradient until autocast's block ends.
    const at::Tensor as_dtype =
        weight.is_floating_point()
            ? at::autocast::cached_cast(dtype, weight, weight.device().type())
            : weight;
    PyList_SET_ITEM(cast.ptr(), i, THPVariable_Wrap(as_dtype));
  }
  return cast.release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace rnnkern
