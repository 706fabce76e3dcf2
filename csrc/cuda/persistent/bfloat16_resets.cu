#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_bfloat16_resets =
    persistent_kernels<__nv_bfloat16, true, Group::cluster>();
}
