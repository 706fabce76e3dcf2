// The launches of csrc/cuda/params.h without a GPU: the stepwise ones as they are, on
// grid_on_host.h, a persistent one on the simulated chip. Together with
// csrc/bindings/torch_cuda_*.cpp this makes operators that torch calls on CPU tensors.
//
// torch has mm of half types with a float32 result on CUDA only: cuda/test_on_host.py brings one.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "../../csrc/bindings/schemas.h"
#include "../../csrc/cuda/stepwise/kernels.cu"
#include "persistent.h"

namespace rnnkern::cuda {
namespace {

std::optional<Group> persistent;  // the kernels that are taken where they have a tiling
int64_t persistent_launches = 0;

// float16 has two batch tiles to a group, the others one: each is compiled for one type alone.
const HostKernels* kernels_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return &bfloat16_on_host;
    case DType::float16: return &float16_on_host;
    case DType::float32: return &float32_on_host;
    default: return nullptr;
  }
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int, bool) {
  const HostKernels* const kernels = kernels_of(dtype);
  if (!persistent || !kernels || !batch) return {};
  return kernels->plan(*persistent, cell, units, batch, backward);
}

const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentForwardParams* params, int directions, Stream) {
  kernels_of(dtype)->forward(group, cell, params, directions);
  persistent_launches += directions;
  return nullptr;
}

const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentBackwardParams* params, int directions, Stream) {
  kernels_of(dtype)->backward(group, cell, params, directions);
  persistent_launches += directions;
  return nullptr;
}

namespace {

int64_t count_launches() { return launches; }
int64_t count_persistent() { return persistent_launches; }
// "block", "clusters" or "grid"; otherwise every step is taken by itself.
void set_persistent(std::string group, int64_t seed) {
  schedule_seed = int(seed);
  persistent.reset();
  for (const Group each : {Group::block, Group::cluster, Group::grid})
    if (group == kSchedules[int(each)]) persistent = each;
}

std::vector<int64_t> grid(int64_t rows, int64_t units) {
  const Grid g = make_grid(rows, units);
  return {g.blocks_x, g.blocks_y, g.threads_x, g.threads_y};
}

}  // namespace
}  // namespace rnnkern::cuda

STABLE_TORCH_LIBRARY(rnnkern_cuda_on_host, m) {
  m.def(RNNKERN_FORWARD_SCHEMA);
  m.def(RNNKERN_BACKWARD_SCHEMA);
  m.def(
      "cuda_plan(Tensor input, int cell, int steps, int batch, int hidden_size, int proj_size, "
      "int directions, bool packed, bool backward) -> str");
  m.def("set_chunk(int sums) -> int");
  m.def("launches() -> int");
  m.def("persistent_launches() -> int");
  m.def("set_persistent(str group, int seed) -> ()");
  m.def("grid(int rows, int units) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&rnnkern::cuda::count_launches));
  m.impl("persistent_launches", TORCH_BOX(&rnnkern::cuda::count_persistent));
  m.impl("set_persistent", TORCH_BOX(&rnnkern::cuda::set_persistent));
  m.impl("grid", TORCH_BOX(&rnnkern::cuda::grid));
}
