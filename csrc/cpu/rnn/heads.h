// W_hh in heads: each head of H / heads units has a matrix of its own, (G H / heads, H / heads),
// and sees the h of its own units alone.
//
// GEMMs take panels of units, as wide as a vector or more. A panel multiplies the k of the heads
// that its units belong to. Here are 4 heads of 6 units and panels of 8:
//
//            k  0       6       12      18
//   panel 0     [head 0][head 1]                units 0-5, 6-7
//   panel 1             [head 1][head 2]        units 8-11, 12-15
//   panel 2                     [head 2][head 3]    units 16-17, 18-23
//
// All panels have as many k as the one that needs most. Where one has k of other heads than a
// unit's own, the weights are zeros. Heads of whole panels have none.
#pragma once
#include <cstring>

#include "../gemm/packed_layout.h"

namespace rnnkern::RNNKERN_ISA {

// The k of each panel.
struct HeadRange {
  int64_t units, head_units;
  int64_t depth = 0;  // k of a panel

  // `width`: units of a panel. `multiple`, a power of two, divides where a range begins and its
  // depth, and may lengthen the row of k to a multiple of itself.
  HeadRange(int64_t units, int64_t heads, int64_t width, int64_t multiple = 1)
      : units(units),
        head_units(max<int64_t>(units / max<int64_t>(heads, 1), 1)),
        multiple_(multiple),
        row_((units + multiple - 1) & -multiple) {
    for (int64_t first = 0; first < units; first += width) {
      const int64_t last = min(first + width, units) - 1;
      depth = max(depth, head_begin(last) + head_units - (head_begin(first) & -multiple));
    }
    depth = (depth + multiple - 1) & -multiple;
  }

  // The first unit of the head that a unit belongs to.
  RNNKERN_INLINE int64_t head_begin(int64_t unit) const {
    return int64_t(uint32_t(unit) / uint32_t(head_units)) * head_units;
  }
  // The first k of the panel that begins with this unit.
  RNNKERN_INLINE int64_t begin(int64_t first_unit) const {
    return min(head_begin(first_unit) & -multiple_, row_ - depth);
  }

  // A unit's row of W_hh for a gate: head_units columns.
  template <class T>
  T* weights(T* w_hh, int gates, int gate, int64_t unit) const {
    const int64_t head = unit / head_units;
    return w_hh + ((head * gates + gate) * head_units + unit % head_units) * head_units;
  }

 private:
  int64_t multiple_, row_;
};

// The rows of a panel's units [first, last) in a dense matrix (gates * units, depth), whose columns
// are the panel's k.
template <class T>
void expand_heads(const HeadRange& range, const T* w_hh, int gates, int64_t first, int64_t last,
                  T* out) {
  const int64_t begin = range.begin(first);
  for (int gate = 0; gate < gates; ++gate)
    for (int64_t unit = first; unit < last; ++unit) {
      T* const row = out + (gate * range.units + unit) * range.depth;
      std::memset(row, 0, range.depth * sizeof(T));
      std::memcpy(row + range.head_begin(unit) - begin, range.weights(w_hh, gates, gate, unit),
                  range.head_units * sizeof(T));
    }
}

}  // namespace rnnkern::RNNKERN_ISA
