// What the persistent kernels (cluster.h) ask of the chip: who a thread is, waiting, stores into
// the shared memory of other blocks, matrix products. PTX of Hopper (sm_90) on a GPU; the tests
// bring their own in its place, where every thread is a fiber (tests/cuda_on_host/chip_on_host.h).
#pragma once
#include <cstdint>
#include <cstring>

namespace rnnkern::cuda {

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
#include "chip_on_host.h"
#else

#define RNNKERN_DEVICE __device__ __forceinline__ static

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rnnkern::cuda {

RNNKERN_DEVICE int thread_index() { return int(threadIdx.x); }

// A grid is (blocks of a cluster, clusters).
RNNKERN_DEVICE int block_rank_in_cluster() { return int(blockIdx.x); }
RNNKERN_DEVICE int blocks_in_cluster() { return int(gridDim.x); }
RNNKERN_DEVICE int cluster_id_in_grid() { return int(blockIdx.y); }

// The block's dynamic shared memory.
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

RNNKERN_DEVICE uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// A barrier in shared memory counts the bytes that arrive by st_async(). One phase is over when as
// many have come as were expected; phases are told apart by their parity, the first is 0. One
// thread opens it, and before the others use it all blocks wait for each other (sync_cluster).
RNNKERN_DEVICE void mbarrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Says how many bytes the current phase is to get: once for each phase, by one thread.
RNNKERN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity; what was sent can be read then. (To acquire for
// the whole cluster would throw away the first-level cache as well, which what is sent does not
// touch.)
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

// Stores 16 bytes to where `to` is in a block of the cluster, and counts them at its `barrier`;
// both are given as addresses in this block's own shared memory.
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

// sum += a b for a warp: a is 16 x 16, b 16 x 8, their elements two to a register as PTX lays them
// out (mma.m16n8k16): with g = lane / 4 and q = lane % 4,
//   a   rows g, g + 8, g, g + 8 of columns 2q, 2q + 1 (words 0, 1) and 2q + 8, 2q + 9 (words 2, 3)
//   b   column g of rows 2q, 2q + 1 and 2q + 8, 2q + 9
//   sum row g of columns 2q, 2q + 1, then row g + 8
// For float a is 16 x 8, b 8 x 8 and each element a register (mma.m16n8k8): columns of a, and rows
// of b, q and q + 4.
template <class T>
RNNKERN_DEVICE void mma_sync(float (&sum)[4], const U32x4& a, const U32x2& b);

#define RNNKERN_MMA(T, MMA)                                                                      \
  template <>                                                                                    \
  __device__ __forceinline__ void mma_sync<T>(float (&sum)[4], const U32x4& a, const U32x2& b) { \
    asm("mma.sync.aligned." MMA                                                                  \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                 \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                 \
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]),             \
          "r"(b.reg[1]));                                                                        \
  }
RNNKERN_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16")
RNNKERN_MMA(__half, "m16n8k16.row.col.f32.f16.f16")
RNNKERN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32")
#undef RNNKERN_MMA

}  // namespace rnnkern::cuda
#endif

namespace rnnkern::cuda {

// A right operand, ready for products.
template <class T>
struct BFragment {
  U32x2 regs;

  RNNKERN_DEVICE_MEMBER explicit BFragment(const U32x2& w) : regs(w) {}
};

template <class T>
RNNKERN_DEVICE void mma(float (&sum)[4], const U32x4& a, const BFragment<T>& b) {
  mma_sync<T>(sum, a, b.regs);
}

// Matrix units take 11 significant bits of a float (TF32). Split in two such parts, and without the
// product of both lower parts, a product is right to about 2^-22.
RNNKERN_DEVICE void split_tf32(uint32_t reg, uint32_t* high, uint32_t* low) {
  *high = (reg + 0x1000u) & 0xffffe000u;
  float whole, upper;
  memcpy(&whole, &reg, 4);
  memcpy(&upper, high, 4);
  const float rest = whole - upper;
  memcpy(low, &rest, 4);
}

template <>
struct BFragment<float> {
  U32x2 high, low;

  RNNKERN_DEVICE_MEMBER explicit BFragment(const U32x2& w) {
    RNNKERN_UNROLL
    for (int i = 0; i < 2; ++i) split_tf32(w.reg[i], &high.reg[i], &low.reg[i]);
  }
};

RNNKERN_DEVICE void mma(float (&sum)[4], const U32x4& a, const BFragment<float>& b) {
  U32x4 high, low;
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) split_tf32(a.reg[i], &high.reg[i], &low.reg[i]);
  // Matrix units cut off what they add; so the long sum is made outside, where it is rounded.
  float part[4] = {};
  mma_sync<float>(part, low, b.high);
  mma_sync<float>(part, high, b.low);
  mma_sync<float>(part, high, b.high);
  RNNKERN_UNROLL
  for (int i = 0; i < 4; ++i) sum[i] += part[i];
}

}  // namespace rnnkern::cuda
