// What the walks of the forward and the backward pass share: how a worker's part is named and its
// panels are walked, and how a call gets its buffers and its team.
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

// Panels are walked back and forth, step by step: of weights larger than the cache, those that were
// used last are still there.
RNNKERN_INLINE int64_t serpentine(int64_t panel, int64_t step, const WorkRange& part) {
  return step % 2 ? part.p0 + part.p1 - 1 - panel : panel;
}
// The one after it; -1 after the last, with which the next step begins.
RNNKERN_INLINE int64_t next_serpentine(int64_t panel, int64_t step, const WorkRange& part) {
  return panel + 1 < part.p1 ? serpentine(panel + 1, step, part) : -1;
}

// Lays a call's buffers out in the workspace, its size counted first, and runs it on a team.
template <class Call, class Params>
void run_on_team(const Params& p, const Plan& plan, const ParallelFor& parallel,
                 Workspace& workspace) {
  size_t bytes = 0;
  Call(p, plan, Arena(nullptr), &bytes);
  Call call(p, plan, Arena(workspace.reserve(bytes)));
  run_team(
      parallel, plan.threads,
      [](void* c, Team team) {
        [[maybe_unused]] const AmxTiles registers;
        static_cast<Call*>(c)->run(team);
      },
      &call);
  workspace.trim();
}

}  // namespace rnnkern::RNNKERN_ISA
