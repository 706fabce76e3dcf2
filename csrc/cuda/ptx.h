// Thin names for the PTX that the persistent kernels use: coordinates of threads and blocks,
// synchronisation, 16 bytes of global memory as one; of Hopper (sm_90) mbarriers and stores into
// the shared memory of other blocks.
// Each function is one instruction or a few; nothing here knows of layers or tiles.
// The tests bring ptx_on_host.h in its place, where every thread is a fiber on the CPU.
#pragma once
#include <cstdint>
#include <cstring>

namespace rnnkern::cuda {

// Four and two 32-bit registers, moved as one 128-bit or 64-bit access.
struct alignas(16) U32x4 {
  uint32_t reg[4];
};
struct alignas(8) U32x2 {
  uint32_t reg[2];
};

}  // namespace rnnkern::cuda

#if defined(__CUDACC__)
#define RNNKERN_UNROLL _Pragma("unroll")
#define RNNKERN_DEVICE_MEMBER __device__ __forceinline__
#else
#define RNNKERN_UNROLL
#define RNNKERN_DEVICE_MEMBER inline
#endif

#if defined(RNNKERN_CUDA_ON_HOST)
#include "ptx_on_host.h"
#else

#define RNNKERN_DEVICE __device__ __forceinline__ static

namespace rnnkern::cuda {

RNNKERN_DEVICE int thread_index() { return int(threadIdx.x); }

// A grid is (blocks of a group, groups, directions).
RNNKERN_DEVICE int block_rank_in_group() { return int(blockIdx.x); }
RNNKERN_DEVICE int blocks_in_group() { return int(gridDim.x); }
RNNKERN_DEVICE int group_in_grid() { return int(blockIdx.y); }

RNNKERN_DEVICE char* dynamic_smem() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

RNNKERN_DEVICE void sync_warp() { __syncwarp(); }
RNNKERN_DEVICE void sync_block() { __syncthreads(); }

RNNKERN_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// 16 bytes of global memory, past the L1, as one access: never half of one store, half of another.
RNNKERN_DEVICE U32x4 load_relaxed(const U32x4* from) {
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 both;\n"
      "ld.relaxed.gpu.global.b128 both, [%2];\n"
      "mov.b128 {%0, %1}, both;\n}\n"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}
RNNKERN_DEVICE void store_relaxed(U32x4* to, const U32x4& value) {
  asm volatile(
      "{\n.reg .b128 both;\n"
      "mov.b128 both, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], both;\n}\n" ::"l"(__cvta_generic_to_global(to)),
      "l"(uint64_t(value.reg[0]) | uint64_t(value.reg[1]) << 32),
      "l"(uint64_t(value.reg[2]) | uint64_t(value.reg[3]) << 32)
      : "memory");
}
// Between two looks at a word that is not yet what is awaited.
RNNKERN_DEVICE void pause_polling(const uint32_t* /*word*/, uint32_t /*mask*/,
                                  uint32_t /*awaited*/) {}

RNNKERN_DEVICE uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// An mbarrier counts the bytes that st_async delivers. A phase ends when the expected number has
// arrived; phases are told apart by their parity, the first is 0. One thread initialises it, then
// sync_cluster() makes it visible to the senders.
RNNKERN_DEVICE void mbarrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Sets the number of bytes of the current phase: once a phase, by one thread.
RNNKERN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity; the bytes it counted are readable then. The
// acquire has CTA scope: cluster scope would also invalidate the L1 cache, which st.async bypasses.
RNNKERN_DEVICE void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(over)
        : "r"(smem_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

// Stores 16 bytes at `to` in the shared memory of a block of the cluster and counts them at its
// `barrier`. Both pointers are this block's own: all blocks have the same carve-up.
RNNKERN_DEVICE void st_async(void* to, uint64_t* barrier, int block, const U32x4& value) {
  asm volatile(
      "{\n.reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[barrier];\n}\n" ::"r"(smem_address(to)),
      "r"(smem_address(barrier)), "r"(block), "r"(value.reg[0]), "r"(value.reg[1]),
      "r"(value.reg[2]), "r"(value.reg[3])
      : "memory");
}

}  // namespace rnnkern::cuda
#endif
