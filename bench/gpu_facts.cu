// What this GPU offers to kernels that stay on the chip, one "name value" per line.
#include <cuda_runtime.h>

#include <cstdio>

namespace {

__global__ void nothing() {}

// Clusters of that many blocks that fit at once, each block with all the shared memory it may have.
int clusters(int blocks, int shared_bytes) {
  const auto kernel = reinterpret_cast<const void*>(nothing);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = unsigned(blocks);
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.attrs = &size;
  config.numAttrs = 1;
  int count = 0;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess ? count : 0;
}

}  // namespace

int main() {
  const struct {
    const char* name;
    cudaDeviceAttr id;
  } attributes[] = {
      {"capability_major", cudaDevAttrComputeCapabilityMajor},
      {"capability_minor", cudaDevAttrComputeCapabilityMinor},
      {"multiprocessors", cudaDevAttrMultiProcessorCount},
      {"shared_bytes_per_block", cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {"shared_bytes_per_multiprocessor", cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {"registers_per_multiprocessor", cudaDevAttrMaxRegistersPerMultiprocessor},
      {"l2_bytes", cudaDevAttrL2CacheSize},
      {"l2_persisting_bytes", cudaDevAttrMaxPersistingL2CacheSize},
      {"cooperative_launch", cudaDevAttrCooperativeLaunch},
      {"cluster_launch", cudaDevAttrClusterLaunch},
  };
  for (const auto& attribute : attributes) {
    int value;
    if (const cudaError_t error = cudaDeviceGetAttribute(&value, attribute.id, 0)) {
      std::fprintf(stderr, "%s: %s\n", attribute.name, cudaGetErrorString(error));
      return 1;
    }
    std::printf("%s %d\n", attribute.name, value);
  }
  int shared, cluster_launch;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(&cluster_launch, cudaDevAttrClusterLaunch, 0);
  for (int blocks = 2; cluster_launch && blocks <= 16; blocks *= 2)
    std::printf("clusters_of_%d %d\n", blocks, clusters(blocks, shared));
}
