// The persistent kernels of one storage type: which kernel a call gets, and its launch. Host code
// but for the two __global__ functions. Included by <type>.cu, <type>_resets.cu and
// <type>_ampere.cu alone.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "backward.h"
#include "forward.h"
#include "kernel_table.h"

namespace rnnkern::cuda {
namespace {

// A call that needs more waves of groups than this takes the stepwise engine.
constexpr int kMaxWaves = 4;

template <class Params>
struct BothDirections {
  Params direction[2];
};

// The architecture that a group's kernels need: clusters, or mma of all storage types. For older
// ones they are empty.
constexpr int least_arch(Group group) { return group == Group::cluster ? 900 : 800; }
#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 900;
#endif
template <class Config>
constexpr bool kCompiled = kArch >= least_arch(Config::kGroup);

// In clusters resets have a kernel of their own, so that without them there is nothing to ask in a
// step.
template <class Params, class Cell, class T, class Config, bool kResets>
__global__ void __launch_bounds__(Config::kThreads, 1) persistent_kernel(const Params params) {
  if constexpr (kCompiled<Config>) persistent_thread<Cell, T, Config, kResets>(params);
}

// In clusters this is a kernel of its own, since it must look up its direction's parameters in
// every step: a training step took 5 to 17% longer when one direction went this way too.
template <class Params, class Cell, class T, class Config, bool kResets>
__global__ void __launch_bounds__(Config::kThreads, 1)
    persistent_bidirectional_kernel(const BothDirections<Params> both) {
  if constexpr (kCompiled<Config>)
    persistent_thread<Cell, T, Config, kResets>(both.direction[blockIdx.z]);
}

template <class Params>
struct KernelChoice {
  void (*single)(Params);                         // null: the other one serves one direction, too
  void (*bidirectional)(BothDirections<Params>);  // null with two batch tiles, or with resets
  Group group;
  int threads, blocks, rows;
  size_t smem;
  int64_t exchange_bytes;  // of a group

  const void* address(int directions) const {
    return directions == 1 && single ? reinterpret_cast<const void*>(single)
                                     : reinterpret_cast<const void*>(bidirectional);
  }
};

struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  template <class Params>
  LaunchConfig(const KernelChoice<Params>& choice, int groups, int directions, Stream stream) {
    if (choice.group == Group::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(choice.blocks);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {  // all blocks run at once, or the launch fails
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = choice.group == Group::grid;
    }
    config.gridDim = dim3(unsigned(choice.blocks), unsigned(groups), unsigned(directions));
    config.blockDim = dim3(unsigned(choice.threads));
    config.dynamicSmemBytes = choice.smem;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <class Params>
cudaError_t count_active_groups(const KernelChoice<Params>& choice, const void* kernel, int device,
                                int* count) {
  cudaFuncAttributes compiled;
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error || compiled.ptxVersion * 10 < least_arch(choice.group)) return error;
  if (choice.group == Group::cluster) {
    const LaunchConfig launch(choice, 1, 1, nullptr);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error ? error : cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
  }
  int processors = 0, blocks = 0;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error)
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, choice.threads, choice.smem);
  *count = blocks * processors / choice.blocks;
  return error;
}

// The groups that the current device runs at once; asked once for each device and kernel.
template <class Params>
int max_active_groups(const KernelChoice<Params>& choice, int directions) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const void* const kernel = choice.address(directions);
  int device, max_smem, count = 0;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 0;
  if (choice.smem > size_t(max_smem)) return 0;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, kernel, choice.blocks}, 0);
  if (is_new) {
    // The device's limit, not this launch's size: other launches of the kernel need more.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_smem) ==
            cudaSuccess &&
        count_active_groups(choice, kernel, device, &count) == cudaSuccess)
      entry->second = count;
    else
      cudaGetLastError();  // a device without such clusters is no error
  }
  return entry->second;
}

