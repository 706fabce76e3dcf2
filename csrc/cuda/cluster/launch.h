// The persistent kernels of one storage type, with resets or without: which kernel a call gets, and
// its launch. Host code but for the two __global__ functions. Included by <type>.cu and
// <type>_resets.cu alone.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "backward.h"
#include "forward.h"
#include "kernel_table.h"

namespace rnnkern::cuda {
namespace {

// A call that needs more waves of clusters than this takes the stepwise engine.
constexpr int kMaxWaves = 4;

template <class Params>
struct BothDirections {
  Params direction[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// With resets a kernel of its own, so that without them there is nothing to ask in a step.
template <class Params, class Cell, class T, class Config, bool kResets>
__global__ void __launch_bounds__(Config::kThreads, 1) persistent_kernel(const Params params) {
  if constexpr (kHasClusters) persistent_thread<Cell, T, Config, kResets>(params);
}

// A kernel of its own, since it must look up its direction's parameters in every step: a training
// step took 5 to 17% longer when one direction went this way too.
template <class Params, class Cell, class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    persistent_bidirectional_kernel(const BothDirections<Params> both) {
  if constexpr (kHasClusters) persistent_thread<Cell, T, Config, false>(both.direction[blockIdx.z]);
}

template <class Params>
struct KernelChoice {
  void (*kernel)(Params);
  void (*bidirectional)(BothDirections<Params>);  // null with two batch tiles, or with resets
  int threads, blocks, rows;
  size_t smem;

  const void* address(int directions) const {
    return directions == 1 ? reinterpret_cast<const void*>(kernel)
                           : reinterpret_cast<const void*>(bidirectional);
  }
};

struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster_size{};

  template <class Params>
  ClusterLaunch(const KernelChoice<Params>& choice, int clusters, int directions, Stream stream) {
    cluster_size.id = cudaLaunchAttributeClusterDimension;
    cluster_size.val.clusterDim.x = unsigned(choice.blocks);
    cluster_size.val.clusterDim.y = cluster_size.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(choice.blocks), unsigned(clusters), unsigned(directions));
    config.blockDim = dim3(unsigned(choice.threads));
    config.dynamicSmemBytes = choice.smem;
    config.stream = stream;
    config.attrs = &cluster_size;
    config.numAttrs = 1;
  }
};

// The clusters that the current device runs at once; asked once for each device and kernel.
template <class Params>
int max_active_clusters(const KernelChoice<Params>& choice, int directions) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const void* const kernel = choice.address(directions);
  int device, max_smem, count = 0;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&max_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 0;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, kernel, choice.blocks}, 0);
  if (is_new) {
    const ClusterLaunch launch(choice, 1, 1, nullptr);
    // The device's limit, not this launch's size: other launches of the kernel need more.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_smem) ==
            cudaSuccess &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) == cudaSuccess)
      entry->second = count;
    else
      cudaGetLastError();  // a device without such clusters is no error
  }
  return entry->second;
}

// False if no tiling serves so many units.
template <class T, bool kResets, int BatchTiles, class Params>
bool find_kernel(int cell, int64_t units, KernelChoice<Params>* choice) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    found = dispatch_config<Cell, T, BatchTiles>(units, [&](auto config) {
      using Config = decltype(config);
      const int blocks = cluster_size_for<Config>(units);
      *choice = {persistent_kernel<Params, Cell, T, Config, kResets>,
                 nullptr,
                 Config::kThreads,
                 blocks,
                 Config::kBatchRows,
                 smem_bytes<Cell, T, Config>(static_cast<const Params*>(nullptr), blocks)};
      if constexpr (BatchTiles == 1 && !kResets)
        choice->bidirectional = persistent_bidirectional_kernel<Params, Cell, T, Config>;
    });
  });
  return found;
}

// RNNKERN_ON_CHIP=0 in the environment takes the stepwise engine, to compare.
bool persistent_enabled() {
  static const char* const set = std::getenv("RNNKERN_ON_CHIP");
  return !set || std::string_view(set) != "0";
}

bool device_has_clusters() {
  int device, major;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

// One batch tile to a cluster, or two where the device does not run that many clusters at once. Two
// directions only where all their clusters run at once; otherwise they are launched in turn.
template <class T, bool kResets, class Params>
PersistentPlan select_kernel(int cell, int64_t units, int64_t batch, int directions,
                             KernelChoice<Params>* choice) {
  if (units < 1 || batch < 1 || !persistent_enabled() || !device_has_clusters()) return {};
  PersistentPlan best;
  const auto fits = [&](bool found, const KernelChoice<Params>& candidate) {
    const int active = found ? max_active_clusters(candidate, directions) : 0;
    if (!active) return false;
    const int64_t clusters = (batch + candidate.rows - 1) / candidate.rows;
    const int64_t max_waves = directions == 1 ? kMaxWaves : 1;
    if (clusters * directions > max_waves * active) return false;
    best = {candidate.blocks, int(clusters), candidate.rows};
    *choice = candidate;
    return clusters * directions <= active;
  };
  constexpr int kMaxBatchTiles = sizeof(T) == 2 ? 2 : 1;
  KernelChoice<Params> one, two;
  if (!fits(find_kernel<T, kResets, 1>(cell, units, &one), one) && kMaxBatchTiles > 1 &&
      directions == 1)
    fits(find_kernel<T, kResets, kMaxBatchTiles>(cell, units, &two), two);
  return best;
}

template <class T, bool kResets, class Params>
const char* launch(int cell, const Params* params, int directions, Stream stream) {
  const auto& step = params[0].step;
  KernelChoice<Params> choice;
  const PersistentPlan plan =
      select_kernel<T, kResets>(cell, step.units, step.batch, directions, &choice);
  if (!plan.blocks) return "no cluster holds the recurrent weights";
  const ClusterLaunch launch(choice, plan.clusters, directions, stream);
  const cudaError_t error =
      directions == 1 ? cudaLaunchKernelEx(&launch.config, choice.kernel, params[0])
                      : cudaLaunchKernelEx(&launch.config, choice.bidirectional,
                                           BothDirections<Params>{{params[0], params[1]}});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <class T, bool kResets>
constexpr PersistentKernels persistent_kernels() {
  return {[](int cell, int64_t units, int64_t batch, bool backward, int directions) {
            KernelChoice<PersistentForwardParams> forward;
            KernelChoice<PersistentBackwardParams> back;
            return backward ? select_kernel<T, kResets>(cell, units, batch, directions, &back)
                            : select_kernel<T, kResets>(cell, units, batch, directions, &forward);
          },
          launch<T, kResets, PersistentForwardParams>,
          launch<T, kResets, PersistentBackwardParams>};
}

}  // namespace rnnkern::cuda
