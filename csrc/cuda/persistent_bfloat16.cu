#include "runs.h"

namespace rnnkern::cuda {
extern const PersistentKernels persistent_bfloat16 = persistent_kernels<__nv_bfloat16>();
}
