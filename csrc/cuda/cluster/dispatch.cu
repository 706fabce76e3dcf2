// The launches of params.h that the persistent engine serves, by storage type.
#include "kernel_table.h"

namespace rnnkern::cuda {
namespace {

// Null for float64, which has no persistent kernels.
const PersistentKernels* kernels_of(DType dtype, bool resets) {
  switch (dtype) {
    case DType::float32: return resets ? &persistent_float32_resets : &persistent_float32;
    case DType::bfloat16: return resets ? &persistent_bfloat16_resets : &persistent_bfloat16;
    case DType::float16: return resets ? &persistent_float16_resets : &persistent_float16;
    default: return nullptr;
  }
}

template <class Params>
const PersistentKernels* kernels_of(DType dtype, const Params* params) {
  return kernels_of(dtype, params->step.resets.mask.data != nullptr);
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int directions, bool resets) {
  const PersistentKernels* kernels = kernels_of(dtype, resets);
  return kernels ? kernels->plan(cell, units, batch, backward, directions) : PersistentPlan{};
}

const char* launch_persistent(int cell, DType dtype, const PersistentForwardParams* params,
                              int directions, Stream stream) {
  return kernels_of(dtype, params)->forward(cell, params, directions, stream);
}

const char* launch_persistent(int cell, DType dtype, const PersistentBackwardParams* params,
                              int directions, Stream stream) {
  return kernels_of(dtype, params)->backward(cell, params, directions, stream);
}

}  // namespace rnnkern::cuda
