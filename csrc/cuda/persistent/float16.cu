#include "launch.h"

namespace rnnkern::cuda {
const PersistentKernels persistent_float16 = persistent_kernels<__half, false, Group::cluster>();
}
