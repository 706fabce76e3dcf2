#include "team.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "pause.h"
#include "thread_pool.h"

namespace rnnkern {
namespace {

// Spins before a waiting thread yields: some microseconds, the usual imbalance of a step.
constexpr int kSpins = 2000;

using Clock = std::chrono::steady_clock;

// A yield that takes longer than this means that another thread ran.
constexpr auto kTimeSlice = std::chrono::microseconds(500);

// Whether others compete for this machine's cores. Threads that wait for each other are then slower
// than one thread alone: each is descheduled in turn, and the rest waits. So after a team that lost
// much of its time, calls run on one thread for kCalls times as long as that team took. Each
// further loss doubles the number: trying again costs little, and a free machine is soon used
// again.
class Contention {
 public:
  bool alone() const {
    const auto until = until_.load(std::memory_order_relaxed);
    return until.count() && Clock::now().time_since_epoch() < until;
  }
  // A team took `elapsed` until `end`; its threads were descheduled for `lost` on average.
  void record(Clock::time_point end, Clock::duration elapsed, Clock::duration lost) {
    int calls = calls_.load(std::memory_order_relaxed);
    if (lost > elapsed / 2) {
      until_.store(end.time_since_epoch() + calls * elapsed, std::memory_order_relaxed);
      calls = std::min(2 * calls, kMostCalls);
    } else {
      calls = kCalls;
    }
    calls_.store(calls, std::memory_order_relaxed);
  }

 private:
  static constexpr int kCalls = 8, kMostCalls = 64;
  std::atomic<int> calls_{kCalls};
  std::atomic<Clock::duration> until_{Clock::duration::zero()};
};

Contention contention;

// Returns the time for which the thread was descheduled meanwhile.
template <class Done>
Clock::duration wait_until(Done done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return {};
    pause();
  }
  Clock::duration lost{};
  while (!done()) {
    const auto start = Clock::now();
    std::this_thread::yield();
    const auto away = Clock::now() - start;
    if (away > kTimeSlice) lost += away;
  }
  return lost;
}

}  // namespace

void Barrier::wait(int size) {
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    const auto away = wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
    if (away.count()) lost.fetch_add(away.count(), std::memory_order_relaxed);
  }
}

namespace {

struct Gang {
  void (*body)(void*, Team);
  void* context;
  int threads;
  // Members, the indices that they cover, and whether the team is closed, in one word.
  std::atomic<uint64_t> state;
  Barrier barriers[3];
  Clock::time_point finished;

  static constexpr uint64_t kMember = 1, kIndex = uint64_t(1) << 16, kClosed = uint64_t(1) << 32;
  static int members(uint64_t s) { return int(s & 0xffff); }
  static int indices(uint64_t s) { return int(s >> 16 & 0xffff); }

  void join(int begin, int end) {
    uint64_t s = state.load(std::memory_order_relaxed);
    do {
      if (s & kClosed) return;
    } while (!state.compare_exchange_weak(s, s + kMember + kIndex * (end - begin),
                                          std::memory_order_acq_rel));
    const int rank = members(s);
    if (rank == 0) {
      int spins = 0;
      wait_until([&] {
        s = state.load(std::memory_order_acquire);
        return indices(s) == threads || ++spins > kSpins;
      });
      s = state.fetch_or(kClosed, std::memory_order_acq_rel);
    } else {
      wait_until([&] { return (s = state.load(std::memory_order_acquire)) & kClosed; });
    }
    const Team team{rank, members(s), barriers};
    body(context, team);
    team.sync();
    if (rank == 0) finished = Clock::now();
  }
};

const pid_t loading_process = getpid();

// A forked child has none of its parent's threads, and a pool that does not know it waits for them
// for ever, as torch's does with libgomp. There the engine's own threads take its place.
ParallelFor alive(const ParallelFor& parallel) {
  return getpid() == loading_process ? parallel : kOwnThreads;
}

}  // namespace

void run_team(const ParallelFor& parallel, int threads, void (*body)(void*, Team), void* context) {
  Gang gang{body, context, threads, {}, {}, {}};
  if (threads == 1 || contention.alone()) return body(context, Team{0, 1, gang.barriers});
  const auto start = Clock::now();
  alive(parallel).run(
      threads, [](void* g, int begin, int end) { static_cast<Gang*>(g)->join(begin, end); }, &gang);
  const auto end = Clock::now();
  Clock::duration lost{};
  for (const Barrier& barrier : gang.barriers) lost += Clock::duration(barrier.lost) / threads;
  // A thread that came too late may have kept the others waiting at the pool's own end.
  if (end - gang.finished > kTimeSlice) lost += end - gang.finished;
  contention.record(end, end - start, lost);
}

}  // namespace rnnkern
