// What a call asks of the module that it is made on: whether rnnkern's own methods serve it, its
// settings, its weights.
#pragma once
#include <Python.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "../core/call_spec.h"

namespace rnnkern {

// use_plain_calls(is_plain, methods, observer, forward_ad): what is asked of Python meanwhile.
PyObject* use_plain_calls(PyObject*, PyObject* const* args, Py_ssize_t count);
bool knows_plain_calls();  // use_plain_calls was called

// Whether a mode, transform, trace, cast or observer is active.
bool is_watched();

// What the module says besides its weights.
struct Settings {
  CallSpec spec = {};
  int64_t layers = 1, input_size, hidden_size, proj_size = 0;
  int64_t width() const { return proj_size ? proj_size : hidden_size; }
};

// Each returns false if the attribute is not what torch.nn has there.
bool read(PyObject* value, int64_t& number);
bool read(PyObject* value, bool& flag);
bool read_mode(PyObject* value, int64_t& cell);
bool read_sizes(PyObject* attributes, Settings& settings);
bool read_layer(PyObject* attributes, Settings& settings);

struct Module {
  pybind11::object attributes, weights;  // a dict, a list
};

// The module's own attributes and its weights of these names, if it is an ordinary one; `flat`: of
// those that it lists itself, as layers do.
std::optional<Module> find_module(PyObject* module, PyObject* names, bool flat);

}  // namespace rnnkern
