#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float32_block = persistent_kernels<float, true, Group::block>();
const PersistentKernels persistent_float32_grid = persistent_kernels<float, true, Group::grid>();
}  // namespace rnnkern::cuda
