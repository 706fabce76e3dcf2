// The exchange of a group of one block, through its shared memory, and where in shared memory every
// exchange leaves its values. An exchange is one type for both passes:
//
//   init()                  after the first loads
//   send_h, send_dh         puts a warp's values for the next step on their way
//   receive_h, receive_dh   waits for what all blocks have sent for a step
//   finish()                before the kernel ends
//
// kHBuffers and kDhBuffers say how many buffers of shared memory these need.
#pragma once
#include "../ptx.h"
#include "fragments.h"

namespace rnnkern::cuda {

// Which of two buffers step i reads.
RNNKERN_DEVICE int buffer_of(int64_t i) { return int(i) & 1; }

// A warp's 32 values of h, to their place in shared memory.
template <class T>
RNNKERN_DEVICE void put_h(T* to, const T* staged) {
  const int lane = thread_index() % kWarpSize;
  if (lane < kWarpSize / kElemsPerVector<T>)
    reinterpret_cast<U32x4*>(to)[lane] = reinterpret_cast<const U32x4*>(staged)[lane];
}

// Sums of a block's units: that of a sender, by number, begin at dh_sums(); a lane's four of a
// tile.
template <class Config>
RNNKERN_DEVICE int dh_sums(int sender, int tile) {
  return sender * Config::kBlockElems + tile * kElemsPerTile;
}
template <class Config>
RNNKERN_DEVICE U32x4* dh_vector(float* sums, int sender, int tile) {
  return reinterpret_cast<U32x4*>(sums + dh_sums<Config>(sender, tile)) +
         acc_vector(thread_index() % kWarpSize);
}

// Backward, warps that share K are the senders. One buffer each: between reading it and filling it
// again a step has a barrier of its own.
template <class T, class Config>
struct BlockExchange {
  static constexpr int kHBuffers = 1, kDhBuffers = 1, kBarriers = 0;
  static constexpr int kMaxSenders = Config::kBackwardSplitK;

  RNNKERN_DEVICE_MEMBER BlockExchange(uint64_t* /*barriers*/, void* /*memory*/, int /*sent*/) {}

  RNNKERN_DEVICE_MEMBER void init() const { sync_block(); }
  RNNKERN_DEVICE_MEMBER void receive_h(T* /*h*/, int64_t /*i*/) const { sync_block(); }
  RNNKERN_DEVICE_MEMBER void send_h(T* h, int64_t /*i*/, int first, const T* staged) const {
    put_h(h + first, staged);
  }
  RNNKERN_HD static int senders(int /*blocks*/) { return kMaxSenders; }
  RNNKERN_DEVICE_MEMBER void receive_dh(float* /*sums*/, int64_t /*i*/) const { sync_block(); }
  RNNKERN_DEVICE_MEMBER void send_dh(float* sums, int64_t /*i*/, int /*block*/, int tile,
                                     const U32x4& value) const {
    const int part = thread_index() / kWarpSize / Config::kLayerTiles;
    *dh_vector<Config>(sums, part, tile) = value;
  }
  RNNKERN_DEVICE_MEMBER void finish() const {}
};

}  // namespace rnnkern::cuda
