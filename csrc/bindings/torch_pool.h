// The engine's work on the threads of torch.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "../cpu/engine.h"

namespace rnnkern {

constexpr ParallelFor kTorchPool{[](int count, void (*body)(void*, int, int), void* context) {
  torch::stable::parallel_for(
      0, count, 1, [=](int64_t begin, int64_t end) { body(context, int(begin), int(end)); });
}};

}  // namespace rnnkern
