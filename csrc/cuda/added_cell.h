// The library of the CUDA kernels of one cell that is not built in: the stepwise ones.
// rnnkern/own_cell_cuda.py writes the source file that includes this header and the cell's, and
// ends with the macro.
#pragma once
#include "gate_layout.h"
#include "stepwise/launch.h"

namespace rnnkern::cuda {

template <class Cell>
constexpr AddedKernels added_kernels_of() {
  return {gate_layout_of<Cell>(), launch_forward_of<Cell>, launch_backward_of<Cell>};
}

}  // namespace rnnkern::cuda

// Defines `const void* rnnkern_kernels()`, the kernels for rnnkern_set_kernels.
#define RNNKERN_ADDED_KERNELS(Cell)                                                             \
  extern "C" __attribute__((visibility("default"))) const void* rnnkern_kernels() {             \
    static const rnnkern::cuda::AddedKernels kernels = rnnkern::cuda::added_kernels_of<Cell>(); \
    return &kernels;                                                                            \
  }
