#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float32 = persistent_kernels<float, false, Group::cluster>();
}
