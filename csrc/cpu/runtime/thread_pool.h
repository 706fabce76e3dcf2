// The engine's own threads, for callers that bring none: they live as long as the process.
#pragma once
#include "team.h"

namespace rnnkern {

// Threads are started when a call first asks for them. Where the system refuses one, or another
// call has them at that moment, a call goes on with fewer, down to its own thread. Where there is a
// core for each, they spin for a moment after a call, then sleep. A forked child starts its own.
RNNKERN_API extern const ParallelFor kOwnThreads;

}  // namespace rnnkern
