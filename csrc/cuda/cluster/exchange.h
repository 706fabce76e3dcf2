// The exchange of a cluster: in every step each block stores what the others need directly into
// their shared memory, and an mbarrier there counts the bytes. Clusters do not communicate.
//
//   forward, h:                                 backward, parts of W_hh^T dgates:
//
//   block 0   block 1   block 2                 block 0   block 1   block 2
//   owns u0   owns u1   owns u2                 dgates 0  dgates 1  dgates 2
//     |  \    / |  \    / |                       |  each multiplies its rows of W_hh by its own
//     |   all to all, T   |                       |  dgates, for the units of all blocks
//     v         v         v                       v         v         v
//   h u0 u1 u2 in every block                   block b: dh(ub) = part 0 + part 1 + part 2,
//   (B operand of the next step)                always added in this order
//
// Two buffers, each with an mbarrier, used by steps in turn:
//
//   step i    wait(i) for the bytes of buffer i % 2, compute, put() into buffer (i + 1) % 2
//
// No block can overwrite what another still reads. A block puts into buffer (i + 1) % 2, which its
// neighbour read in step i - 1, only after that neighbour's values for step i have arrived, and the
// neighbour sends those after it has read.
#pragma once
#include "../ptx.h"
#include "config.h"

namespace rnnkern::cuda {

struct Exchange {
  uint64_t* mbarriers;  // of the two buffers
  int blocks;           // of the cluster
  int bytes;            // that a buffer receives in a step

  // Sets up both buffers; afterwards every block of the cluster has.
  RNNKERN_DEVICE_MEMBER void init() const {
    if (thread_index() == 0)
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(mbarriers + i);
        mbarrier_arrive_expect_tx(mbarriers + i, uint32_t(bytes));
      }
    sync_cluster();
  }

  // Waits for what was put for step i > 0. A block alone puts by plain stores.
  RNNKERN_DEVICE_MEMBER void wait(int64_t i) const {
    if (blocks == 1) return sync_block();
    const auto step = uint32_t(i);
    mbarrier_wait_parity(mbarriers + step % 2, (step - 1) / 2 % 2);
    if (thread_index() == 0) mbarrier_arrive_expect_tx(mbarriers + step % 2, uint32_t(bytes));
  }

  // Stores 16 bytes in a buffer of another block, or of this one.
  RNNKERN_DEVICE_MEMBER void put(void* to, int buffer, int block, const U32x4& value) const {
    st_async(to, mbarriers + buffer, block, value);
  }
};

}  // namespace rnnkern::cuda
