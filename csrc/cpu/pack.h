// Packing: the right operand of a product as panels of up to kTileVectors vectors, [panel][k]
// [vector][lane], zeros beyond the edge, so that the tile reads it front to back and needs no mask.
#pragma once
#include "product.h"

namespace rnnkern::RNNKERN_ISA {

// How columns fall into panels. For the gate products a column is a unit of one gate, and the
// kGates vectors of a unit block stand together in a panel; otherwise kGates is 1.
template <class T>
struct Panels {
  int64_t units;  // columns per gate
  int gates;
  int blocks_per_panel;  // unit blocks side by side in one panel

  RNNKERN_INLINE Panels(int64_t units, int gates)
      : units(units), gates(gates), blocks_per_panel(gates == 1 ? kTileVectors : 1) {}

  RNNKERN_INLINE int64_t blocks() const { return (units + Vec<T>::kLanes - 1) / Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t count() const {
    return (blocks() + blocks_per_panel - 1) / blocks_per_panel;
  }
  RNNKERN_INLINE int64_t first_unit(int64_t panel) const {
    return panel * blocks_per_panel * Vec<T>::kLanes;
  }
  // Vectors of one gate in this panel; the last panel may be narrower.
  RNNKERN_INLINE int width(int64_t panel) const {
    const int64_t left = blocks() - panel * blocks_per_panel;
    return int(left < blocks_per_panel ? left : blocks_per_panel);
  }
  RNNKERN_INLINE int vectors(int64_t panel) const { return gates * width(panel); }
  // Elements of one k in this panel, and of everything before it at one k.
  RNNKERN_INLINE int64_t step(int64_t panel) const { return vectors(panel) * Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t before(int64_t panel) const {
    return panel * gates * blocks_per_panel * Vec<T>::kLanes;
  }
  RNNKERN_INLINE int64_t row() const { return gates * blocks() * Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t size(int64_t depth) const { return row() * depth; }
};

// out[k * step + l] = source[l * ld + k] for l < lanes (the rest zero): a transposition, four by
// four where it can be.
template <class T>
RNNKERN_INLINE void pack_transposed(const T* source, int64_t ld, int lanes, int64_t depth, T* out,
                                    int64_t step) {
  int64_t k = 0;
  if constexpr (sizeof(T) == 4) {
    typedef T Quad __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    for (; lanes == Vec<T>::kLanes && k + 4 <= depth; k += 4)
      for (int l = 0; l < Vec<T>::kLanes; l += 4) {
        const T* p = source + l * ld + k;
        const Quad a = *(const Quad*)p, b = *(const Quad*)(p + ld), c = *(const Quad*)(p + 2 * ld),
                   d = *(const Quad*)(p + 3 * ld);
        const Quad ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                   ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7),
                   cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                   cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        T* o = out + k * step + l;
        *(Quad*)o = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5);
        *(Quad*)(o + step) = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
        *(Quad*)(o + 2 * step) = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5);
        *(Quad*)(o + 3 * step) = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
      }
  }
  for (; k < depth; ++k) {
    int l = 0;
    for (; l < lanes; ++l) out[k * step + l] = source[l * ld + k];
    for (; l < Vec<T>::kLanes; ++l) out[k * step + l] = 0;
  }
}

// Columns are the rows of `weight` (gates * units, depth): what multiplies x or h in the forward
// pass. gate_of(s) is the weight's gate that stands in place s.
template <class T, class GateOf>
void pack_gates(const Panels<T>& panels, int64_t panel, const T* weight, int64_t depth,
                GateOf gate_of, T* packed) {
  T* out = packed + panels.before(panel) * depth;
  const int width = panels.width(panel);
  for (int s = 0; s < panels.gates; ++s)
    for (int w = 0; w < width; ++w) {
      const int64_t unit = panels.first_unit(panel) + w * Vec<T>::kLanes;
      const int64_t left = panels.units - unit;
      const int lanes = int(left < Vec<T>::kLanes ? left : Vec<T>::kLanes);
      pack_transposed(weight + (gate_of(s) * panels.units + unit) * depth, depth, lanes, depth,
                      out + (s * width + w) * Vec<T>::kLanes, panels.step(panel));
    }
}

// Row k of the panel is a row of contiguous columns in memory: row_of(k).
template <class T, class RowOf>
RNNKERN_INLINE void pack_rows(const Panels<T>& panels, int64_t panel, int64_t depth, RowOf row_of,
                              T* out) {
  using V = Vec<T>;
  const int width = panels.width(panel);
  const int64_t first = panels.first_unit(panel);
  const int64_t left = panels.units - first - (width - 1) * V::kLanes;
  const int last = int(left < V::kLanes ? left : V::kLanes);
  for (int64_t k = 0; k < depth; ++k, out += width * V::kLanes) {
    const T* row = row_of(k) + first;
    for (int w = 0; w < width - 1; ++w) V::load(row + w * V::kLanes).store(out + w * V::kLanes);
    V::load(row + (width - 1) * V::kLanes, last).store(out + (width - 1) * V::kLanes);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
