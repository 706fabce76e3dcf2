// The launches of csrc/cuda/params.h without a GPU: the stepwise ones as they are, on
// grid_on_host.h, a persistent one on the simulated chip. Together with
// csrc/bindings/torch_cuda_*.cpp this makes operators that torch calls on CPU tensors.
//
// torch has mm of half types with a float32 result on CUDA only: cuda/test_on_host.py brings one.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../../csrc/bindings/schemas.h"
#include "../../csrc/cuda/cluster/backward.h"
#include "../../csrc/cuda/cluster/forward.h"
#include "../../csrc/cuda/stepwise/kernels.cu"

namespace rnnkern::cuda {
namespace {

bool persistent = false;  // whether the persistent engine is taken where it has a tiling
int64_t persistent_launches = 0;

// float16 has two batch tiles to a cluster, the others one: each is compiled for one type alone.
template <class F>
bool dispatch_persistent(int cell, DType dtype, int64_t units, F&& f) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    if (dtype == DType::bfloat16)
      found = dispatch_config<Cell, c10::BFloat16, 1>(
          units, [&](auto config) { f(c, c10::BFloat16{}, config); });
    else if (dtype == DType::float16)
      found = dispatch_config<Cell, c10::Half, 2>(units,
                                                  [&](auto config) { f(c, c10::Half{}, config); });
    else if (dtype == DType::float32)
      found = dispatch_config<Cell, float, 1>(units, [&](auto config) { f(c, float{}, config); });
  });
  return found;
}

constexpr size_t kMaxSmemBytes = 227 << 10;  // of a block on Hopper

template <class Params>
PersistentPlan plan(int cell, DType dtype, int64_t units, int64_t batch) {
  PersistentPlan chosen;
  dispatch_persistent(cell, dtype, units, [&](auto c, auto type, auto config) {
    using Config = decltype(config);
    const int blocks = cluster_size_for<Config>(units);
    if (smem_bytes<decltype(c), decltype(type), Config>(static_cast<const Params*>(nullptr),
                                                        blocks) <= kMaxSmemBytes)
      chosen = {blocks, int((batch + Config::kBatchRows - 1) / Config::kBatchRows),
                Config::kBatchRows};
  });
  return chosen;
}

template <class Params>
const char* launch_each(int cell, DType dtype, const Params* params, int directions) {
  const auto& step = params->step;
  const PersistentPlan chosen = plan<Params>(cell, dtype, step.units, step.batch);
  dispatch_persistent(cell, dtype, step.units, [&](auto c, auto type, auto config) {
    using Cell = decltype(c);
    using T = decltype(type);
    using Config = decltype(config);
    for (const Params* each = params; each < params + directions; ++each, ++persistent_launches)
      launch_clusters(chosen.blocks, chosen.clusters, Config::kThreads,
                      smem_bytes<Cell, T, Config>(each, chosen.blocks), [&] {
                        if (step.resets.mask.data)
                          persistent_thread<Cell, T, Config, true>(*each);
                        else
                          persistent_thread<Cell, T, Config, false>(*each);
                      });
  });
  return nullptr;
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int, bool) {
  if (!persistent || !batch) return {};
  return backward ? plan<PersistentBackwardParams>(cell, dtype, units, batch)
                  : plan<PersistentForwardParams>(cell, dtype, units, batch);
}

const char* launch_persistent(int cell, DType dtype, const PersistentForwardParams* params,
                              int directions, Stream) {
  return launch_each(cell, dtype, params, directions);
}

const char* launch_persistent(int cell, DType dtype, const PersistentBackwardParams* params,
                              int directions, Stream) {
  return launch_each(cell, dtype, params, directions);
}

namespace {

int64_t count_launches() { return launches; }
int64_t count_persistent() { return persistent_launches; }
bool set_persistent(bool enabled, int64_t seed) {
  schedule_seed = int(seed);
  return std::exchange(persistent, enabled);
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
  m.def("set_persistent(bool enabled, int seed) -> bool");
  m.def("grid(int rows, int units) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&rnnkern::cuda::count_launches));
  m.impl("persistent_launches", TORCH_BOX(&rnnkern::cuda::count_persistent));
  m.impl("set_persistent", TORCH_BOX(&rnnkern::cuda::set_persistent));
  m.impl("grid", TORCH_BOX(&rnnkern::cuda::grid));
}
