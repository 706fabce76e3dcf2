// The persistent kernels, and which shape of a cluster a layer takes.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cluster.h"

namespace rnnkern::cuda {
namespace {

template <class Cell, class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) forward_run_kernel(const ForwardRun run) {
#if __CUDA_ARCH__ >= 900
  forward_cluster<Cell, T, S>(run);
#endif
}

template <class Cell, class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) backward_run_kernel(const BackwardRun run) {
#if __CUDA_ARCH__ >= 900
  backward_cluster<Cell, T, S>(run);
#endif
}

template <class T>
struct Type {
  using type = T;
};

template <class Run>
struct Launch {
  void (*kernel)(Run);
  int threads, blocks, rows;
  size_t shared;
};

template <class Cell, class T, class S>
void launch_of(Launch<ForwardRun>* launch, int blocks) {
  const ForwardMemory<Cell, T, S> memory(nullptr);
  *launch = {forward_run_kernel<Cell, T, S>, S::kThreads, blocks, S::kRows, memory.bytes};
}
template <class Cell, class T, class S>
void launch_of(Launch<BackwardRun>* launch, int blocks) {
  const BackwardMemory<Cell, T, S> memory(nullptr, blocks);
  *launch = {backward_run_kernel<Cell, T, S>, S::kThreads, blocks, S::kRows, memory.bytes};
}

struct Config {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute size{};

  template <class Run>
  Config(const Launch<Run>& launch, int clusters, Stream stream) {
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = unsigned(launch.blocks);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(launch.blocks), unsigned(clusters));
    config.blockDim = dim3(unsigned(launch.threads));
    config.dynamicSmemBytes = launch.shared;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = 1;
  }
};

// How many clusters the current device takes at once; asked once for each.
template <class Run>
int clusters_at_once(const Launch<Run>& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  const auto kernel = reinterpret_cast<const void*>(launch.kernel);
  int device, count = 0;
  if (cudaGetDevice(&device)) return 0;
  const std::lock_guard lock(mutex);
  const auto [entry, asked] = known.try_emplace({device, kernel, launch.blocks}, 0);
  if (asked) {
    const Config config(launch, 1, nullptr);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(launch.shared)) == cudaSuccess &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&count, kernel, &config.config) == cudaSuccess)
      entry->second = count;
    cudaGetLastError();
  }
  return entry->second;
}

template <int Wide, class Run>
bool find(int cell, Storage storage, int64_t units, Launch<Run>* launch) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    found = visit_shape<Cell, Wide>(units, [&](auto shape) {
      using S = decltype(shape);
      const int blocks = blocks_for<S>(units);
      if (storage == Storage::bfloat16)
        launch_of<Cell, __nv_bfloat16, S>(launch, blocks);
      else
        launch_of<Cell, __half, S>(launch, blocks);
    });
  });
  return found;
}

bool hopper() {
  int device, major;
  return !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major >= 9;
}

// Eight rows of the batch to a cluster, or sixteen where the device does not take that many at
// once.
template <class Run>
OnChip choose(int cell, Storage storage, int64_t units, int64_t batch, Launch<Run>* launch) {
  const bool half = storage == Storage::bfloat16 || storage == Storage::float16;
  if (!half || units < 1 || batch < 1 || !hopper()) return {};
  OnChip best;
  for (const int wide : {1, 2}) {
    Launch<Run> found;
    if (!(wide == 1 ? find<1>(cell, storage, units, &found)
                    : find<2>(cell, storage, units, &found)))
      break;
    const int64_t clusters = (batch + found.rows - 1) / found.rows;
    const int at_once = clusters_at_once(found);
    if (!at_once || clusters > 65535) continue;
    best = {found.blocks, int(clusters), found.rows};
    *launch = found;
    if (clusters <= at_once) break;
  }
  return best;
}

template <class Run>
const char* start(int cell, Storage storage, const Run& run, Stream stream) {
  if (run.steps < 1) return nullptr;
  Launch<Run> launch;
  const OnChip chosen = choose<Run>(cell, storage, run.step.units, run.step.batch, &launch);
  if (!chosen.blocks) return "no cluster holds the recurrent weights";
  const Config config(launch, chosen.clusters, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config.config, launch.kernel, run);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

OnChip on_chip(int cell, Storage storage, int64_t units, int64_t batch, bool backward) {
  Launch<ForwardRun> forward;
  Launch<BackwardRun> back;
  return backward ? choose(cell, storage, units, batch, &back)
                  : choose(cell, storage, units, batch, &forward);
}

const char* launch_forward_run(int cell, Storage storage, const ForwardRun& run, Stream stream) {
  return start(cell, storage, run, stream);
}

const char* launch_backward_run(int cell, Storage storage, const BackwardRun& run, Stream stream) {
  return start(cell, storage, run, stream);
}

}  // namespace rnnkern::cuda
