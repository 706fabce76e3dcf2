// Where the values stand that the forward pass keeps for the backward pass.
//
// Those of a step stand in blocks of units, [block][row][value][unit]; the last block may be
// narrower. So a panel of units writes, and reads, lines that follow each other. In rows of all
// units each row's would be on a page of its own, which neither the processor's own fetching ahead
// nor the first-level TLB is made for.
#pragma once
#include "../core/layer_params.h"
#include "product.h"

namespace rnnkern::RNNKERN_ISA {

// Some values of each unit of a step, and of its rows from `first` on.
template <class T>
struct SavedValues {
  T* data = nullptr;  // null if nothing is kept
  int64_t rows = 0, units = 0, first = 0;
  int values = 1;

  // From one value of a unit to the next.
  RNNKERN_INLINE int64_t step(uint64_t unit) const {  // unsigned: quotients are shifts
    return min<int64_t>(kUnitBlock, units - unit / kUnitBlock * kUnitBlock);
  }
  // The first value of a unit, and of those after it in the same block.
  RNNKERN_INLINE StridedRows<T> of(uint64_t unit) const {
    const int64_t in_block = unit % kUnitBlock, row = values * step(unit);
    return {data + (unit - in_block) * rows * values + first * row + in_block, row};
  }
};

// A step of one direction of a whole sequence.
struct SavedStep {
  int64_t before, rows, units;  // rows before it, and its own

  SavedStep(const Sequence& whole, int d, int64_t t, int64_t units)
      : before(d * whole.rows() + whole.row(t)),
        rows(whole.active(t)),
        units(units) {}

  template <class T>
  RNNKERN_INLINE SavedValues<T> of(T* all, int64_t first, int values = 1) const {
    return {all ? all + before * values * units : nullptr, rows, units, first, values};
  }
};

// c: as kept, or in rows, as it is given and returned.
template <class S>
struct CStates {
  SavedValues<S> kept;
  StridedRows<S> by_row{};

  RNNKERN_INLINE StridedRows<S> of(int64_t unit) const {
    return kept.data ? kept.of(unit) : StridedRows<S>{by_row.data + unit, by_row.stride};
  }
};

}  // namespace rnnkern::RNNKERN_ISA