// False if no tiling serves so many units.
template <class T, bool kResets, Group kGroup, int BatchTiles, class Params>
bool find_kernel(int cell, int64_t units, KernelChoice<Params>* choice) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    found = dispatch_config<kGroup, Cell, T, BatchTiles>(units, [&](auto config) {
      using Config = decltype(config);
      const auto of_pass = static_cast<const Params*>(nullptr);
      const int blocks = blocks_for<Config>(units);
      *choice = {nullptr,
                 nullptr,
                 kGroup,
                 Config::kThreads,
                 blocks,
                 Config::kBatchRows,
                 smem_bytes<Cell, T, Config>(of_pass, blocks),
                 exchange_bytes<T, Config>(of_pass, blocks)};
      if constexpr (kGroup == Group::cluster)
        choice->single = persistent_kernel<Params, Cell, T, Config, kResets>;
      if constexpr (kGroup != Group::cluster || (BatchTiles == 1 && !kResets))
        choice->bidirectional = persistent_bidirectional_kernel<Params, Cell, T, Config, kResets>;
    });
  });
  return found;
}

bool device_has(Group group) {
  int device, major;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
         major * 100 >= least_arch(group);
}

// One batch tile to a group, or two where the device does not run that many groups at once. Two
// directions only where all their groups run at once; otherwise they are launched in turn.
template <class T, bool kResets, Group kGroup, class Params>
PersistentPlan select_kernel(int cell, int64_t units, int64_t batch, int directions,
                             KernelChoice<Params>* choice) {
  if (units < 1 || batch < 1 || !device_has(kGroup)) return {};
  PersistentPlan best;
  const auto fits = [&](bool found, const KernelChoice<Params>& candidate) {
    const int active =
        found && candidate.address(directions) ? max_active_groups(candidate, directions) : 0;
    if (active < directions) return false;
    const int64_t groups = (batch + candidate.rows - 1) / candidate.rows;
    const int64_t max_waves = directions == 1 ? kMaxWaves : 1;
    if (groups * directions > max_waves * active) return false;
    best = {kGroup, candidate.blocks, int(groups), candidate.rows,
            std::min<int64_t>(groups, active / directions) * candidate.exchange_bytes};
    *choice = candidate;
    return groups * directions <= active;
  };
  constexpr int kMaxBatchTiles = sizeof(T) == 2 && kGroup != Group::block ? 2 : 1;
  KernelChoice<Params> one, two;
  if (!fits(find_kernel<T, kResets, kGroup, 1>(cell, units, &one), one) && kMaxBatchTiles > 1 &&
      (directions == 1 || kGroup == Group::grid))
    fits(find_kernel<T, kResets, kGroup, kMaxBatchTiles>(cell, units, &two), two);
  return best;
}

// One kernel; of a grid as many as there are waves, since all blocks of a kernel run at once.
template <class T, bool kResets, Group kGroup, class Params>
const char* launch(int cell, const Params* params, int directions, Stream stream) {
  const auto& step = params[0].step;
  KernelChoice<Params> choice;
  const PersistentPlan plan =
      select_kernel<T, kResets, kGroup>(cell, step.units, step.batch, directions, &choice);
  if (!plan.blocks) return "no group of blocks holds the recurrent weights";
  int at_once = plan.groups;
  if (kGroup == Group::grid) at_once = int(plan.exchange_bytes / choice.exchange_bytes);
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < plan.groups && !error; first += at_once) {
    BothDirections<Params> both;
    for (int d = 0; d < directions; ++d) {
      Params& of_direction = both.direction[d] = params[d];
      of_direction.exchange_bytes = choice.exchange_bytes;
      of_direction.first_row = int64_t(first) * choice.rows;
      if (kGroup == Group::grid && !error)
        error = cudaMemsetAsync(of_direction.exchange, 0, size_t(plan.exchange_bytes), stream);
    }
    const LaunchConfig launch(choice, std::min(at_once, plan.groups - first), directions, stream);
    if (!error)
      error = directions == 1 && choice.single
                  ? cudaLaunchKernelEx(&launch.config, choice.single, both.direction[0])
                  : cudaLaunchKernelEx(&launch.config, choice.bidirectional, both);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <class T, bool kResets, Group kGroup>
constexpr PersistentKernels persistent_kernels() {
  return {[](int cell, int64_t units, int64_t batch, bool backward, int directions) {
            KernelChoice<PersistentForwardParams> forward;
            KernelChoice<PersistentBackwardParams> back;
            return backward
                       ? select_kernel<T, kResets, kGroup>(cell, units, batch, directions, &back)
                       : select_kernel<T, kResets, kGroup>(cell, units, batch, directions,
                                                           &forward);
          },
          launch<T, kResets, kGroup, PersistentForwardParams>,
          launch<T, kResets, kGroup, PersistentBackwardParams>};
}

}  // namespace rnnkern::cuda
