// The usual call of a layer or cell of rnnkern.nn, without the cost of Python.
#pragma once
#include <Python.h>

namespace rnnkern {

// plain_layer(module, input, hx) -> (output, states), or None: Layer.forward must do it
PyObject* plain_layer(PyObject*, PyObject* const* args, Py_ssize_t count);

// plain_cell(module, names, mode, input, hx) -> states, or None: Cell.forward must do it
PyObject* plain_cell(PyObject*, PyObject* const* args, Py_ssize_t count);

// plain_frozen(input, hx, prepacked, spec, hidden_size, proj_size, is_step) -> (output, states) or,
// of a step, states; or None: the forward of the frozen layer or cell must do it. Wrong arguments
// are a RuntimeError.
PyObject* plain_frozen(PyObject*, PyObject* const* args, Py_ssize_t count);

// is_watched(): whether a mode, transform, trace, cast or observer is active.
PyObject* is_call_watched(PyObject*, PyObject*);

}  // namespace rnnkern
