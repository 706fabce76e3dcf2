// The kernels of the stepwise engine and their launches. A kernel only says which thread it is;
// what the thread does is in elements.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "elements.h"

namespace rnnkern::cuda {
namespace {

__device__ GridStride this_thread() {
  return {int64_t(blockIdx.y) * blockDim.y + threadIdx.y, int64_t(gridDim.y) * blockDim.y,
          int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x};
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const StepForwardParams step) {
  forward_grid_stride<Cell, T>(step, this_thread());
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const StepBackwardParams step) {
  backward_grid_stride<Cell, T>(step, this_thread());
}

template <class T>
__global__ void __launch_bounds__(kThreads) dh_total_kernel(const StepBackwardParams step) {
  dh_total_grid_stride<T>(step, this_thread());
}

template <class T>
__global__ void __launch_bounds__(kThreads) end_gradients_kernel(const StepBackwardParams step) {
  end_gradients_grid_stride<T>(step, this_thread());
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    reset_kernel(const ResetParams resets, const RowsByStep<const void> from, int64_t t,
                 int64_t batch, int64_t width, S* state) {
  reset_grid_stride<T>(resets, from, t, batch, width, state, this_thread());
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    add_kernel(int64_t count, const S* a, const S* b, T* out) {
  const GridStride at = this_thread();
  add_grid_stride(count, a, b, out, at.unit, at.unit_step);
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(Type<double>{});
    case DType::bfloat16: return f(Type<__nv_bfloat16>{});
    case DType::float16: return f(Type<__half>{});
    default: return f(Type<float>{});
  }
}

// f(storage type, type of an operand): the accumulation type or the storage type.
template <class F>
void dispatch_operand(DType dtype, bool accumulated, F&& f) {
  dispatch_dtype(dtype, [&](auto type) {
    if (accumulated)
      f(type, Type<Acc<typename decltype(type)::type>>{});
    else
      f(type, type);
  });
}

}  // namespace

const char* launch_forward(int cell, DType dtype, const StepForwardParams& step, Stream stream) {
  if (step.batch == 0 || step.units == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.units);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  visit_cell(CellId(cell), [&](auto c) {
    dispatch_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      forward_kernel<decltype(c), T><<<blocks, threads, 0, stream>>>(step);
    });
  });
  return launched();
}

const char* launch_backward(int cell, DType dtype, const StepBackwardParams& step, Stream stream) {
  if (step.batch == 0 || step.units == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.units);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  visit_cell(CellId(cell), [&](auto c) {
    dispatch_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      backward_kernel<decltype(c), T><<<blocks, threads, 0, stream>>>(step);
    });
  });
  return launched();
}

const char* launch_dh_total(DType dtype, const StepBackwardParams& step, Stream stream) {
  if (step.batch == 0 || step.width == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.width);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dh_total_kernel<T><<<blocks, threads, 0, stream>>>(step);
  });
  return launched();
}

const char* launch_end_gradients(DType dtype, const StepBackwardParams& step, Stream stream) {
  if (step.batch == 0 || step.units == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.units);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    end_gradients_kernel<T><<<blocks, threads, 0, stream>>>(step);
  });
  return launched();
}

const char* launch_reset(DType dtype, bool accumulated, const ResetParams& resets,
                         const RowsByStep<const void>& from, int64_t t, int64_t batch,
                         int64_t width, void* state, Stream stream) {
  if (batch == 0 || width == 0) return nullptr;
  const Grid g = make_grid(batch, width);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    using T = typename decltype(type)::type;
    using S = typename decltype(operand)::type;
    reset_kernel<T>
        <<<blocks, threads, 0, stream>>>(resets, from, t, batch, width, static_cast<S*>(state));
  });
  return launched();
}

const char* launch_add(DType dtype, bool accumulated, int64_t count, const void* a, const void* b,
                       void* out, Stream stream) {
  if (count == 0) return nullptr;
  const Grid g = make_grid(1, count);
  dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    using T = typename decltype(type)::type;
    using S = typename decltype(operand)::type;
    add_kernel<<<g.blocks_x, g.threads_x, 0, stream>>>(
        count, static_cast<const S*>(a), static_cast<const S*>(b), static_cast<T*>(out));
  });
  return launched();
}

}  // namespace rnnkern::cuda
