// What Layer.forward and Cell.forward (rnnkern/nn) do where nothing is out of the ordinary. They
// are the definition: they do every call that is refused here, and raise every error.
//
// A call is plain if
//   1. no mode, transform, trace, cast or observer is active: is_watched();
//   2. the class and the module have rnnkern's and torch's own methods, and the module has the
//      weights that torch.nn would take: find_module();
//   3. its tensors are of no subclass, dense, on the CPU, and fit together: the rest.
// All of it is looked at in each call but for the class, which Python judges once per version.
// Of a frozen module only 1 and 3: nobody but its own class has its weights.
#include "plain_call.h"

#include <ATen/Context.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>

#include "../core/cell_facts.h"
#include "../cpu/runtime/plan_resets.h"
#include "autograd.h"
#include "direct_call.h"
#include "plain_module.h"

namespace rnnkern {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

bool add(variable_list& tensors, PyObject* item) {
  const bool exact = THPVariable_CheckExact(item);
  if (exact) tensors.push_back(THPVariable_Unpack(item));
  return exact;
}

// Adds the states of None, a tensor or a pair; false if they are not plain tensors, or more.
bool add_states(variable_list& tensors, PyObject* hx, const CallSpec& spec) {
  const CellFacts* const facts = cell_facts(spec.cell);
  if (!facts || facts->states > 2) return false;
  if (hx == Py_None) return true;
  if (facts->states == 1) return add(tensors, hx);
  if (!PyTuple_CheckExact(hx) && !PyList_CheckExact(hx)) return false;
  if (PySequence_Fast_GET_SIZE(hx) != 2) return false;
  return add(tensors, PySequence_Fast_GET_ITEM(hx, 0)) &&
         add(tensors, PySequence_Fast_GET_ITEM(hx, 1));
}

// (input, *state), if they are plain tensors; empty if not.
variable_list gather(PyObject* input, PyObject* hx, const CallSpec& spec) {
  variable_list tensors;
  tensors.reserve(12);
  if (!add(tensors, input) || !add_states(tensors, hx, spec)) return {};
  return tensors;
}

// (input, *state, *weights), likewise.
variable_list gather(PyObject* input, PyObject* hx, const Module& module,
                     const Settings& settings) {
  variable_list tensors = gather(input, hx, settings.spec);
  for (Py_ssize_t i = 0; !tensors.empty() && i < PyList_GET_SIZE(module.weights.ptr()); ++i)
    tensors.push_back(THPVariable_Unpack(PyList_GET_ITEM(module.weights.ptr(), i)));
  return tensors;
}

bool may_round(const CallSpec& spec) {
  const at::Float32Op op =
      CellId(spec.cell) == CellId::lstm ? at::Float32Op::RNN : at::Float32Op::MATMUL;
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, op) ==
         at::Float32Precision::BF16;
}

// The input against the module; the kernels check the weights and what is not looked at here.
bool takes_input(const Tensor& input, const Tensor& weight, const Settings& settings) {
  const at::ScalarType dtype = input.scalar_type();
  const bool known =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  return known && input.is_cpu() && input.layout() == at::kStrided && weight.is_cpu() &&
         weight.scalar_type() == dtype && input.size(-1) == settings.input_size;
}

// `leading`: the sizes of a state before its features.
bool takes_states(at::TensorList state, at::IntArrayRef leading, const Settings& settings) {
  for (size_t i = 0; i < state.size(); ++i) {
    const at::IntArrayRef sizes = state[i].sizes();
    if (sizes.size() != leading.size() + 1 || sizes.slice(0, leading.size()) != leading ||
        sizes.back() != (i ? settings.hidden_size : settings.width()))
      return false;
  }
  return true;
}

bool layer_fits(const variable_list& tensors, int64_t states, const Settings& settings) {
  const Tensor& input = tensors[0];
  const int64_t rank = input.dim(), finals = settings.layers * settings.spec.directions;
  if (rank != 2 && rank != 3) return false;
  if (input.scalar_type() == at::kFloat && may_round(settings.spec)) return false;
  const int64_t weights = finals * weights_per_direction(settings.spec);
  if (int64_t(tensors.size()) != 1 + states + weights) return false;
  const bool swapped = rank == 3 && settings.spec.batch_first;
  const int64_t batch = rank == 2 ? 1 : input.size(swapped ? 0 : 1);
  const at::TensorList state(tensors.data() + 1, states);
  return takes_input(input, tensors[1 + states], settings) && input.size(swapped ? 1 : 0) > 0 &&
         (rank == 2 ? takes_states(state, {finals}, settings)
                    : takes_states(state, {finals, batch}, settings));
}

