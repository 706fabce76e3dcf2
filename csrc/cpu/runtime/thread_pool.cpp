#include "thread_pool.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "pause.h"

namespace rnnkern {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread spins after a call before it sleeps. To wake it takes 30 us to 150 us, as long
// as a step of a stream. Threads that slept after half the time missed every other step.
constexpr auto kSpin = std::chrono::microseconds(200);

int available_cores() {
#if defined(__linux__)
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
#else
  return int(std::thread::hardware_concurrency());
#endif
}

// One thread, which serves the same index of every call.
class Worker {
 public:
  Worker() {
    std::thread([this] { work(); }).detach();
  }

  // `spins`: whether the thread may wait for its next task without sleep.
  void give(void (*body)(void*, int, int), void* context, int index, bool spins) {
    body_ = body, context_ = context, index_ = index;
    spins_until_ = spins ? Clock::time_point::max() : Clock::time_point::min();
    state_ = kGiven;
    state_.notify_one();
  }

  // Waits for the end of the task, or takes it back if the thread has not come yet. A thread that
  // comes too late spins too: it is in time for the next call.
  void finish() {
    int given = kGiven;
    if (!state_.compare_exchange_strong(given, kIdle)) wait_while(kTaken);
    if (spins_until_.load() == Clock::time_point::max()) spins_until_ = Clock::now() + kSpin;
  }

 private:
  enum State : int { kIdle, kGiven, kTaken };

  void work() {
    for (;;) {
      wait_while(kIdle);
      int given = kGiven;
      if (!state_.compare_exchange_strong(given, kTaken)) continue;
      body_(context_, index_, index_ + 1);
      state_ = kIdle;
      state_.notify_one();
    }
  }

  void wait_while(State state) {
    while (Clock::now() < spins_until_.load())
      for (int i = 0; i < 16; ++i, pause())
        if (state_ != state) return;
    state_.wait(state);
  }

  alignas(64) std::atomic<int> state_{kIdle};
  std::atomic<Clock::time_point> spins_until_{Clock::time_point::min()};
  void (*body_)(void*, int, int);
  void* context_;
  int index_;
};

class ThreadPool {
 public:
  void run(int count, void (*body)(void*, int, int), void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return body(context, 0, count);
    start(count - 1);
    const int own = count - std::min(count - 1, int(workers_.size()));
    for (int i = own; i < count; ++i) workers_[i - own]->give(body, context, i, count <= cores_);
    body(context, 0, own);  // with the indices that no thread is there for
    for (int i = own; i < count; ++i) workers_[i - own]->finish();
  }

 private:
  void start(int wanted) {
    try {
      while (int(workers_.size()) < std::min(wanted, most_))
        workers_.push_back(std::make_unique<Worker>());
    } catch (const std::system_error&) {
      most_ = int(workers_.size());  // the system's limit
    }
  }

  std::mutex turn_;  // held by the call that has the threads
  std::vector<std::unique_ptr<Worker>> workers_;
  int most_ = std::numeric_limits<int>::max();
  const int cores_ = available_cores();
};

// Never destroyed: its threads wait in it when the process ends. A child has none of its parent's
// threads, and perhaps a mutex that one of them held.
ThreadPool& pool() {
  static std::mutex mutex;
  static pid_t owner = 0;
  static ThreadPool* current = nullptr;
  const pid_t process = getpid();
  const std::scoped_lock lock(mutex);
  if (owner != process) current = new ThreadPool, owner = process;
  return *current;
}

}  // namespace

const ParallelFor kOwnThreads{[](int count, void (*body)(void*, int, int), void* context) {
  pool().run(count, body, context);
}};

}  // namespace rnnkern
