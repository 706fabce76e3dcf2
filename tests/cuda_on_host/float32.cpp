#include "persistent.h"

namespace rnnkern::cuda {
const HostKernels float32_on_host = kernels_on_host<float, 1>();
}
