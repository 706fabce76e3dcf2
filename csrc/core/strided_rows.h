// The one view of rows in memory, and min and max that leave no symbol behind.
#pragma once
#include "types.h"

namespace rnnkern {

template <class T>
RNNKERN_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
RNNKERN_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

// Row r begins at data + r * stride. Stride 0 repeats one row.
template <class T>
struct StridedRows {
  T* data;
  int64_t stride;
  RNNKERN_INLINE T* operator[](int64_t r) const { return data + r * stride; }
};

}  // namespace rnnkern
