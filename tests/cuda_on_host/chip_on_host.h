// The functions of csrc/cuda/chip.h without a GPU, and run_clusters() in place of a launch. Every
// thread of a cluster is a fiber, all of them in one thread of the CPU. A fiber runs until it has
// to wait; who goes on then, and when the sent bytes arrive, is left to chance (delivery_seed), and
// kernels must be right whatever the outcome. What is undefined on the chip ends the process.
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

#define RNNKERN_DEVICE inline static

namespace rnnkern::cuda {

inline int delivery_seed = 0;  // every number is another interleaving, the same each time

namespace on_host {

enum In { kRunning, kSyncWarp, kSyncBlock, kSyncCluster, kWait, kMultiply, kReturned, kIns };
constexpr const char* kNames[kIns] = {"running", "sync_warp",          "sync_block", "sync_cluster",
                                      "wait",    "multiply_fragments", "returned"};

// What is in the 64 bits of a barrier. 0xFF in all bytes, as at the start, is not an open one.
struct [[gnu::may_alias]] Barrier {
  int32_t bytes;
  uint16_t arrivals, phase;
};

struct Fiber {
  int block = 0, thread = 0;
  In in = kRunning;
  const uint16_t* phase = nullptr;  // what it waits for: that the phase of this parity is over
  unsigned parity = 0;
  Context context{};

  bool ready() const { return in == kRunning || (in != kReturned && *phase % 2 != parity); }
};

// Threads which wait for each other. Those that have returned are not waited for.
struct Group {
  int live, arrived = 0;
  uint16_t phase = 0;

