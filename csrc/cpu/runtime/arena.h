// Divides one block into aligned pieces; with a null block it only counts their size.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../simd/vec.h"

namespace rnnkern::RNNKERN_ISA {

// `count` elements padded to an odd number of cache lines, so that a column of such rows does not
// map to one cache set.
template <class T>
constexpr int64_t pad_to_odd_lines(int64_t count) {
  return ((count + kLineElems<T> - 1) / kLineElems<T> | 1) * kLineElems<T>;
}

class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* alloc(int64_t count) {
    char* p = block_ + used_;
    used_ += (count * sizeof(T) + 127) / 64 * 64;  // 64-byte aligned, a line apart
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

}  // namespace rnnkern::RNNKERN_ISA
