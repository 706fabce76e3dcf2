// The persistent kernels of one storage type. Each <type>.cu instantiates launch.h for its type and
// exports a table, so that the types compile side by side; dispatch.cu chooses among the tables.
#pragma once
#include "../params.h"

namespace rnnkern::cuda {

struct PersistentKernels {
  PersistentPlan (*plan)(int cell, int64_t units, int64_t batch, bool backward, int directions,
                         bool resets);
  const char* (*forward)(int cell, const PersistentForwardParams* params, int directions,
                         Stream stream);
  const char* (*backward)(int cell, const PersistentBackwardParams* params, int directions,
                          Stream stream);
};

extern const PersistentKernels persistent_bfloat16, persistent_float16, persistent_float32;

}  // namespace rnnkern::cuda
