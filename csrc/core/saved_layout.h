// The layout of what the forward pass saves for the backward pass.
//
// A step's values are in blocks of kUnitBlock units, [block][row][value][unit]; the last block may
// be narrower. For rows r0, r1, ..., values i f g o and 16-unit blocks:
//
//   block 0:  r0: i[0..15] f[0..15] g[0..15] o[0..15] | r1: i[0..15] ... | r2: ...
//   block 1:  r0: i[16..31] ...
//
// So a panel of units reads and writes consecutive cache lines. With rows of all units, each row
// would be on a page of its own, beyond the hardware prefetcher and the first-level TLB.
#pragma once
#include "layer_params.h"
#include "strided_rows.h"

namespace rnnkern {

constexpr int64_t kUnitBlock = 16;

// `values` values of each unit of one step; batch rows count from `first_row`.
template <class T>
struct SavedValues {
  T* data = nullptr;  // null if nothing is saved
  int64_t rows = 0, units = 0, first_row = 0;
  int values = 1;

  // Elements from one value of a unit to the next.
  RNNKERN_INLINE int64_t value_stride(uint64_t unit) const {  // unsigned: quotients are shifts
    return min<int64_t>(kUnitBlock, units - unit / kUnitBlock * kUnitBlock);
  }
  // The first value of a unit, and of those after it in the same block, for each row.
  RNNKERN_INLINE StridedRows<T> of(uint64_t unit) const {
    const int64_t in_block = int64_t(unit % kUnitBlock), row = values * value_stride(unit);
    return {data + (unit - in_block) * rows * values + first_row * row + in_block, row};
  }
};

// A step of one direction of a whole sequence.
struct SavedStep {
  int64_t rows_before, rows, units;

  RNNKERN_INLINE SavedStep(const Sequence& whole, int direction, int64_t t, int64_t units)
      : rows_before(direction * whole.rows() + whole.row(t)),
        rows(whole.active(t)),
        units(units) {}

  template <class T>
  RNNKERN_INLINE SavedValues<T> of(T* all, int64_t first_row, int values = 1) const {
    return {all ? all + rows_before * values * units : nullptr, rows, units, first_row, values};
  }
};

// The states but h: in the saved layout, or in plain rows, as c_0 and c_n are.
template <class S>
struct CStates {
  SavedValues<S> saved;
  StridedRows<S> plain{};
  int64_t plain_stride = 0;  // elements from one value of a unit to the next

  RNNKERN_INLINE int64_t value_stride(int64_t unit) const {
    return saved.data ? saved.value_stride(unit) : plain_stride;
  }

  RNNKERN_INLINE StridedRows<S> of(int64_t unit) const {
    return saved.data ? saved.of(unit) : StridedRows<S>{plain.data + unit, plain.stride};
  }
};

}  // namespace rnnkern
