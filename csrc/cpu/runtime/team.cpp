#include "team.h"

#include <time.h>
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

// Waiting that takes longer than this means that another thread ran.
constexpr auto kTimeSlice = std::chrono::microseconds(500);

Clock::duration thread_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

// Since it was made: the time that passed, and the part of it in which the thread had no core.
class Stopwatch {
 public:
  Clock::duration elapsed() const { return Clock::now() - start_; }
  Clock::duration lost() const { return elapsed() - (thread_time() - own_start_); }

 private:
  Clock::time_point start_ = Clock::now();
  Clock::duration own_start_ = thread_time();
};

// Whether others compete for this machine's cores. Threads that wait for each other are then slower
// than one thread alone: each is descheduled in turn, and the rest waits. So after a team that lost
// much of its time, calls run on one thread for kCalls times as long as that team took. Each
// further loss doubles the number. When that rest is over and its calls lost time too, it begins
// anew; else a team tries again, as a free machine is to be used soon.
class Contention {
 public:
  bool alone() {
    const auto until = until_.load(std::memory_order_relaxed);
    if (!until.count()) return false;
    const auto now = Clock::now().time_since_epoch();
    if (now < until) return true;
    const auto elapsed = elapsed_.exchange(0), lost = lost_.exchange(0);
    const bool busy = lost > elapsed / 10;
    until_.store(busy ? now + rest_.load(std::memory_order_relaxed) : Clock::duration::zero(),
                 std::memory_order_relaxed);
    return busy;
  }
  // A call on one thread, of a rest.
  void record_alone(const Stopwatch& watch) {
    elapsed_.fetch_add(watch.elapsed().count(), std::memory_order_relaxed);
    lost_.fetch_add(watch.lost().count(), std::memory_order_relaxed);
  }
  // A team's threads lost `lost` on average.
  void record_team(Clock::duration elapsed, Clock::duration lost) {
    int calls = calls_.load(std::memory_order_relaxed);
    if (lost > elapsed / 4) {
      const auto rest = calls * elapsed;
      rest_.store(rest, std::memory_order_relaxed);
      until_.store(Clock::now().time_since_epoch() + rest, std::memory_order_relaxed);
      calls = std::min(2 * calls, kMostCalls);
    } else {
      calls = kCalls;
    }
    calls_.store(calls, std::memory_order_relaxed);
  }

 private:
  static constexpr int kCalls = 8, kMostCalls = 64;
  std::atomic<int> calls_{kCalls};
  std::atomic<Clock::duration> until_{Clock::duration::zero()}, rest_{Clock::duration::zero()};
  // Of the calls in the present rest, in ticks.
  std::atomic<int64_t> elapsed_{0}, lost_{0};
};

Contention contention;

template <class Done>
void wait_until(Done done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return;
    pause();
  }
  while (!done()) std::this_thread::yield();
}

}  // namespace

void Barrier::wait(int size) {
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    wait_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
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
  std::atomic<int64_t> lost{0};  // by all members, in ticks
  Clock::time_point finished;

  static constexpr uint64_t kMember = 1, kIndex = uint64_t(1) << 16, kClosed = uint64_t(1) << 32;
  static int members(uint64_t s) { return int(s & 0xffff); }
  static int indices(uint64_t s) { return int(s >> 16 & 0xffff); }

  void join(int begin, int end) {
    const Stopwatch watch;
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
    lost.fetch_add(watch.lost().count(), std::memory_order_relaxed);
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
  Gang gang{body, context, threads, {}, {}, {}, {}};
  const Team alone{0, 1, gang.barriers};
  if (threads == 1) return body(context, alone);
  const Stopwatch watch;
  if (contention.alone()) {
    body(context, alone);
    contention.record_alone(watch);
    return;
  }
  alive(parallel).run(
      threads, [](void* g, int begin, int end) { static_cast<Gang*>(g)->join(begin, end); }, &gang);
  Clock::duration lost = Clock::duration(gang.lost) / threads;
  // A thread that came too late may have kept the others waiting at the pool's own end.
  const auto waited = Clock::now() - gang.finished;
  if (waited > kTimeSlice) lost += waited;
  contention.record_team(watch.elapsed(), lost);
}

}  // namespace rnnkern
