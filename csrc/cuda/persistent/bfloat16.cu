#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_bfloat16 =
    persistent_kernels<__nv_bfloat16, false, Group::cluster>();
}