// How often a row is reset after its first step.
int64_t later_resets(const Tensor& mask, int64_t step_dim) {
  const auto* const data = static_cast<const uint8_t*>(mask.const_data_ptr());
  int64_t count = 0;
  for (int64_t t = 1; t < mask.size(step_dim); ++t)
    for (int64_t b = 0; b < mask.size(1 - step_dim); ++b)
      count += data[t * mask.stride(step_dim) + b * mask.stride(1 - step_dim)];
  return count;
}

// Whether the mask goes to the kernels, as rnnkern/nn/resets.py says.
bool takes_mask(const Tensor& mask, const Tensor& input, const Settings& settings) {
  const CallSpec& spec = settings.spec;
  if (input.dim() != 3 || spec.directions != 1 || mask.scalar_type() != at::kBool ||
      !mask.is_cpu() || mask.layout() != at::kStrided || !has_memory(mask) ||
      mask.sizes() != input.sizes().slice(0, 2))
    return false;
  const int64_t step_dim = spec.batch_first ? 1 : 0, batch = mask.size(1 - step_dim);
  const int64_t count = later_resets(mask, step_dim);
  return count && plan_resets(mask.size(step_dim), batch, settings.hidden_size, batch + count).mask;
}

// The mask, and the states after resets behind the other tensors; false if they are not plain.
bool add_resets(PyObject* mask, PyObject* state, const Settings& settings, LayerCall& call,
                variable_list& tensors) {
  if (!THPVariable_CheckExact(mask)) return false;
  call.resets = THPVariable_Unpack(mask);
  const Tensor input = tensors[0];
  const size_t first = tensors.size();
  if (!takes_mask(*call.resets, input, settings) || !add_states(tensors, state, settings.spec))
    return false;
  const int64_t batch = input.size(call.spec.batch_first ? 0 : 1);
  for (size_t i = first; i < tensors.size(); ++i) {
    Tensor& s = tensors[i];
    if (s.scalar_type() != input.scalar_type() || !s.is_cpu() || s.layout() != at::kStrided ||
        !has_memory(s))
      return false;
    if (s.dim() == 2) s = s.unsqueeze(1).expand({-1, batch, -1});
    const int64_t width = i == first ? settings.width() : settings.hidden_size;
    const bool fits = s.dim() == 3 ? s.sizes() == at::IntArrayRef{settings.layers, batch, width}
                                   : s.sizes() == at::IntArrayRef{settings.layers, input.size(0),
                                                                  input.size(1), width};
    if (!fits) return false;
  }
  return true;
}

bool cell_fits(const variable_list& tensors, int64_t states, const Settings& settings) {
  const Tensor& input = tensors[0];
  if (input.dim() != 1 && input.dim() != 2) return false;
  const at::IntArrayRef sizes = input.sizes();
  return takes_input(input, tensors[1 + states], settings) &&
         takes_states({tensors.data() + 1, size_t(states)}, sizes.slice(0, sizes.size() - 1),
                      settings);
}

// The stack of layers on (input, *state, *weights, *states after resets): (output, h_n[, c_n]).
variable_list run_stack(const LayerCall& call, int64_t layers, const variable_list& tensors) {
  if (layers == 1) return run_layer(call, tensors);
  const int64_t first_weight = 1 + call.states, each = call.weights();
  std::vector<variable_list> states, after_reset, finals(call.has_c() ? 2 : 1);
  for (int64_t i = 0; i < call.states; ++i) states.push_back(tensors[1 + i].chunk(layers));
  for (size_t i = first_weight + layers * each; i < tensors.size(); ++i)
    after_reset.push_back(tensors[i].chunk(layers));
  Tensor output = tensors[0];
  for (int64_t k = 0; k < layers; ++k) {
    variable_list own{output};
    for (const variable_list& state : states) own.push_back(state[k]);
    const auto weights = tensors.begin() + first_weight + k * each;
    own.insert(own.end(), weights, weights + each);
    for (const variable_list& state : after_reset) own.push_back(state[k]);
    const variable_list results = run_layer(call, own);
    output = results[0];
    for (size_t i = 0; i < finals.size(); ++i) finals[i].push_back(results[1 + i]);
  }
  variable_list all{output};
  for (const variable_list& of_layers : finals) all.push_back(at::cat(of_layers));
  return all;
}

void unsqueeze(variable_list& tensors, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < count; ++i) tensors[i] = tensors[i].unsqueeze(dim);
}

