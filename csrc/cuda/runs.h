// The persistent kernels of one storage type: how a run is put on the device. Each runs_*.cu is
// this for one type, so that they compile side by side.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "cluster_backward.h"
#include "cluster_forward.h"

namespace rnnkern::cuda {
namespace {

// A call with more clusters than that many times what the device takes at once goes step by step.
constexpr int kMaxWaves = 4;

// One run for each direction.
template <class Params>
struct BothDirections {
  Params direction[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

template <class Params, class Cell, class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) persistent_kernel(const Params params) {
  if constexpr (kHasClusters) run_cluster<Cell, T, Config>(params);
}

// A kernel of its own, since it must look up its run's values in every step: a training step took 5
// to 17% longer when one run went this way too.
template <class Params, class Cell, class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    persistent_bidirectional_kernel(const BothDirections<Params> both) {
  if constexpr (kHasClusters) run_cluster<Cell, T, Config>(both.direction[blockIdx.z]);
}

template <class Params>
struct KernelChoice {
  void (*kernel)(Params);
  void (*both)(BothDirections<Params>);  // for the narrow shapes alone
  int threads, blocks, rows;
  size_t shared;

  const void* address(int directions) const {
    return directions == 1 ? reinterpret_cast<const void*>(kernel)
                           : reinterpret_cast<const void*>(both);
  }
};

template <class Cell, class T, class Config, class Params>
void choose_config(KernelChoice<Params>* choice, int blocks) {
  *choice = {persistent_kernel<Params, Cell, T, Config>,
             nullptr,
             Config::kThreads,
             blocks,
             Config::kBatchRows,
             smem_bytes<Cell, T, Config>(static_cast<const Params*>(nullptr), blocks)};
  if constexpr (Config::kBatchTiles == 1)
    choice->both = persistent_bidirectional_kernel<Params, Cell, T, Config>;
}

struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute size{};

  template <class Params>
  ClusterLaunch(const KernelChoice<Params>& choice, int clusters, int directions, Stream stream) {
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = unsigned(choice.blocks);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(choice.blocks), unsigned(clusters), unsigned(directions));
    config.blockDim = dim3(unsigned(choice.threads));
    config.dynamicSmemBytes = choice.shared;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = 1;
  }
};

// How many clusters the current device takes at once; asked once for each.
template <class Params>
int max_active_clusters(const KernelChoice<Params>& choice, int directions) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const void* const kernel = choice.address(directions);
  int device, most, count = 0;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 0;
  const std::lock_guard lock(mutex);
  const auto [entry, asked] = known.try_emplace({device, kernel, choice.blocks}, 0);
  if (asked) {
    const ClusterLaunch config(choice, 1, 1, nullptr);
    // As much as there is, and not what this launch takes: others of the kernel take more.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) ==
            cudaSuccess &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&count, kernel, &config.config) == cudaSuccess)
      entry->second = count;
    else
      cudaGetLastError();  // it is no error that a device has no such clusters
  }
  return entry->second;
}

template <class T, int BatchTiles, class Params>
bool find_kernel(int cell, int64_t units, KernelChoice<Params>* choice) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    found = dispatch_config<Cell, T, BatchTiles>(units, [&](auto shape) {
      using Config = decltype(shape);
      choose_config<Cell, T, Config>(choice, cluster_size_for<Config>(units));
    });
  });
  return found;
}

// RNNKERN_ON_CHIP=0 in the environment takes every step by itself, to compare.
bool persistent_enabled() {
  static const char* const set = std::getenv("RNNKERN_ON_CHIP");
  return !set || std::string_view(set) != "0";
}

bool has_clusters() {
  int device, major;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

// Eight rows of the batch to a cluster, or sixteen where the device does not take that many
// clusters at once. Two runs only where all their clusters are at work at once: else they go one by
// one.
template <class T, class Params>
PersistentPlan select_kernel(int cell, int64_t units, int64_t batch, int directions,
                             KernelChoice<Params>* choice) {
  if (units < 1 || batch < 1 || !persistent_enabled() || !has_clusters()) return {};
  PersistentPlan best;
  const auto fits = [&](bool found, const KernelChoice<Params>& candidate) {
    const int at_once = found ? max_active_clusters(candidate, directions) : 0;
    const int64_t clusters = at_once ? (batch + candidate.rows - 1) / candidate.rows : 0;
    const int64_t most = int64_t(directions == 1 ? kMaxWaves : 1) * at_once;
    if (!at_once || clusters * directions > most) return false;
    best = {candidate.blocks, int(clusters), candidate.rows};
    *choice = candidate;
    return clusters * directions <= at_once;
  };
  constexpr int kWidest = sizeof(T) == 2 ? 2 : 1;
  KernelChoice<Params> narrow, wide;
  if (!fits(find_kernel<T, 1>(cell, units, &narrow), narrow) && kWidest > 1 && directions == 1)
    fits(find_kernel<T, kWidest>(cell, units, &wide), wide);
  return best;
}

template <class T, class Params>
const char* launch(int cell, const Params* params, int count, Stream stream) {
  const auto& step = params[0].step;
  KernelChoice<Params> choice;
  const PersistentPlan chosen = select_kernel<T>(cell, step.units, step.batch, count, &choice);
  if (!chosen.blocks) return "no cluster holds the recurrent weights";
  const ClusterLaunch config(choice, chosen.clusters, count, stream);
  const cudaError_t error =
      count == 1 ? cudaLaunchKernelEx(&config.config, choice.kernel, params[0])
                 : cudaLaunchKernelEx(&config.config, choice.both,
                                      BothDirections<Params>{{params[0], params[1]}});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <class T>
constexpr PersistentKernels persistent_kernels() {
  return {[](int cell, int64_t units, int64_t batch, bool backward, int directions) {
            KernelChoice<PersistentForwardParams> forward;
            KernelChoice<PersistentBackwardParams> back;
            return backward ? select_kernel<T>(cell, units, batch, directions, &back)
                            : select_kernel<T>(cell, units, batch, directions, &forward);
          },
          launch<T, PersistentForwardParams>, launch<T, PersistentBackwardParams>};
}

}  // namespace rnnkern::cuda
