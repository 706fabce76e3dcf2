// The masks of a step, for cells that ask for some: values per unit that the caller gives.
#pragma once
#include "../../core/layer_params.h"
#include "../../core/strided_rows.h"
#include "../simd/vec.h"

namespace rnnkern::RNNKERN_ISA {

// Those of a step's batch rows, a part of the step's operands. Nothing for a cell without.
template <class S, int kMasks>
struct StepMasks {
  StridedRows<const S> masks;

  // Batch rows of `seq` count from `first` on.
  template <class T>
  void set_masks(const LayerParams<T>& p, const Sequence& seq, int direction, int64_t t,
                 int64_t first) {
    masks = {p.masks.at(seq, t) + direction * p.masks_d_stride + first * p.masks.b_stride,
             p.masks.b_stride};
  }

  // Of one vector of units of row r.
  template <int kCount>
  RNNKERN_INLINE void load_masks(VecArray<S, kCount>* to, int i, int64_t r, int64_t unit,
                                 int64_t units, int lanes) const {
    for (int k = 0; k < kMasks; ++k) to[k].v[i] = Vec<S>::load(masks[r] + k * units + unit, lanes);
  }
};

template <class S>
struct StepMasks<S, 0> {
  template <class T>
  void set_masks(const LayerParams<T>&, const Sequence&, int, int64_t, int64_t) {}
  template <int kCount>
  RNNKERN_INLINE void load_masks(VecArray<S, kCount>*, int, int64_t, int64_t, int64_t, int) const {}
};

}  // namespace rnnkern::RNNKERN_ISA
