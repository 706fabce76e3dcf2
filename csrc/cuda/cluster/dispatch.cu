// The launches of params.h that the persistent engine serves, by storage type.
#include "kernel_table.h"

namespace rnnkern::cuda {
namespace {

// Null for float64, which has no persistent kernels.
const PersistentKernels* kernels_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return &persistent_float32;
    case DType::bfloat16: return &persistent_bfloat16;
    case DType::float16: return &persistent_float16;
    default: return nullptr;
  }
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int directions, bool resets) {
  const PersistentKernels* kernels = kernels_of(dtype);
  return kernels ? kernels->plan(cell, units, batch, backward, directions, resets)
                 : PersistentPlan{};
}

const char* launch_persistent(int cell, DType dtype, const PersistentForwardParams* params,
                              int directions, Stream stream) {
  return kernels_of(dtype)->forward(cell, params, directions, stream);
}

const char* launch_persistent(int cell, DType dtype, const PersistentBackwardParams* params,
                              int directions, Stream stream) {
  return kernels_of(dtype)->backward(cell, params, directions, stream);
}

}  // namespace rnnkern::cuda
