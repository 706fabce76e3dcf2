// The layout of a packed B operand.
//
// B's columns are in panels of up to kMaxNR vectors, padded with zeros, so that the microkernel
// reads a panel from front to back and needs no mask:
//
//   [panel][k][vector][lane]
//
// For the gate GEMMs a panel holds the kGates vectors of one block of units. With 4 gates and
// 16 lanes, a k of panel 0 is
//
//   i[0..15] | f[0..15] | g[0..15] | o[0..15]
//
// so that one register tile has all pre-activations of its units. Where the last block is narrower
// and its gates share vectors (gates_share_tail_vector), e.g. 5 units:
//
//   i0 i1 i2 i3 i4 f0 f1 f2 f3 f4 g0 g1 g2 g3 g4 o0 | o1 o2 o3 o4 0 ...
#pragma once
#include "../runtime/team.h"
#include "operands.h"

namespace rnnkern::RNNKERN_ISA {

// Counts packed elements F. A column is a unit of one gate; without gates, `gates` is 1.
template <class F>
struct PackedLayout {
  int64_t units;  // columns per gate
  int gates;
  int blocks_per_panel;  // unit blocks side by side in one panel
  bool gates_share_tail_vector = false;

  RNNKERN_INLINE PackedLayout(int64_t units, int gates)
      : PackedLayout(units, gates, gates == 1 ? kMaxNR : 1) {}
  RNNKERN_INLINE PackedLayout(int64_t units, int gates, int blocks_per_panel)
      : units(units),
        gates(gates),
        blocks_per_panel(blocks_per_panel) {}

  RNNKERN_INLINE int64_t unit_blocks() const {
    return (units + Vec<F>::kLanes - 1) / Vec<F>::kLanes;
  }
  RNNKERN_INLINE int64_t count() const {
    return (unit_blocks() + blocks_per_panel - 1) / blocks_per_panel;
  }
  RNNKERN_INLINE int64_t first_unit(int64_t panel) const {
    return panel * blocks_per_panel * Vec<F>::kLanes;
  }
  // Vectors of one gate in this panel; the last panel may be narrower.
  RNNKERN_INLINE int unit_vectors(int64_t panel) const {
    const int64_t left = unit_blocks() - panel * blocks_per_panel;
    return int(left < blocks_per_panel ? left : blocks_per_panel);
  }
  // Columns from one gate to the next in this panel.
  RNNKERN_INLINE int gate_stride(int64_t panel) const {
    constexpr int kLanes = Vec<F>::kLanes;
    const int64_t left = units - first_unit(panel);
    return gates_share_tail_vector && left < kLanes ? int(left) : unit_vectors(panel) * kLanes;
  }
  RNNKERN_INLINE int nr(int64_t panel) const {
    return (gates * gate_stride(panel) + Vec<F>::kLanes - 1) / Vec<F>::kLanes;
  }
  // Elements of one k in this panel, and of one k in all panels before it.
  RNNKERN_INLINE int64_t ldb(int64_t panel) const { return nr(panel) * Vec<F>::kLanes; }
  RNNKERN_INLINE int64_t offset(int64_t panel) const {
    return panel * gates * blocks_per_panel * Vec<F>::kLanes;
  }
  RNNKERN_INLINE int64_t padded_cols() const { return gates * unit_blocks() * Vec<F>::kLanes; }
  RNNKERN_INLINE int64_t size(int64_t depth) const { return padded_cols() * depth; }
  RNNKERN_INLINE int64_t bytes(int64_t depth) const { return size(depth) * int64_t(sizeof(F)); }
  // Whether units fill the panel's vectors, so that unpacked weights can be read instead.
  RNNKERN_INLINE bool is_full(int64_t panel) const {
    return first_unit(panel) + unit_vectors(panel) * Vec<F>::kLanes <= units;
  }
};

// The panel width that splits columns most evenly over a team. kCost is the measured time per
// vector by NR, relative to kMaxNR: narrower tiles load more per FMA.
template <class F>
PackedLayout<F> balanced_layout(int64_t columns, int team) {
  constexpr double kCost[kMaxNR + 1] = {0, 1.5, 1.15, 1.03, 1};
  PackedLayout<F> best(columns, 1);
  double least_cost = 0;
  for (int width = kMaxNR; width > 0; --width) {
    const PackedLayout<F> panels(columns, 1, width);
    const int64_t count = panels.count();
    int64_t most = 0;
    for (int rank = 0; rank < team; ++rank) {
      const Team one{rank, team, nullptr};
      most =
          max(most, min(one.end(count) * width, panels.unit_blocks()) - one.begin(count) * width);
    }
    const double cost = kCost[width] * double(most);
    if (width == kMaxNR || cost < least_cost) best = panels, least_cost = cost;
  }
  return best;
}

}  // namespace rnnkern::RNNKERN_ISA
