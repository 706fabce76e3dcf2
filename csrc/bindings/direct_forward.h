// rnnkern::forward on the CPU without torch's dispatcher, which takes as long as a small layer.
#pragma once
#include <Python.h>

#include <array>
#include <optional>

#include "autograd.h"

namespace rnnkern {

// (output, h_n, c_n, saved, c_states) as rnnkern::forward returns them, of a step h_n and c_n
// without the first dimension; those without elements are undefined, but with `train` saved and
// c_states, which a node keeps. Null where the operator has to be called instead: where someone
// could see the difference, or the tensors are not as the engine takes them.
std::optional<std::array<at::Tensor, 5>> direct_forward(const LayerCall& call,
                                                        at::TensorList tensors, bool train);

// Whether the operator's kernel for the CPU is this package's. The caller holds Python's lock.
bool may_call_directly();

// use_replaced_kernels(set): those that torch.library was given, "namespace/operator/key".
PyObject* use_replaced_kernels(PyObject*, PyObject* set);

}  // namespace rnnkern
