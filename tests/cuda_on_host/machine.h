// A simulated chip: the state of one group of blocks, its scheduler, and launch_groups() in place
// of a launch. Every thread is a fiber, all of them in one thread of the CPU. A fiber runs until it
// has to wait. Which one goes on then, and when the stored bytes arrive, is drawn (schedule_seed);
// kernels must be right for every draw. What is undefined on the chip ends the process.
// Included by csrc/cuda/ptx.h, after the register types.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "fiber.h"

namespace rnnkern::cuda {

inline int schedule_seed = 0;  // every number is another interleaving, the same each time

namespace on_host {

enum FiberState {
  kRunning,
  kSyncWarp,
  kSyncBlock,
  kSyncCluster,
  kMbarrierWait,
  kPolling,
  kMma,
  kReturned,
  kStateCount
};
constexpr const char* kNames[kStateCount] = {"running",      "sync_warp",     "sync_block",
                                             "sync_cluster", "mbarrier_wait", "polling",
                                             "mma_sync",     "returned"};

// The 64 bits of an mbarrier. 0xFF in all bytes, as at the start, is not an initialised one.
struct [[gnu::may_alias]] Mbarrier {
  int32_t bytes;
  uint16_t arrivals, phase;
};

struct Fiber {
  int block = 0, thread = 0;
  FiberState state = kRunning;
  const uint16_t* phase = nullptr;  // what it waits for: that the phase of this parity is over
  unsigned parity = 0;
  const uint32_t* word = nullptr;  // or: that this word of global memory is `awaited` where masked
  uint32_t mask = 0, awaited = 0;
  Context context{};

  bool ready() const {
    if (state == kPolling) return (*word & mask) == awaited;
    return state == kRunning || (state != kReturned && *phase % 2 != parity);
  }
};

// Threads which wait for each other. Those that have returned are not waited for.
struct Rendezvous {
  int live, arrived = 0;
  uint16_t phase = 0;

