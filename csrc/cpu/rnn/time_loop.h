// What the time loops of both passes share: a worker's range, the order of panels, the loop over
// vectors, and how a call gets its buffers and its team.
#pragma once
#include "../../core/layer_params.h"
#include "../runtime/arena.h"
#include "../runtime/plan.h"
#include "../runtime/team.h"
#include "../runtime/workspace.h"
#include "../simd/amx_tiles.h"

namespace rnnkern::RNNKERN_ISA {

// Batch rows [b0, b1) and panels of hidden units [p0, p1).
struct WorkRange {
  int64_t b0, b1, p0, p1;
};

// Serpentine order: odd steps take the panels backwards. Of weights larger than the cache, those
// used last are still in it.
RNNKERN_INLINE int64_t serpentine(int64_t panel, int64_t step, const WorkRange& range) {
  return step % 2 ? range.p0 + range.p1 - 1 - panel : panel;
}
// The panel after it; -1 after the last, which the next step takes first.
RNNKERN_INLINE int64_t next_serpentine(int64_t panel, int64_t step, const WorkRange& range) {
  return panel + 1 < range.p1 ? serpentine(panel + 1, step, range) : -1;
}

// Calls f(number, first) for pairs of [0, count) and the rest, number a constant 2 or 1: two
// registers of a VecArray hide the latency of one.
template <class F>
RNNKERN_INLINE void for_pairs_and_rest(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) f(std::integral_constant<int, 2>(), i);
  for (; i < count; ++i) f(std::integral_constant<int, 1>(), i);
}

// Counts the size of a call's buffers, lays them out in the workspace, and runs it on a team.
template <class Call, class Params>
void run_on_team(const Params& p, const Plan& plan, const ParallelFor& parallel,
                 Workspace& workspace) {
  size_t bytes = 0;
  Call(p, plan, Arena(nullptr), &bytes);
  Call call(p, plan, Arena(workspace.reserve(bytes)));
  run_team(
      parallel, plan.threads,
      [](void* c, Team team) {
        [[maybe_unused]] const AmxTiles tiles;
        static_cast<Call*>(c)->run(team);
      },
      &call);
  workspace.trim();
}

}  // namespace rnnkern::RNNKERN_ISA
