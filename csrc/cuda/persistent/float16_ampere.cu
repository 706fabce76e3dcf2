#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float16_block = persistent_kernels<__half, true, Group::block>();
const PersistentKernels persistent_float16_grid = persistent_kernels<__half, true, Group::grid>();
}  // namespace rnnkern::cuda
