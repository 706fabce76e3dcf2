#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>

namespace rnnkern {
namespace {

class ThreadPool {
 public:
  void run(int count, void (*body)(void*, int, int), void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return body(context, 0, count);
    {
      const std::scoped_lock lock(mutex_);
      start(count - 1);
      body_ = body, context_ = context;
      next_ = 1, end_ = std::min(count, threads_ + 1);
    }
    wake_.notify_all();
    body(context, 0, 1 + count - end_);  // with the indices that no thread was there for
    std::unique_lock<std::mutex> lock(mutex_);
    next_ = end_;  // who comes now comes too late
    done_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  void start(int wanted) {
    try {
      for (; threads_ < std::min(wanted, most_); ++threads_)
        std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      most_ = threads_;  // the system's limit
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return next_ < end_; });
      const int index = next_++;
      ++running_;
      lock.unlock();
      body_(context_, index, index + 1);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the call that has the threads
  std::mutex mutex_;  // of everything below
  std::condition_variable wake_, done_;
  int threads_ = 0, running_ = 0, most_ = std::numeric_limits<int>::max();
  int next_ = 0, end_ = 0;  // the indices that are not taken yet
  void (*body_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
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
