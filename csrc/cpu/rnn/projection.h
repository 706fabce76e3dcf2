// LSTM's projection (Sak et al. 2014; torch.nn's proj_size): h' = W_hr m, P wide, where m, H wide,
// is the h' of a cell without a projection.
//
// Forward, the cell writes m to a buffer, and one more GEMM follows (projection_forward.h).
// Backward, one more GEMM comes first (projection_backward.h).
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/packed_layout.h"
#include "../runtime/plan.h"

namespace rnnkern::RNNKERN_ISA {

inline int the_only_gate(int) { return 0; }

// The packed layout of columns that are units of h or m.
template <class T>
PackedLayout<PackedElem<T>> unit_layout(int64_t units, const LayerParams<T>& p, const Plan& plan) {
  return balanced_layout<PackedElem<T>>(units, plan.split_units ? plan.team(p.directions) : 1);
}

// Takes the place of both projections for element types that have none.
struct NoProjection {
  static constexpr bool kExists = false;
  NoProjection(const auto&...) {}
};

}  // namespace rnnkern::RNNKERN_ISA
