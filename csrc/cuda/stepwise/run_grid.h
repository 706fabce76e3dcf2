// A stepwise kernel on the GPU, and its dtype as a type. The tests bring grid_on_host.h in its
// place, which runs the threads of a grid one after the other.
#pragma once
#include "../params.h"
#include "grid.h"

#if defined(RNNKERN_CUDA_ON_HOST)
#include "grid_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace rnnkern::cuda {

template <class Kernel>
__global__ void __launch_bounds__(kThreads) grid_kernel(const Kernel kernel) {
  kernel({int64_t(blockIdx.y) * blockDim.y + threadIdx.y, int64_t(gridDim.y) * blockDim.y,
          int64_t(blockIdx.x) * blockDim.x + threadIdx.x, int64_t(gridDim.x) * blockDim.x});
}

// Puts the kernel on the stream; null, or CUDA's words for the error.
template <class Kernel>
const char* run_grid(const Kernel& kernel, const Grid& g, Stream stream) {
  const dim3 blocks(g.blocks_x, g.blocks_y), threads(g.threads_x, g.threads_y);
  // clang-format off
  grid_kernel<<<blocks, threads, 0, stream>>>(kernel);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

}  // namespace rnnkern::cuda
#endif

namespace rnnkern::cuda {

template <class T>
struct Type {
  using type = T;
};

// f(Type<the storage type>{}).
template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(Type<double>{});
    case DType::bfloat16: return f(Type<Bfloat16>{});
    case DType::float16: return f(Type<Float16>{});
    default: return f(Type<float>{});
  }
}

}  // namespace rnnkern::cuda
