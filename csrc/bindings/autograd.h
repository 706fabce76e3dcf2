// A layer's call with its gradient, as this library's functions for Python make it.
#pragma once
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "../core/call_shape.h"

namespace rnnkern {

// The arguments of rnnkern::forward that are no tensors to differentiate. A step is a call of one
// time step and direction on input (B, I) and states (B, H): the dimensions that the operator
// wants are put on here, out of autograd's sight, where an alias is no view and costs next to
// nothing: torch.nn's cells return no views either, so that users may change their results in
// place.
struct LayerCall {
  std::optional<at::Tensor> batch_sizes = {}, resets = {}, masks = {};
  CallSpec spec = {};
  int64_t states = 0;
  bool step = false;
  bool cast_weights = false;  // to the input's dtype, in either pass: no copy is kept in between
  bool direct = false;        // whether direct_call.h may take it, as of the forward pass

  bool has_c() const {
    const CellFacts* const facts = cell_facts(spec.cell);
    return facts && facts->states > 1;
  }
  int64_t weights() const { return spec.directions * weights_per_direction(spec); }
  // Whether the tensor in this place, of (input, *state, *weights), has no time or direction.
  bool lifts(int64_t place) const { return step && place <= states; }
};

// Tensors: input, *state, *weights, *states after resets. Returns (output, h_n[, c_n]), of a step
// (h[, c]). The caller holds Python's lock, which is released meanwhile.
torch::autograd::variable_list run_layer(LayerCall call,
                                         const torch::autograd::variable_list& tensors);

// The same on prepacked weights, without gradients. Tensors: input, *state.
torch::autograd::variable_list run_frozen(LayerCall call,
                                          const torch::autograd::variable_list& tensors,
                                          const at::Tensor& prepacked, int64_t hidden_size,
                                          int64_t proj_size);

// From Python's CallSpec, a tuple.
CallSpec read_spec(PyObject* tuple);

// The decomposition's vjp, for double backward and transforms: (grads, input, batch_sizes, state,
// weights, spec, resets, reset_state, masks, needed) -> gradients of (input, *state, *weights,
// *reset_state).
void use_decomposition(PyObject* function);

// As Python's tuple; None for an undefined tensor.
PyObject* tensor_tuple(at::TensorList tensors);

}  // namespace rnnkern
