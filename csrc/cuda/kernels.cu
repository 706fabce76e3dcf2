// The kernels themselves: each hands its thread's share to a function of pointwise.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "pointwise.h"
#include "run.h"

namespace rnnkern::cuda {

extern const Runs runs_bfloat16, runs_float16, runs_float32;

namespace {

__device__ Lane this_lane() {
  return {int64_t(blockIdx.y) * blockDim.y + threadIdx.y, int64_t(gridDim.y) * blockDim.y,
          int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x};
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardStep step) {
  forward_lane<Cell, T>(step, this_lane());
}

template <class Cell, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardStep step) {
  backward_lane<Cell, T>(step, this_lane());
}

template <class T>
__global__ void __launch_bounds__(kThreads) total_kernel(const BackwardStep step) {
  total_lane<T>(step, this_lane());
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads)
    add_kernel(int64_t count, const S* a, const S* b, T* out) {
  const Lane lane = this_lane();
  add_lane(count, a, b, out, lane.unit, lane.unit_step);
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
auto visit_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64: return f(Type<double>{});
    case Storage::bfloat16: return f(Type<__nv_bfloat16>{});
    case Storage::float16: return f(Type<__half>{});
    default: return f(Type<float>{});
  }
}

// Null for a type whose steps are never taken together.
const Runs* runs_of(Storage storage) {
  switch (storage) {
    case Storage::float32: return &runs_float32;
    case Storage::bfloat16: return &runs_bfloat16;
    case Storage::float16: return &runs_float16;
    default: return nullptr;
  }
}

}  // namespace

OnChip on_chip(int cell, Storage storage, int64_t units, int64_t batch, bool backward, int runs) {
  const Runs* type = runs_of(storage);
  return type ? type->on_chip(cell, units, batch, backward, runs) : OnChip{};
}

const char* launch_runs(int cell, Storage storage, const ForwardRun* runs, int count,
                        Stream stream) {
  return runs_of(storage)->forward(cell, runs, count, stream);
}

const char* launch_runs(int cell, Storage storage, const BackwardRun* runs, int count,
                        Stream stream) {
  return runs_of(storage)->backward(cell, runs, count, stream);
}

const char* launch_forward(int cell, Storage storage, const ForwardStep& step, Stream stream) {
  if (step.batch == 0 || step.units == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.units);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  visit_cell(CellId(cell), [&](auto c) {
    visit_storage(storage, [&](auto type) {
      using T = typename decltype(type)::type;
      forward_kernel<decltype(c), T><<<blocks, threads, 0, stream>>>(step);
    });
  });
  return launched();
}

const char* launch_backward(int cell, Storage storage, const BackwardStep& step, Stream stream) {
  if (step.batch == 0 || step.units == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.units);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  visit_cell(CellId(cell), [&](auto c) {
    visit_storage(storage, [&](auto type) {
      using T = typename decltype(type)::type;
      backward_kernel<decltype(c), T><<<blocks, threads, 0, stream>>>(step);
    });
  });
  return launched();
}

const char* launch_total(Storage storage, const BackwardStep& step, Stream stream) {
  if (step.batch == 0 || step.width == 0) return nullptr;
  const Grid g = make_grid(step.batch, step.width);
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  visit_storage(storage, [&](auto type) {
    using T = typename decltype(type)::type;
    total_kernel<T><<<blocks, threads, 0, stream>>>(step);
  });
  return launched();
}

const char* launch_add(Storage storage, bool accumulated, int64_t count, const void* a,
                       const void* b, void* out, Stream stream) {
  if (count == 0) return nullptr;
  const Grid g = make_grid(1, count);
  visit_storage(storage, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto add = [&](auto operand) {
      using S = typename decltype(operand)::type;
      add_kernel<<<g.blocks_x, g.threads_x, 0, stream>>>(
          count, static_cast<const S*>(a), static_cast<const S*>(b), static_cast<T*>(out));
    };
    if (accumulated)
      add(Type<Accumulated<T>>{});
    else
      add(type);
  });
  return launched();
}

}  // namespace rnnkern::cuda