// One state is a tensor, two are a pair.
PyObject* wrap_states(const variable_list& results, size_t first) {
  return results.size() == first + 1 ? THPVariable_Wrap(results[first])
                                     : tensor_tuple(at::TensorList(results).slice(first));
}

PyObject* wrap_layer(const variable_list& results) {
  PyObject* const pair = PyTuple_New(2);
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(results[0]));
  PyTuple_SET_ITEM(pair, 1, wrap_states(results, 1));
  return pair;
}

}  // namespace

PyObject* plain_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE((count == 3 || count == 5) && knows_plain_calls(),
                   "expected a module, input and hx, or resets and reset_state as well");
  if (is_watched()) Py_RETURN_NONE;
  const std::optional<Module> module = find_module(args[0], nullptr, true);
  Settings settings;
  if (!module || !read_layer(module->attributes.ptr(), settings)) Py_RETURN_NONE;
  variable_list tensors = gather(args[1], args[2], *module, settings);
  if (tensors.empty()) Py_RETURN_NONE;
  const int64_t states = int64_t(tensors.size()) - 1 - PyList_GET_SIZE(module->weights.ptr());
  if (!layer_fits(tensors, states, settings)) Py_RETURN_NONE;

  LayerCall call{.spec = settings.spec, .states = states};
  if (count == 5 && !add_resets(args[3], args[4], settings, call, tensors)) Py_RETURN_NONE;
  const bool batched = tensors[0].dim() == 3;
  if (!batched) {
    call.spec.batch_first = false;
    unsqueeze(tensors, 1 + states, 1);
  }
  variable_list results = run_stack(call, settings.layers, tensors);
  if (!batched)
    for (Tensor& t : results) t = t.squeeze(1);
  else if (call.spec.batch_first && CellId(call.spec.cell) == CellId::lstm)
    results[0] = results[0].view_as(results[0]);  // torch.nn's is a view too
  return wrap_layer(results);
  END_HANDLE_TH_ERRORS
}

PyObject* plain_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && knows_plain_calls(),
                   "expected a module, its names, mode, input and hx");
  if (is_watched()) Py_RETURN_NONE;
  const std::optional<Module> module = find_module(args[0], args[1], false);
  Settings settings;
  if (!module || !read_mode(args[2], settings.spec.cell) ||
      !read_sizes(module->attributes.ptr(), settings))
    Py_RETURN_NONE;
  variable_list tensors = gather(args[3], args[4], *module, settings);
  if (tensors.empty()) Py_RETURN_NONE;
  const Py_ssize_t weights = PyList_GET_SIZE(module->weights.ptr());
  const int64_t states = int64_t(tensors.size()) - 1 - weights;
  if (!cell_fits(tensors, states, settings)) Py_RETURN_NONE;

  settings.spec.directions = 1;
  settings.spec.bias = weights > 2;
  const bool batched = tensors[0].dim() == 2;
  if (!batched) unsqueeze(tensors, 1 + states, 0);
  variable_list results =
      run_layer({.spec = settings.spec, .states = states, .step = true}, tensors);
  if (!batched)
    for (Tensor& t : results) t = t.squeeze(0);
  return wrap_states(results, 0);
  END_HANDLE_TH_ERRORS
}

PyObject* plain_frozen(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7 && knows_plain_calls() && THPVariable_Check(args[2]),
                   "plain_frozen takes 7 arguments");
  if (is_watched()) Py_RETURN_NONE;
  LayerCall call{.spec = read_spec(args[3]), .step = args[6] == Py_True};
  const variable_list tensors = gather(args[0], args[1], call.spec);
  if (tensors.empty() || tensors[0].dim() != (call.step ? 2 : 3)) Py_RETURN_NONE;
  if (at::GradMode::is_enabled() &&
      std::any_of(tensors.begin(), tensors.end(), [](auto& t) { return t.requires_grad(); }))
    Py_RETURN_NONE;
  call.states = int64_t(tensors.size()) - 1;
  int64_t hidden_size, proj_size;
  if (!read(args[4], hidden_size) || !read(args[5], proj_size)) Py_RETURN_NONE;
  const variable_list results =
      run_frozen(call, tensors, THPVariable_Unpack(args[2]), hidden_size, proj_size);
  return call.step ? wrap_states(results, 0) : wrap_layer(results);
  END_HANDLE_TH_ERRORS
}

PyObject* is_call_watched(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(knows_plain_calls(), "use_plain_calls comes first");
  return PyBool_FromLong(is_watched());
  END_HANDLE_TH_ERRORS
}

}  // namespace rnnkern
