#include "persistent.h"

namespace rnnkern::cuda {
const HostKernels float16_on_host = kernels_on_host<Float16, 2>();
}
