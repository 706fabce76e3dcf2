#include "runs.h"

namespace rnnkern::cuda {
extern const PersistentKernels persistent_float32 = persistent_kernels<float>();
}