  void add(int threads, int arrivals) {
    live += threads;
    arrived += arrivals;
    if (arrived == live) arrived = 0, ++phase;
  }
};

struct Warp {
  Rendezvous sync{32}, product{32};
  uint32_t pace = 0;  // how often it gets a turn, of 256
  U32x4 a[32]{};
  U32x2 b[32]{};
  float acc[32][4]{};
};

struct Block {
  Rendezvous sync;
  char* memory;
};

struct Message {
  int block;
  size_t to, barrier;  // offsets in shared memory
  U32x4 value;
  U32x4* global = nullptr;  // instead: where in global memory
};

struct Machine {
  std::mutex busy;
  std::function<void()> body;
  int group = 0;
  size_t smem_bytes;
  uint64_t random;
  std::vector<char*> stacks, memories;  // their ends; kept from one launch to the next
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Rendezvous sync;
  std::vector<Message> in_flight;
  Fiber* running = nullptr;  // null in the scheduler
  Context scheduler{};
};
inline Machine machine;

inline Fiber& self() { return *machine.running; }
inline Block& block() { return machine.blocks[self().block]; }
inline Warp& warp() { return machine.warps[(&self() - machine.fibers.data()) / 32]; }

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  fprintf(stderr, "simulated chip: group %d, seed %d, ", machine.group, schedule_seed);
  if (const Fiber* f = machine.running)
    fprintf(stderr, "block %d thread %d: ", f->block, f->thread);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  abort();
}

// A number below n.
inline size_t random_below(size_t n) {
  uint64_t x = machine.random += 0x9E3779B97F4A7C15;  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return size_t(((x >> 32) * n) >> 32);
}

// Others have their turn, and this thread when it is ready again.
inline void suspend(FiberState state, const uint16_t* phase = nullptr, unsigned parity = 0) {
  self().phase = phase;
  self().parity = parity;
  self().state = state;
  switch_context(self().context, machine.scheduler);
}

// Between two effects of a thread, others get a turn now and then.
inline void maybe_yield() {
  if (random_below(8) == 0) suspend(kRunning);
}

// The last to arrive pauses as the others do: it has no head start.
inline void arrive_and_wait(Rendezvous& group, FiberState state) {
  const unsigned parity = group.phase % 2;
  group.add(0, 1);
  suspend(state, &group.phase, parity);
}

inline void fiber_main() {
  machine.body();
  warp().sync.add(-1, 0);
  block().sync.add(-1, 0);
  machine.sync.add(-1, 0);
  suspend(kReturned);
}

// Where p is in this block's shared memory.
inline size_t smem_offset(const void* p, size_t bytes, const char* what) {
  const size_t at = uintptr_t(p) - uintptr_t(block().memory);  // huge if p is before
  if (at >= machine.smem_bytes || at + bytes > machine.smem_bytes || at % bytes)
    fail("%s at %p: not aligned by %zu, or not in the %zu bytes of shared memory from %p", what, p,
         bytes, machine.smem_bytes, static_cast<void*>(block().memory));
  return at;
}

inline void update_tx(Mbarrier& b, int64_t bytes, int arrivals) {
  if (b.arrivals > 1) fail("the barrier at %p was never initialised", static_cast<void*>(&b));
  if (b.arrivals < arrivals) fail("mbarrier_arrive_expect_tx() twice in one phase");
  const int64_t pending = b.bytes + bytes;
  if (std::abs(pending) >= 1 << 20) fail("more bytes pending than a barrier counts: 2^20 - 1");
  b.bytes = int32_t(pending);
  b.arrivals -= uint16_t(arrivals);
  if (b.bytes == 0 && b.arrivals == 0) ++b.phase, b.arrivals = 1;
}

inline Mbarrier& mbarrier_at(uint64_t* barrier) {
  return *reinterpret_cast<Mbarrier*>(block().memory + smem_offset(barrier, 8, "barrier"));
}

inline void deliver(size_t messages) {
  for (; messages; --messages) {
    std::swap(machine.in_flight[random_below(machine.in_flight.size())], machine.in_flight.back());
    const Message m = machine.in_flight.back();
    machine.in_flight.pop_back();
    if (m.global) {
      *m.global = m.value;
      continue;
    }
    const Block& block = machine.blocks[m.block];
    if (!block.sync.live) fail("sent to block %d, whose threads have all returned", m.block);
    memcpy(block.memory + m.to, &m.value, sizeof m.value);
    update_tx(*reinterpret_cast<Mbarrier*>(block.memory + m.barrier), -int(sizeof m.value), 0);
  }
}

// Gives each warp a turn. Unless `all`, some are passed over. False if no fiber could run.
inline bool schedule_round(std::vector<size_t>& order, bool all) {
  bool progress = false;
  for (size_t left = order.size(); left; --left) {
    std::swap(order[left - 1], order[random_below(left)]);
    const size_t warp = order[left - 1];
    if (!all && random_below(256) >= machine.warps[warp].pace) continue;
    const size_t first = random_below(32), stride = 2 * random_below(16) + 1;
    bool ran = true;
    for (size_t passes = 1 + random_below(16); ran && passes; --passes) {
      ran = false;
      for (size_t i = 0; i < 32; ++i) {
        Fiber& fiber = machine.fibers[warp * 32 + (first + i * stride) % 32];
        if (!fiber.ready()) continue;
        fiber.state = kRunning;
        machine.running = &fiber;
        switch_context(machine.scheduler, fiber.context);
        machine.running = nullptr;
        ran = progress = true;
      }
    }
  }
  return progress;
}

[[noreturn]] inline void fail_deadlock() {
  std::vector<int> in(machine.blocks.size() * kStateCount);
  for (const Fiber& fiber : machine.fibers) ++in[fiber.block * kStateCount + fiber.state];
  for (size_t i = 0; i < in.size(); ++i) {
    if (i % kStateCount == 0) fprintf(stderr, "simulated chip: block %zu:", i / kStateCount);
    if (in[i]) fprintf(stderr, " %d %s", in[i], kNames[i % kStateCount]);
    if (i % kStateCount == kStateCount - 1) fputc('\n', stderr);
  }
  fail("deadlock");
}

inline void simulate_group() {
  std::vector<size_t> order(machine.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  bool late = false;
  for (size_t round = 0; machine.sync.live; ++round) {
    // A slow warp runs, and a late message comes, only when nothing else happens: a race shows
    // where one thread is far behind the others rather than where all keep pace.
    if (round % 32 == 0) {
      constexpr uint32_t kPaces[] = {0, 32, 256, 256};
      for (Warp& warp : machine.warps) warp.pace = kPaces[random_below(4)];
      late = random_below(2);
    }
    const bool progress = schedule_round(order, false);
    const size_t sent = machine.in_flight.size();
    if (progress) {
      if (!late) deliver(random_below(sent + 1));
    } else if (sent && random_below(2)) {
      deliver(1 + random_below(sent));
    } else if (!schedule_round(order, true)) {
      if (!sent) fail_deadlock();
      deliver(1 + random_below(sent));
    }
  }
  deliver(machine.in_flight.size());  // fails if it is to shared memory: there is nobody left
}

}  // namespace on_host

// Calls body() in each thread of a grid (blocks, groups), one group after the other.
template <class F>
void launch_groups(int blocks, int groups, int threads, size_t smem_bytes, F&& body) {
  using namespace on_host;
  const std::lock_guard lock(machine.busy);
  if (blocks < 1 || blocks > 132 || threads < 1 || threads > 1024 || threads % 32 ||
      smem_bytes > 227 << 10)
    fail("no launch of %d blocks of %d threads with %zu bytes", blocks, threads, smem_bytes);
  machine.body = std::ref(body);
  machine.smem_bytes = smem_bytes;
  machine.random = uint64_t(schedule_seed) << 32;
  const size_t fibers = size_t(blocks) * threads;
  while (machine.stacks.size() < fibers) machine.stacks.push_back(map_pages(kPages));
  while (machine.memories.size() < size_t(blocks))
    machine.memories.push_back(map_pages(4 * kPages));

  for (machine.group = 0; machine.group < groups; ++machine.group) {
    machine.sync = {int(fibers)};
    machine.warps.assign(fibers / 32, {});
    machine.blocks.clear();
    for (int i = 0; i < blocks; ++i) {
      // The end of the pages, so that nothing can be written behind it.
      const size_t bytes = (smem_bytes + 127) / 128 * 128;
      machine.blocks.push_back({{threads}, machine.memories[i] - bytes});
      memset(machine.blocks[i].memory, 0xFF, bytes);
    }
    machine.fibers.resize(fibers);
    for (size_t i = 0; i < fibers; ++i) {
      Fiber& fiber = machine.fibers[i] = {int(i / threads), int(i % threads)};
      // Stacks of one warp must not all fall into the same few sets of the cache.
      const size_t shift = i % 32 * 128;
      prepare(fiber.context, machine.stacks[i] - shift, kPages - shift, fiber_main);
    }
    simulate_group();
  }
}

}  // namespace rnnkern::cuda
