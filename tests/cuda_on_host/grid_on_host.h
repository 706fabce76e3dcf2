// csrc/cuda/stepwise/run_grid.h without a GPU: the threads of a grid run one after the other.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../csrc/cuda/params.h"
#include "../../csrc/cuda/stepwise/grid.h"

namespace rnnkern::cuda {

inline int64_t launches = 0;

template <class Kernel>
const char* run_grid(const Kernel& kernel, const Grid& g, Stream) {
  ++launches;
  for (int64_t by = 0; by < g.blocks_y; ++by)
    for (int64_t bx = 0; bx < g.blocks_x; ++bx)
      for (int64_t ty = 0; ty < g.threads_y; ++ty)
        for (int64_t tx = 0; tx < g.threads_x; ++tx)
          kernel({by * g.threads_y + ty, int64_t(g.blocks_y) * g.threads_y, bx * g.threads_x + tx,
                  int64_t(g.blocks_x) * g.threads_x});
  return nullptr;
}

using Bfloat16 = c10::BFloat16;
using Float16 = c10::Half;

}  // namespace rnnkern::cuda
