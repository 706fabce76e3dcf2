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

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(Type<double>{});
    case DType::bfloat16: return f(Type<c10::BFloat16>{});
    case DType::float16: return f(Type<c10::Half>{});
    default: return f(Type<float>{});
  }
}

}  // namespace rnnkern::cuda
