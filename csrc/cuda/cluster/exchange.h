// The exchange of a cluster: in every step each block stores what the others need directly into
// their shared memory, and an mbarrier there counts the bytes. Clusters do not communicate.
//
// Forward: a block computes h of its units and sends it to every block, itself included.
//
//   sender    to block 0          to block 1          to block 2
//   block 0   h of units of 0     h of units of 0     h of units of 0
//   block 1   h of units of 1     h of units of 1     h of units of 1
//   block 2   h of units of 2     h of units of 2     h of units of 2
//             = B operand of the next step, complete in every block
//
// Backward: a block multiplies its rows of W_hh, transposed, by its own dgates. That is one term of
// dh for all units; each part goes to the block that owns the units.
//
//   sender    to block 0          to block 1          to block 2
//   block 0   dh of units of 0    dh of units of 1    dh of units of 2
//   block 1   dh of units of 0    dh of units of 1    dh of units of 2
//   block 2   dh of units of 0    dh of units of 1    dh of units of 2
//             + over the senders, always in this order: deterministic
//
// Each block has two buffers with an mbarrier each. Step i reads one and fills the other:
//
//   step         0            1            2            3
//   reads        initial      buffer 1     buffer 0     buffer 1      wait(i): buffer i % 2
//   puts into    buffer 1     buffer 0     buffer 1     buffer 0      put(): buffer (i + 1) % 2
//
// No block overwrites what another still reads. Buffer (i + 1) % 2 of a neighbour was read by it in
// step i - 1. A block puts into it in step i, after wait(i): the neighbour's values for step i have
// come, and the neighbour sent them after it had read.
#pragma once
#include "../ptx.h"
#include "config.h"

namespace rnnkern::cuda {

struct Exchange {
  uint64_t* mbarriers;  // of the two buffers
  int blocks;           // of the cluster
  int bytes;            // that a buffer receives in a step

  // Sets up both buffers. On return every block of the cluster has.
  RNNKERN_DEVICE_MEMBER void init() const {
    if (thread_index() == 0)
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(mbarriers + i);
        mbarrier_arrive_expect_tx(mbarriers + i, uint32_t(bytes));
      }
    sync_cluster();
  }

  // Waits for what was put for step i > 0. With one block, puts are plain stores.
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
