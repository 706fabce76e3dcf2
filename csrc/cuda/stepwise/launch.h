// The launches of a cell's two stepwise kernels, and of others over rows and units.
#pragma once
#include "elements.h"
#include "run_grid.h"

namespace rnnkern::cuda {

// For rows x units.
template <class Kernel>
const char* run_grid(const Kernel& kernel, int64_t rows, int64_t units, Stream stream) {
  return rows && units ? run_grid(kernel, make_grid(rows, units), stream) : nullptr;
}

template <class Cell>
const char* launch_forward_of(DType dtype, const StepForwardParams& step, Stream stream) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return run_grid(ForwardKernel<Cell, T>{step}, step.batch, step.units, stream);
  });
}

template <class Cell>
const char* launch_backward_of(DType dtype, const StepBackwardParams& step, Stream stream) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return run_grid(BackwardKernel<Cell, T>{step}, step.batch, step.units, stream);
  });
}

}  // namespace rnnkern::cuda
