// The two operators on CUDA; torch_cuda_ops.cpp registers them and has the outline.
#pragma once
#include "torch_cuda_tensors.h"

namespace rnnkern {

ForwardResult cuda_forward(ForwardArgs args);
BackwardResult cuda_backward(BackwardArgs args);

}  // namespace rnnkern
