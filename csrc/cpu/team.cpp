#include "team.h"

#include <cstdlib>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnkern {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting threads spin for some microseconds, about as long as an even split of a step can be
// uneven, and then let others run.
constexpr int kSpins = 2000;

constexpr size_t kHugePage = size_t(2) << 20;

template <class Done>
void wait_until(Done done) {
  for (int i = 0; !done(); ++i) i < kSpins ? pause() : std::this_thread::yield();
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
  // Members, the indices that they cover, and the door, in one word.
  std::atomic<uint64_t> state;
  Barrier barriers[3];

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
    body(context, Team{rank, members(s), barriers});
  }
};

}  // namespace

void run_team(const ParallelFor& parallel, int threads, void (*body)(void*, Team), void* context) {
  Gang gang{body, context, threads, {}, {}};
  if (threads == 1) return body(context, Team{0, 1, gang.barriers});
  parallel.run(
      threads, [](void* g, int begin, int end) { static_cast<Gang*>(g)->join(begin, end); }, &gang);
}

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)block, (void)bytes;
#endif
}

Workspace& Workspace::of_this_thread() {
  static thread_local Workspace workspace;
  return workspace;
}

Workspace::~Workspace() { std::free(block_); }

void* Workspace::reserve(size_t bytes) {
  if (bytes > size_) {
    std::free(block_);
    size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block_ = std::aligned_alloc(kHugePage, size_);
    if (!block_) {
      size_ = 0;
      throw std::bad_alloc();
    }
    advise_huge_pages(block_, size_);
  }
  return block_;
}

void Workspace::trim() {
  if (size_ <= kKeep) return;
  std::free(block_);
  block_ = nullptr;
  size_ = 0;
}

}  // namespace rnnkern
