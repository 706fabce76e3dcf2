// The masks of a step, for cells that ask for some: values per unit that the caller gives.
#pragma once
#include "../../core/layer_params.h"
#include "../../core/strided_rows.h"
#include "../runtime/arena.h"
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
    if (p.prepacked)
      masks = {behind(p.prepacked), 0};
    else
      masks = {p.masks.at(seq, t) + direction * p.masks_d_stride + first * p.masks.b_stride,
               p.masks.b_stride};
  }

  // Keeps a row of masks with the prepacked weights; with a null header only counts.
  template <class T>
  static void prepack(const LayerParams<T>& p, PrepackedHeader* to, Arena& packed) {
    S* const kept = packed.alloc<S>(kMasks * p.hidden_size);
    if (!to) return;
    to->masks_at = reinterpret_cast<char*>(kept) - reinterpret_cast<char*>(to);
    std::memcpy(kept, p.masks.data, kMasks * p.hidden_size * sizeof(S));
  }

  // Rows [r0, r1) of h as the recurrent product sees them: times the last mask, (rows, units).
  template <class T>
  void mask_hidden(StridedRows<const T> h, int64_t r0, int64_t r1, int64_t units, T* to) const {
    for (int64_t r = r0; r < r1; ++r, to += units) {
      const S* const mask = hidden_mask(r, units);
      for (int64_t u = 0; u < units; ++u) to[u] = T(h[r][u] * mask[u]);
    }
  }
  const S* hidden_mask(int64_t r, int64_t units) const { return masks[r] + (kMasks - 1) * units; }

  // Of one vector of units of row r.
  template <int kCount>
  RNNKERN_INLINE void load_masks(VecArray<S, kCount>* to, int i, int64_t r, int64_t unit,
                                 int64_t units, int lanes) const {
    for (int k = 0; k < kMasks; ++k) to[k].v[i] = Vec<S>::load(masks[r] + k * units + unit, lanes);
  }

  static const S* behind(const PrepackedHeader* header) {
    return reinterpret_cast<const S*>(reinterpret_cast<const char*>(header) + header->masks_at);
  }
};

template <class S>
struct StepMasks<S, 0> {
  template <class T>
  void set_masks(const LayerParams<T>&, const Sequence&, int, int64_t, int64_t) {}
  template <class T>
  static void prepack(const LayerParams<T>&, PrepackedHeader*, Arena&) {}
  template <int kCount>
  RNNKERN_INLINE void load_masks(VecArray<S, kCount>*, int, int64_t, int64_t, int64_t, int) const {}
};

}  // namespace rnnkern::RNNKERN_ISA
