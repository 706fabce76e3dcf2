#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float16_resets =
    persistent_kernels<__half, true, Group::cluster>();
}
