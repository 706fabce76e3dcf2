#include "persistent.h"

namespace rnnkern::cuda {
const HostKernels bfloat16_on_host = kernels_on_host<Bfloat16, 1>();
}
