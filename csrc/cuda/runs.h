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
constexpr int kMostWaves = 4;

// One run for each direction.
template <class Run>
struct Both {
  Run run[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

template <class Run, class Cell, class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) run_kernel(const Run run) {
  if constexpr (kCompiled) run_cluster<Cell, T, S>(run);
}

// A kernel of its own, since it must look up its run's values in every step: a training step took 5
// to 17% longer when one run went this way too.
template <class Run, class Cell, class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) both_kernel(const Both<Run> runs) {
  if constexpr (kCompiled) run_cluster<Cell, T, S>(runs.run[blockIdx.z]);
}

template <class Run>
struct Launch {
  void (*kernel)(Run);
  void (*both)(Both<Run>);  // for the narrow shapes alone
  int threads, blocks, rows;
  size_t shared;

  const void* address(int runs) const {
    return runs == 1 ? reinterpret_cast<const void*>(kernel) : reinterpret_cast<const void*>(both);
  }
};

template <class Cell, class T, class S, class Run>
void launch_of(Launch<Run>* launch, int blocks) {
  *launch = {run_kernel<Run, Cell, T, S>,
             nullptr,
             S::kThreads,
             blocks,
             S::kRows,
             shared_bytes<Cell, T, S>(static_cast<const Run*>(nullptr), blocks)};
  if constexpr (S::kWide == 1) launch->both = both_kernel<Run, Cell, T, S>;
}

struct Config {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute size{};

  template <class Run>
  Config(const Launch<Run>& launch, int clusters, int runs, Stream stream) {
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = unsigned(launch.blocks);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(launch.blocks), unsigned(clusters), unsigned(runs));
    config.blockDim = dim3(unsigned(launch.threads));
    config.dynamicSmemBytes = launch.shared;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = 1;
  }
};

// How many clusters the current device takes at once; asked once for each.
template <class Run>
int clusters_at_once(const Launch<Run>& launch, int runs) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const void* const kernel = launch.address(runs);
  int device, most, count = 0;
  if (cudaGetDevice(&device) ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 0;
  const std::lock_guard lock(mutex);
  const auto [entry, asked] = known.try_emplace({device, kernel, launch.blocks}, 0);
  if (asked) {
    const Config config(launch, 1, 1, nullptr);
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

template <class T, int Wide, class Run>
bool find(int cell, int64_t units, Launch<Run>* launch) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    found = visit_shape<Cell, T, Wide>(units, [&](auto shape) {
      using S = decltype(shape);
      launch_of<Cell, T, S>(launch, blocks_for<S>(units));
    });
  });
  return found;
}

// RNNKERN_ON_CHIP=0 in the environment takes every step by itself, to compare.
bool wanted() {
  static const char* const set = std::getenv("RNNKERN_ON_CHIP");
  return !set || std::string_view(set) != "0";
}

bool hopper() {
  int device, major;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

// Eight rows of the batch to a cluster, or sixteen where the device does not take that many
// clusters at once. Two runs only where all their clusters are at work at once: else they go one by
// one.
template <class T, class Run>
OnChip choose(int cell, int64_t units, int64_t batch, int runs, Launch<Run>* launch) {
  if (units < 1 || batch < 1 || !wanted() || !hopper()) return {};
  OnChip best;
  const auto fits = [&](bool found, const Launch<Run>& candidate) {
    const int at_once = found ? clusters_at_once(candidate, runs) : 0;
    const int64_t clusters = at_once ? (batch + candidate.rows - 1) / candidate.rows : 0;
    const int64_t most = int64_t(runs == 1 ? kMostWaves : 1) * at_once;
    if (!at_once || clusters * runs > most) return false;
    best = {candidate.blocks, int(clusters), candidate.rows};
    *launch = candidate;
    return clusters * runs <= at_once;
  };
  constexpr int kWidest = sizeof(T) == 2 ? 2 : 1;
  Launch<Run> narrow, wide;
  if (!fits(find<T, 1>(cell, units, &narrow), narrow) && kWidest > 1 && runs == 1)
    fits(find<T, kWidest>(cell, units, &wide), wide);
  return best;
}

template <class T, class Run>
const char* start(int cell, const Run* runs, int count, Stream stream) {
  const auto& step = runs[0].step;
  Launch<Run> launch;
  const OnChip chosen = choose<T>(cell, step.units, step.batch, count, &launch);
  if (!chosen.blocks) return "no cluster holds the recurrent weights";
  const Config config(launch, chosen.clusters, count, stream);
  const cudaError_t error =
      count == 1 ? cudaLaunchKernelEx(&config.config, launch.kernel, runs[0])
                 : cudaLaunchKernelEx(&config.config, launch.both, Both<Run>{{runs[0], runs[1]}});
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <class T>
constexpr Runs runs_of() {
  return {[](int cell, int64_t units, int64_t batch, bool backward, int runs) {
            Launch<ForwardRun> forward;
            Launch<BackwardRun> back;
            return backward ? choose<T>(cell, units, batch, runs, &back)
                            : choose<T>(cell, units, batch, runs, &forward);
          },
          start<T, ForwardRun>, start<T, BackwardRun>};
}

}  // namespace rnnkern::cuda
