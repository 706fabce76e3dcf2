// The persistent kernels of one storage type, with resets or without. Each <type>.cu and
// <type>_resets.cu instantiates launch.h and exports a table, so that they compile side by side;
// dispatch.cu chooses among the tables.
#pragma once
#include "../params.h"

namespace rnnkern::cuda {

struct PersistentKernels {
  PersistentPlan (*plan)(int cell, int64_t units, int64_t batch, bool backward, int directions);
  const char* (*forward)(int cell, const PersistentForwardParams* params, int directions,
                         Stream stream);
  const char* (*backward)(int cell, const PersistentBackwardParams* params, int directions,
                          Stream stream);
};

extern const PersistentKernels persistent_bfloat16, persistent_float16, persistent_float32;
extern const PersistentKernels persistent_bfloat16_resets, persistent_float16_resets,
    persistent_float32_resets;

}  // namespace rnnkern::cuda
