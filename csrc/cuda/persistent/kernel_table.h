// The persistent kernels of one storage type, for clusters with resets or without, for one block
// and for the grid with both. Each .cu file instantiates launch.h and exports tables, so that they
// compile side by side; dispatch.cu chooses among the tables.
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
extern const PersistentKernels persistent_bfloat16_block, persistent_float16_block,
    persistent_float32_block;
extern const PersistentKernels persistent_bfloat16_grid, persistent_float16_grid,
    persistent_float32_grid;

}  // namespace rnnkern::cuda
