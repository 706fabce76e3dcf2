// The two operators on CUDA; torch_cuda_ops.cpp registers them and has the outline.
#pragma once
#include "torch_cuda_tensors.h"

namespace rnnkern {

ForwardResult cuda_forward(Tensor input, MaybeTensor batch_sizes, MaybeTensor h_0, MaybeTensor c_0,
                           Tensors weights, int64_t cell, bool batch_first, bool train);

// `needs` is a sum of Needs: the gradients that are wanted. `flow` asks for flow_h and flow_c.
BackwardResult cuda_backward(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                             Tensor input, MaybeTensor batch_sizes, MaybeTensor h_0,
                             MaybeTensor c_0, Tensors weights, Tensor output, Tensor saved,
                             Tensor c_states, int64_t cell, bool batch_first, int64_t needs,
                             bool flow);

}  // namespace rnnkern
