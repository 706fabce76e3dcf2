#include "runs.h"

namespace rnnkern::cuda {
extern const PersistentKernels persistent_float16 = persistent_kernels<__half>();
}
