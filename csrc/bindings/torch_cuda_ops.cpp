// The operators on CUDA, registered: any GPU, any size, every floating dtype.
//
// Forward: x W_ih^T for a chunk of time is one large product; then per step one product h W_hh^T
// and one pointwise kernel. Backward: per step one pointwise kernel and one product dgates W_hh;
// then, chunk by chunk, the gradients of the input and of the weights, large products again. A
// projection adds one product per step each way. Where the recurrent weights fit on the chip
// (csrc/cuda/persistent/config.h has the sizes), all steps with the same rows are one persistent
// kernel.
//
// Products go through torch's dispatcher, so that its settings (tf32, workspace, deterministic)
// hold. Everything is put on torch's current stream, memory comes from torch's allocator, and
// nothing waits for the device: a call can be captured in a CUDA graph.
//
// For bfloat16 and float16 the operands of a product have that type; its result, the running
// states, `saved` and `c_states` are float32.
//
// Only libtorch's stable ABI is used. The tests build these files for the CPU too
// (RNNKERN_CUDA_ON_HOST), with the threads of a kernel one after the other, or as fibers.
#include "torch_cuda_ops.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "../core/cuda_cells.h"
#include "torch_cuda_sequence.h"

namespace {

using namespace rnnkern;

// The engine that a call without resets gets, and its grid, as JSON; `batch` is that of the first
// step. With resets, kernels of more registers may change the grid of a small layer.
std::string cuda_plan(Tensor input, int64_t cell, int64_t steps, int64_t batch, int64_t hidden_size,
                      int64_t proj_size, int64_t directions, bool packed, bool backward) {
  STD_TORCH_CHECK((cell >= 0 && cell < kCellCount) || added_kernels(cell),
                  "rnnkern: no CUDA kernels for cell ", cell);
  const DeviceScope device(input);
  const PersistentLayer layer{
      CellId(cell), input.scalar_type(), hidden_size, proj_size != 0, backward, false};
  cuda::PersistentPlan plan = layer.plan_bidirectional(steps, batch, directions, packed);
  const bool both = plan.blocks;
  if (!both) plan = layer.plan(steps, batch);
  if (!plan.blocks) return "{\"schedule\": \"steps\"}";
  const std::string schedule = cuda::kSchedules[int(plan.group)];
  return "{\"schedule\": \"" + schedule + "\", \"blocks\": " + std::to_string(plan.blocks) +
         ", \"groups\": " + std::to_string(plan.groups) +
         ", \"rows\": " + std::to_string(plan.rows) +
         ", \"directions_at_once\": " + (both ? "true" : "false") + "}";
}

}  // namespace

#ifdef RNNKERN_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rnnkern, CUDA, m) {
#endif
  m.impl("forward", TORCH_BOX(&ForwardOp<cuda_forward>::call));
  m.impl("backward", TORCH_BOX(&BackwardOp<cuda_backward>::call));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
}

#ifdef RNNKERN_CUDA_ON_HOST
namespace {
int64_t set_chunk(int64_t elems) { return std::exchange(rnnkern::max_chunk_elems, elems); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("set_chunk", TORCH_BOX(&set_chunk));
}
#endif
