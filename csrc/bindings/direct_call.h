// rnnkern::forward, backward and forward_prepacked on the CPU without torch's dispatcher and the
// stable ABI, which take longer than the kernels of a small layer.
//
// Nothing is returned where the operator has to be called instead: where anyone could see the
// difference, or the tensors are not as the engine takes them.
#pragma once
#include <Python.h>

#include <array>
#include <optional>

#include "autograd.h"

namespace rnnkern {

// (output, h_n, c_n, saved, c_states) as the operator returns them, but of a step h_n and c_n have
// no first dimension, and those without elements are undefined, unless a node keeps them (`train`).
std::optional<std::array<at::Tensor, 5>> direct_forward(const LayerCall& call,
                                                        at::TensorList tensors, bool train);

// (output, h_n, c_n) of a call on prepacked weights; tensors: input, *state.
std::optional<std::array<at::Tensor, 5>> direct_forward_prepacked(const LayerCall& call,
                                                                  at::TensorList tensors,
                                                                  const at::Tensor& prepacked,
                                                                  int64_t hidden_size,
                                                                  int64_t proj_size);

// The gradients of `tensors`, by kind, as `needs` says; undefined where not wanted. `grads`: of
// output, h_n and c_n, of a step with their first dimension; undefined for zeros. `kept`: output,
// saved and c_states.
std::optional<torch::autograd::variable_list> direct_backward(const LayerCall& call,
                                                              at::TensorList grads,
                                                              at::TensorList tensors,
                                                              at::TensorList kept, int64_t needs);

// Whether the memory that sizes and strides ask for is there: FSDP, for one, frees it.
bool has_memory(const at::Tensor& t);

// Whether the operators' kernels for the CPU are this package's. The caller holds Python's lock.
bool may_call_directly();

// use_replaced_kernels(set): those that torch.library was given, "namespace/operator/key".
PyObject* use_replaced_kernels(PyObject*, PyObject* set);

}  // namespace rnnkern
