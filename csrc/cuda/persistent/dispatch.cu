// The launches of params.h that the persistent engine serves, by storage type and group.
#include <cstdlib>
#include <string_view>
#include <vector>

#include "kernel_table.h"

namespace rnnkern::cuda {
namespace {

// What RNNKERN_ON_CHIP in the environment allows, the preferred first: a list of block, clusters
// and grid, or 0 for nothing. Without it clusters alone, as the others have not yet run on a GPU.
const std::vector<Group>& allowed_groups() {
  static const std::vector<Group> groups = [] {
    const char* const set = std::getenv("RNNKERN_ON_CHIP");
    std::vector<Group> found;
    for (std::string_view rest = set ? set : "clusters"; !rest.empty();) {
      const std::string_view name = rest.substr(0, rest.find(','));
      for (const Group group : {Group::block, Group::cluster, Group::grid})
        if (name == kSchedules[int(group)]) found.push_back(group);
      rest.remove_prefix(name.size() + (name.size() < rest.size()));
    }
    return found;
  }();
  return groups;
}

// Null for float64, which has no persistent kernels.
const PersistentKernels* kernels_of(DType dtype, Group group, bool resets) {
  const auto choose = [&](const PersistentKernels& block, const PersistentKernels& cluster,
                          const PersistentKernels& with_resets, const PersistentKernels& grid) {
    if (group == Group::block) return &block;
    if (group == Group::grid) return &grid;
    return resets ? &with_resets : &cluster;
  };
  switch (dtype) {
    case DType::float32:
      return choose(persistent_float32_block, persistent_float32, persistent_float32_resets,
                    persistent_float32_grid);
    case DType::bfloat16:
      return choose(persistent_bfloat16_block, persistent_bfloat16, persistent_bfloat16_resets,
                    persistent_bfloat16_grid);
    case DType::float16:
      return choose(persistent_float16_block, persistent_float16, persistent_float16_resets,
                    persistent_float16_grid);
    default: return nullptr;
  }
}

template <class Params>
const PersistentKernels* kernels_of(DType dtype, Group group, const Params* params) {
  return kernels_of(dtype, group, params->step.resets.mask.data != nullptr);
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int directions, bool resets) {
  for (const Group group : allowed_groups())
    if (const PersistentKernels* kernels = kernels_of(dtype, group, resets))
      if (const PersistentPlan plan = kernels->plan(cell, units, batch, backward, directions);
          plan.blocks)
        return plan;
  return {};
}

const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentForwardParams* params, int directions,
                              Stream stream) {
  return kernels_of(dtype, group, params)->forward(cell, params, directions, stream);
}

const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentBackwardParams* params, int directions,
                              Stream stream) {
  return kernels_of(dtype, group, params)->backward(cell, params, directions, stream);
}

}  // namespace rnnkern::cuda
