#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float32_resets =
    persistent_kernels<float, true, Group::cluster>();
}
