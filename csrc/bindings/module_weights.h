// The weights that a call of a torch.nn module uses, and in which dtype.
#pragma once
#include <Python.h>

namespace rnnkern {

// A new list of the module's parameters of these names (a tuple or list), where `attributes`, its
// own, and its class hide none of them and `flat` is None or the list of them. Null without an
// error where the caller must ask torch's own code.
PyObject* find_weights(PyObject* module, PyObject* names, PyObject* flat, PyObject* attributes);

// registered_weights(module, names, flat, input, hx) -> list | None
PyObject* registered_weights(PyObject*, PyObject* const* args, Py_ssize_t count);

// use_lookups(mapping): the methods by which torch.nn looks weights up, by name, as torch has them.
PyObject* use_lookups(PyObject*, PyObject* mapping);

// cast_weights(weights, dtype) -> list: as autocast casts them, once in each of its blocks.
PyObject* cast_weights(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace rnnkern
