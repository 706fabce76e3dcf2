// The functions of csrc/cuda/ptx.h on the simulated chip of machine.h.
#pragma once
#include "machine.h"

#define RNNKERN_DEVICE inline static

namespace rnnkern::cuda {

RNNKERN_DEVICE int thread_index() { return on_host::self().thread; }
RNNKERN_DEVICE int block_rank_in_group() { return on_host::self().block; }
RNNKERN_DEVICE int blocks_in_group() { return int(on_host::machine.blocks.size()); }
RNNKERN_DEVICE int group_in_grid() { return on_host::machine.group; }
RNNKERN_DEVICE char* dynamic_smem() { return on_host::block().memory; }

RNNKERN_DEVICE void sync_warp() {
  on_host::arrive_and_wait(on_host::warp().sync, on_host::kSyncWarp);
}
RNNKERN_DEVICE void sync_block() {
  on_host::arrive_and_wait(on_host::block().sync, on_host::kSyncBlock);
}
RNNKERN_DEVICE void sync_cluster() {
  on_host::arrive_and_wait(on_host::machine.sync, on_host::kSyncCluster);
}

RNNKERN_DEVICE U32x4 load_relaxed(const U32x4* from) {
  on_host::maybe_yield();
  return *from;
}
RNNKERN_DEVICE void store_relaxed(U32x4* to, const U32x4& value) {
  on_host::maybe_yield();
  if (uintptr_t(to) % sizeof value) on_host::fail("store_relaxed() at %p", static_cast<void*>(to));
  on_host::machine.in_flight.push_back({0, 0, 0, value, to});
}
RNNKERN_DEVICE void pause_polling(const uint32_t* word, uint32_t mask, uint32_t awaited) {
  on_host::self().word = word;
  on_host::self().mask = mask;
  on_host::self().awaited = awaited;
  on_host::suspend(on_host::kPolling);
}

RNNKERN_DEVICE void mbarrier_init(uint64_t* barrier) {
  on_host::mbarrier_at(barrier) = {.bytes = 0, .arrivals = 1, .phase = 0};
}

RNNKERN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  on_host::maybe_yield();
  on_host::update_tx(on_host::mbarrier_at(barrier), bytes, 1);
}

RNNKERN_DEVICE void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
  if (parity > 1) on_host::fail("mbarrier_wait_parity() for parity %u", parity);
  on_host::Mbarrier& b = on_host::mbarrier_at(barrier);
  on_host::update_tx(b, 0, 0);  // checks that it is initialised
  on_host::suspend(on_host::kMbarrierWait, &b.phase, parity);
}

RNNKERN_DEVICE void st_async(void* to, uint64_t* barrier, int block, const U32x4& value) {
  on_host::maybe_yield();
  if (block < 0 || block >= blocks_in_group()) on_host::fail("st_async() to block %d", block);
  on_host::machine.in_flight.push_back({block, on_host::smem_offset(to, sizeof value, "target"),
                                        on_host::smem_offset(barrier, sizeof *barrier, "barrier"),
                                        value});
}

}  // namespace rnnkern::cuda
