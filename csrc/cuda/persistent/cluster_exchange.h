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
//   reads        initial      buffer 1     buffer 0     buffer 1      receive(i): buffer i % 2
//   puts into    buffer 1     buffer 0     buffer 1     buffer 0      send(i + 1): the other
//
// No block overwrites what another still reads. Buffer (i + 1) % 2 of a neighbour was read by it in
// step i - 1. A block puts into it in step i, after receive(i): the neighbour's values for step i
// have come, and the neighbour sent them after it had read.
#pragma once
#include "block_exchange.h"

namespace rnnkern::cuda {

template <class T, class Config>
struct ClusterExchange {
  static constexpr int kHBuffers = 2, kDhBuffers = 2, kBarriers = 2;
  static constexpr int kMaxSenders = kMaxClusterSize;

  uint64_t* mbarriers;  // of the two buffers
  int blocks;           // of the cluster
  int bytes;            // that a buffer receives in a step

  // `sent`: bytes of an element that is exchanged.
  RNNKERN_DEVICE_MEMBER ClusterExchange(uint64_t* barriers, void* /*memory*/, int sent)
      : mbarriers(barriers),
        blocks(blocks_in_group()),
        bytes(blocks * Config::kBlockElems * sent) {}

  // Sets up both buffers. On return every block of the cluster has.
  RNNKERN_DEVICE_MEMBER void init() const {
    if (thread_index() == 0)
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(mbarriers + i);
        mbarrier_arrive_expect_tx(mbarriers + i, uint32_t(bytes));
      }
    sync_cluster();
  }

  // With one block, sending is a plain store.
  RNNKERN_DEVICE_MEMBER void wait(int64_t i) const {
    if (blocks == 1) return sync_block();
    const auto step = uint32_t(i);
    mbarrier_wait_parity(mbarriers + step % 2, (step - 1) / 2 % 2);
    if (thread_index() == 0) mbarrier_arrive_expect_tx(mbarriers + step % 2, uint32_t(bytes));
  }

  // h of all units for step i > 0, in buffer i % 2.
  RNNKERN_DEVICE_MEMBER void receive_h(T* /*h*/, int64_t i) const { wait(i); }

  // A warp's 32 values of h for step i go out together, in vectors of 16 bytes, to every block.
  RNNKERN_DEVICE_MEMBER void send_h(T* h, int64_t i, int first, const T* staged) const {
    constexpr int kVectors = kWarpSize / kElemsPerVector<T>, kBlocksAtOnce = kWarpSize / kVectors;
    T* const of_warp = h + buffer_of(i) * Config::kGroupElems + first;
    if (blocks == 1) return put_h(of_warp, staged);
    const int lane = thread_index() % kWarpSize, vector = lane % kVectors;
    const U32x4 value = reinterpret_cast<const U32x4*>(staged)[vector];
    T* const to = of_warp + vector * kElemsPerVector<T>;
    RNNKERN_UNROLL
    for (int other = 0; other < kMaxClusterSize; other += kBlocksAtOnce)
      if (const int block = other + lane / kVectors; block < blocks)
        st_async(to, mbarriers + buffer_of(i), block, value);
  }

  // Sums that the senders have for the block, for step i > 0: in buffer i % 2 of `sums`.
  RNNKERN_HD static int senders(int of_group) { return of_group; }
  RNNKERN_DEVICE_MEMBER void receive_dh(float* /*sums*/, int64_t i) const { wait(i); }

  // A lane's four sums of a tile, for the block that owns its units.
  RNNKERN_DEVICE_MEMBER void send_dh(float* sums, int64_t i, int block, int tile,
                                     const U32x4& value) const {
    U32x4* const to = dh_vector<Config>(sums, buffer_of(i) * blocks + block_rank_in_group(), tile);
    if (blocks == 1)
      *to = value;
    else
      st_async(to, mbarriers + buffer_of(i), block, value);
  }

  // No block may end while others still put into its shared memory.
  RNNKERN_DEVICE_MEMBER void finish() const { sync_cluster(); }
};

}  // namespace rnnkern::cuda
