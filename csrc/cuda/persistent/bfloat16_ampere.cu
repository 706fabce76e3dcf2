#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_bfloat16_block =
    persistent_kernels<__nv_bfloat16, true, Group::block>();
const PersistentKernels persistent_bfloat16_grid =
    persistent_kernels<__nv_bfloat16, true, Group::grid>();
}  // namespace rnnkern::cuda