  void add(int threads, int arrivals) {
    live += threads;
    arrived += arrivals;
    if (arrived == live) arrived = 0, ++phase;
  }
};

struct Warp {
  Group sync{32}, product{32};
  uint32_t pace = 0;  // how often it gets a turn, of 256
  Words4 a[32]{};
  Words2 b[32]{};
  float sum[32][4]{};
};

struct Block {
  Group sync;
  char* memory;
};

struct Message {
  int block;
  size_t to, barrier;  // offsets in shared memory
  Words4 value;
};

struct Machine {
  std::mutex busy;
  std::function<void()> body;
  int cluster = 0;
  size_t shared_bytes;
  uint64_t random;
  std::vector<char*> stacks, memories;  // their ends; kept from one launch to the next
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Group sync;
  std::vector<Message> sent;
  Fiber* running = nullptr;  // null in the scheduler
  Context scheduler{};
};
inline Machine machine;

inline Fiber& self() { return *machine.running; }
inline Block& block() { return machine.blocks[self().block]; }
inline Warp& warp() { return machine.warps[(&self() - machine.fibers.data()) / 32]; }

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  fprintf(stderr, "chip_on_host: cluster %d, seed %d, ", machine.cluster, delivery_seed);
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
inline size_t draw(size_t n) {
  uint64_t x = machine.random += 0x9E3779B97F4A7C15;  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return size_t(((x >> 32) * n) >> 32);
}

// Others have their turn, and this thread when it is ready again.
inline void suspend(In in, const uint16_t* phase = nullptr, unsigned parity = 0) {
  self().phase = phase;
  self().parity = parity;
  self().in = in;
  switch_context(self().context, machine.scheduler);
}

// Between two effects of a thread, others get a turn now and then.
inline void perhaps_pause() {
  if (draw(8) == 0) suspend(kRunning);
}

// The last to arrive pauses as the others do: it has no head start.
inline void meet(Group& group, In in) {
  const unsigned parity = group.phase % 2;
  group.add(0, 1);
  suspend(in, &group.phase, parity);
}

inline void enter() {
  machine.body();
  warp().sync.add(-1, 0);
  block().sync.add(-1, 0);
  machine.sync.add(-1, 0);
  suspend(kReturned);
}

// Where p is in this block's shared memory.
inline size_t offset(const void* p, size_t bytes, const char* what) {
  const size_t at = uintptr_t(p) - uintptr_t(block().memory);  // huge if p is before
  if (at >= machine.shared_bytes || at + bytes > machine.shared_bytes || at % bytes)
    fail("%s at %p: not aligned by %zu, or not in the %zu bytes of shared memory from %p", what, p,
         bytes, machine.shared_bytes, static_cast<void*>(block().memory));
  return at;
}

inline void count(Barrier& b, int64_t bytes, int arrivals) {
  if (b.arrivals > 1) fail("the barrier at %p was never opened", static_cast<void*>(&b));
  if (b.arrivals < arrivals) fail("expect() twice in one phase");
  const int64_t pending = b.bytes + bytes;
  if (std::abs(pending) >= 1 << 20) fail("more bytes pending than a barrier counts: 2^20 - 1");
  b.bytes = int32_t(pending);
  b.arrivals -= uint16_t(arrivals);
  if (b.bytes == 0 && b.arrivals == 0) ++b.phase, b.arrivals = 1;
}

inline Barrier& at(uint64_t* barrier) {
  return *reinterpret_cast<Barrier*>(block().memory + offset(barrier, 8, "barrier"));
}

inline void deliver(size_t messages) {
  for (; messages; --messages) {
    std::swap(machine.sent[draw(machine.sent.size())], machine.sent.back());
    const Message m = machine.sent.back();
    machine.sent.pop_back();
    const Block& block = machine.blocks[m.block];
    if (!block.sync.live) fail("sent to block %d, whose threads have all returned", m.block);
    memcpy(block.memory + m.to, &m.value, sizeof m.value);
    count(*reinterpret_cast<Barrier*>(block.memory + m.barrier), -int(sizeof m.value), 0);
  }
}

// Gives each warp a turn. Unless `all`, some are passed over. False if no fiber could run.
inline bool go_round(std::vector<size_t>& order, bool all) {
  bool progress = false;
  for (size_t left = order.size(); left; --left) {
    std::swap(order[left - 1], order[draw(left)]);
    const size_t warp = order[left - 1];
    if (!all && draw(256) >= machine.warps[warp].pace) continue;
    const size_t first = draw(32), stride = 2 * draw(16) + 1;
    bool ran = true;
    for (size_t passes = 1 + draw(16); ran && passes; --passes) {
      ran = false;
      for (size_t i = 0; i < 32; ++i) {
        Fiber& fiber = machine.fibers[warp * 32 + (first + i * stride) % 32];
        if (!fiber.ready()) continue;
        fiber.in = kRunning;
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
  std::vector<int> in(machine.blocks.size() * kIns);
  for (const Fiber& fiber : machine.fibers) ++in[fiber.block * kIns + fiber.in];
  for (size_t i = 0; i < in.size(); ++i) {
    if (i % kIns == 0) fprintf(stderr, "chip_on_host: block %zu:", i / kIns);
    if (in[i]) fprintf(stderr, " %d %s", in[i], kNames[i % kIns]);
    if (i % kIns == kIns - 1) fputc('\n', stderr);
  }
  fail("deadlock");
}

inline void run_cluster() {
  std::vector<size_t> order(machine.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  bool late = false;
  for (size_t round = 0; machine.sync.live; ++round) {
    // A slow warp runs, and a late message comes, only when nothing else happens: a race shows
    // where one thread is far behind the others rather than where all keep pace.
    if (round % 32 == 0) {
      constexpr uint32_t kPaces[] = {0, 32, 256, 256};
      for (Warp& warp : machine.warps) warp.pace = kPaces[draw(4)];
      late = draw(2);
    }
    const bool progress = go_round(order, false);
    const size_t sent = machine.sent.size();
    if (progress) {
      if (!late) deliver(draw(sent + 1));
    } else if (sent && draw(2)) {
      deliver(1 + draw(sent));
    } else if (!go_round(order, true)) {
      if (!sent) fail_deadlock();
      deliver(1 + draw(sent));
    }
  }
  if (!machine.sent.empty()) deliver(1);  // which fails: there is nobody left
}

// sum += a b of all lanes, laid out as chip.h says.
template <class T>
void multiply(Warp& warp) {
  using Row [[gnu::vector_size(32)]] = float;
  constexpr int P = 4 / int(sizeof(T));  // elements of a word
  const auto element = [](uint32_t word, int i) {
    if constexpr (sizeof(T) == 4) {
      word &= 0xffffe000u;  // of a float the matrix units take 11 significant bits
      float value;
      memcpy(&value, &word, sizeof value);
      return value;
    } else {
      const auto bits = uint16_t(word >> 16 * i);
      T value;
      memcpy(&value, &bits, sizeof value);
      return static_cast<float>(value);
    }
  };
  float a[16][8 * P];
  Row b[8 * P], sum[16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4 * P; ++i)
      a[g + i / P % 2 * 8][q * P + i / P / 2 * 4 * P + i % P] =
          element(warp.a[lane].word[i / P], i % P);
    for (int i = 0; i < 2 * P; ++i)
      b[q * P + i / P * 4 * P + i % P][g] = element(warp.b[lane].word[i / P], i % P);
    for (int i = 0; i < 4; ++i) sum[g + i / 2 * 8][2 * q + i % 2] = warp.sum[lane][i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8 * P; ++k) sum[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      warp.sum[lane][i] = sum[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

}  // namespace on_host

RNNKERN_DEVICE int thread_index() { return on_host::self().thread; }
RNNKERN_DEVICE int block_index() { return on_host::self().block; }
RNNKERN_DEVICE int block_count() { return int(on_host::machine.blocks.size()); }
RNNKERN_DEVICE int cluster_index() { return on_host::machine.cluster; }
RNNKERN_DEVICE char* shared_memory() { return on_host::block().memory; }

RNNKERN_DEVICE void sync_warp() { on_host::meet(on_host::warp().sync, on_host::kSyncWarp); }
RNNKERN_DEVICE void sync_block() { on_host::meet(on_host::block().sync, on_host::kSyncBlock); }
RNNKERN_DEVICE void sync_cluster() { on_host::meet(on_host::machine.sync, on_host::kSyncCluster); }

RNNKERN_DEVICE void open_barrier(uint64_t* barrier) {
  on_host::at(barrier) = {.bytes = 0, .arrivals = 1, .phase = 0};
}

RNNKERN_DEVICE void expect(uint64_t* barrier, uint32_t bytes) {
  on_host::perhaps_pause();
  on_host::count(on_host::at(barrier), bytes, 1);
}

RNNKERN_DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  if (parity > 1) on_host::fail("wait() for parity %u", parity);
  on_host::Barrier& b = on_host::at(barrier);
  on_host::count(b, 0, 0);  // only to see that it is open
  on_host::suspend(on_host::kWait, &b.phase, parity);
}

RNNKERN_DEVICE void send(void* to, uint64_t* barrier, int block, const Words4& value) {
  on_host::perhaps_pause();
  if (block < 0 || block >= block_count()) on_host::fail("send() to block %d", block);
  on_host::machine.sent.push_back({block, on_host::offset(to, sizeof value, "target"),
                                   on_host::offset(barrier, sizeof *barrier, "barrier"), value});
}

template <class T>
inline void multiply_fragments(float (&sum)[4], const Words4& a, const Words2& b) {
  on_host::Warp& warp = on_host::warp();
  const int lane = thread_index() % 32;
  warp.a[lane] = a;
  warp.b[lane] = b;
  memcpy(warp.sum[lane], sum, sizeof sum);
  if (warp.product.arrived == 31) on_host::multiply<T>(warp);
  on_host::meet(warp.product, on_host::kMultiply);
  memcpy(sum, warp.sum[lane], sizeof sum);
}

// Calls body() in each thread of a grid (blocks, clusters), one cluster after the other.
template <class F>
void run_clusters(int blocks, int clusters, int threads, size_t shared_bytes, F&& body) {
  using namespace on_host;
  const std::lock_guard lock(machine.busy);
  if (blocks < 1 || blocks > 16 || threads < 1 || threads > 1024 || threads % 32 ||
      shared_bytes > 227 << 10)
    fail("no launch of %d blocks of %d threads with %zu bytes", blocks, threads, shared_bytes);
  machine.body = std::ref(body);
  machine.shared_bytes = shared_bytes;
  machine.random = uint64_t(delivery_seed) << 32;
  const size_t fibers = size_t(blocks) * threads;
  while (machine.stacks.size() < fibers) machine.stacks.push_back(map_pages(kPages));
  while (machine.memories.size() < size_t(blocks))
    machine.memories.push_back(map_pages(4 * kPages));

  for (machine.cluster = 0; machine.cluster < clusters; ++machine.cluster) {
    machine.sync = {int(fibers)};
    machine.warps.assign(fibers / 32, {});
    machine.blocks.clear();
    for (int i = 0; i < blocks; ++i) {
      // The end of the pages, so that nothing can be written behind it.
      const size_t bytes = (shared_bytes + 127) / 128 * 128;
      machine.blocks.push_back({{threads}, machine.memories[i] - bytes});
      memset(machine.blocks[i].memory, 0xFF, bytes);
    }
    machine.fibers.resize(fibers);
    for (size_t i = 0; i < fibers; ++i) {
      Fiber& fiber = machine.fibers[i] = {int(i / threads), int(i % threads)};
      // Stacks of one warp must not all fall into the same few sets of the cache.
      const size_t shift = i % 32 * 128;
      prepare(fiber.context, machine.stacks[i] - shift, kPages - shift, enter);
    }
    run_cluster();
  }
}

}  // namespace rnnkern::cuda
