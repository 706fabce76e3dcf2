// The kernels of the stepwise engine, those of cells for the built-in ones. A kernel only says
// which thread it is; what the thread does is in elements.h.
#include "../../cells/registry.h"
#include "launch.h"

namespace rnnkern::cuda {
namespace {

// f(storage type, type of an operand): the accumulation type or the storage type.
template <class F>
const char* dispatch_operand(DType dtype, bool accumulated, F&& f) {
  return dispatch_dtype(dtype, [&](auto type) {
    using A = Acc<typename decltype(type)::type>;
    return accumulated ? f(type, Type<A>{}) : f(type, type);
  });
}

}  // namespace

const char* launch_forward(int cell, DType dtype, const StepForwardParams& step, Stream stream) {
  return visit_cell(CellId(cell),
                    [&](auto c) { return launch_forward_of<decltype(c)>(dtype, step, stream); });
}

const char* launch_backward(int cell, DType dtype, const StepBackwardParams& step, Stream stream) {
  return visit_cell(CellId(cell),
                    [&](auto c) { return launch_backward_of<decltype(c)>(dtype, step, stream); });
}

const char* launch_dh_total(DType dtype, const StepBackwardParams& step, Stream stream) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return run_grid(DhTotalKernel<T>{step}, step.batch, step.width, stream);
  });
}

const char* launch_end_gradients(DType dtype, const StepBackwardParams& step, Stream stream) {
  return dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return run_grid(EndGradientsKernel<T>{step}, step.batch, step.units, stream);
  });
}

const char* launch_reset(DType dtype, bool accumulated, const ResetParams& resets,
                         const RowsByStep<const void>& from, int64_t t, int64_t batch,
                         int64_t width, void* state, Stream stream) {
  return dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    using T = typename decltype(type)::type;
    using S = typename decltype(operand)::type;
    const ResetKernel<T, S> kernel{resets, from, t, batch, width, static_cast<S*>(state)};
    return run_grid(kernel, batch, width, stream);
  });
}

const char* launch_add(DType dtype, bool accumulated, int64_t count, const void* a, const void* b,
                       void* out, Stream stream) {
  if (count == 0) return nullptr;
  Grid grid = make_grid(1, count);
  grid.threads_y = 1;
  return dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    using T = typename decltype(type)::type;
    using S = typename decltype(operand)::type;
    const AddKernel<T, S> kernel{count, static_cast<const S*>(a), static_cast<const S*>(b),
                                 static_cast<T*>(out)};
    return run_grid(kernel, grid, stream);
  });
}

}  // namespace rnnkern::cuda
