// Persistent launches of one storage type on the simulated chip. Each <type>.cpp instantiates them,
// so that they compile side by side; launch.cpp has the tables.
#pragma once
#include <algorithm>

#include "../../csrc/cuda/persistent/backward.h"
#include "../../csrc/cuda/persistent/forward.h"
#include "../../csrc/cuda/stepwise/run_grid.h"

namespace rnnkern::cuda {

struct HostKernels {
  PersistentPlan (*plan)(Group, int cell, int64_t units, int64_t batch, bool backward);
  void (*forward)(Group, int cell, const PersistentForwardParams* params, int directions);
  void (*backward)(Group, int cell, const PersistentBackwardParams* params, int directions);
};
extern const HostKernels bfloat16_on_host, float16_on_host, float32_on_host;

namespace {

constexpr size_t kMaxSmemBytes = 227 << 10;  // of a block on Hopper
constexpr int kGroupsAtOnce = 2;             // of a grid, so that tests have several waves

// f(cell, config), or false if there is no tiling. `BatchTiles` to a group, but to a single block
// one.
template <class T, int BatchTiles, class F>
bool dispatch(Group group, int cell, int64_t units, F&& f) {
  return visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    const auto call = [&](auto config) { f(c, config); };
    switch (group) {
      case Group::block: return dispatch_config<Group::block, Cell, T, 1>(units, call);
      case Group::cluster: return dispatch_config<Group::cluster, Cell, T, BatchTiles>(units, call);
      default: return dispatch_config<Group::grid, Cell, T, BatchTiles>(units, call);
    }
  });
}

template <class T, int BatchTiles, class Params>
PersistentPlan plan_on_host(Group group, int cell, int64_t units, int64_t batch) {
  PersistentPlan plan;
  dispatch<T, BatchTiles>(group, cell, units, [&](auto c, auto config) {
    using Config = decltype(config);
    const auto of_pass = static_cast<const Params*>(nullptr);
    const int blocks = blocks_for<Config>(units);
    const int groups = int((batch + Config::kBatchRows - 1) / Config::kBatchRows);
    if (smem_bytes<decltype(c), T, Config>(of_pass, blocks) <= kMaxSmemBytes)
      plan = {group, blocks, groups, Config::kBatchRows,
              std::min(groups, kGroupsAtOnce) * exchange_bytes<T, Config>(of_pass, blocks)};
  });
  return plan;
}

template <class T, int BatchTiles, class Params>
void launch_on_host(Group group, int cell, const Params* params, int directions) {
  const auto& step = params->step;
  const PersistentPlan plan =
      plan_on_host<T, BatchTiles, Params>(group, cell, step.units, step.batch);
  dispatch<T, BatchTiles>(group, cell, step.units, [&](auto c, auto config) {
    using Cell = decltype(c);
    using Config = decltype(config);
    constexpr bool kInClusters = Config::kGroup == Group::cluster;
    const int at_once = Config::kGroup == Group::grid ? kGroupsAtOnce : plan.groups;
    for (int first = 0; first < plan.groups; first += at_once)
      for (const Params* each = params; each < params + directions; ++each) {
        Params wave = *each;
        wave.exchange_bytes = exchange_bytes<T, Config>(each, plan.blocks);
        wave.first_row = int64_t(first) * plan.rows;
        if (plan.exchange_bytes) memset(wave.exchange, 0, size_t(plan.exchange_bytes));
        launch_groups(plan.blocks, std::min(at_once, plan.groups - first), Config::kThreads,
                      smem_bytes<Cell, T, Config>(each, plan.blocks), [&] {
                        if (kInClusters && !step.resets.mask.data)
                          persistent_thread<Cell, T, Config, !kInClusters>(wave);
                        else
                          persistent_thread<Cell, T, Config, true>(wave);
                      });
      }
  });
}

template <class T, int BatchTiles>
constexpr HostKernels kernels_on_host() {
  return {[](Group group, int cell, int64_t units, int64_t batch, bool backward) {
            return backward ? plan_on_host<T, BatchTiles, PersistentBackwardParams>(group, cell,
                                                                                    units, batch)
                            : plan_on_host<T, BatchTiles, PersistentForwardParams>(group, cell,
                                                                                   units, batch);
          },
          launch_on_host<T, BatchTiles, PersistentForwardParams>,
          launch_on_host<T, BatchTiles, PersistentBackwardParams>};
}

}  // namespace
}  // namespace rnnkern::cuda
