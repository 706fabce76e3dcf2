// Threads that work on one call together.
//
// Bindings provide a parallel-for (torch's pool, or plain threads). A team has the threads that
// really arrive: rank 0 waits a moment for the others, then closes the team. So a region still
// finishes with fewer threads than asked for, or with one after the other, and a barrier never
// waits for an absent thread.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../../core/types.h"

namespace rnnkern {

// Calls body(context, begin, end) for ranges that cover [0, count), in parallel if it can.
struct ParallelFor {
  void (*run)(int count, void (*body)(void* context, int begin, int end), void* context);
};

class RNNKERN_API Barrier {
 public:
  void wait(int size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Team {
  int rank, size;
  Barrier* barriers;  // one for the whole team, one for each half

  void sync() const {
    if (size > 1) barriers[0].wait(size);
  }
  // Even and odd ranks as two teams.
  Team half() const { return {rank / 2, size / 2, barriers + 1 + rank % 2}; }
  // This rank's part of [0, count).
  template <class Int>
  Int begin(Int count) const {
    return count * rank / size;
  }
  template <class Int>
  Int end(Int count) const {
    return count * (rank + 1) / size;
  }
};

// Runs body(context, team) on a team of 1 to `threads` threads.
RNNKERN_API void run_team(const ParallelFor& parallel, int threads,
                          void (*body)(void* context, Team team), void* context);

}  // namespace rnnkern
