// Memory that a thread keeps between calls.
#pragma once
#include <cstddef>

#include "../../core/types.h"

namespace rnnkern {

constexpr size_t kCacheLine = 64, kHugePage = size_t(2) << 20;

// Asks for huge pages where a block has room for them: fewer page faults and TLB misses.
RNNKERN_API void advise_huge_pages(void* block, size_t bytes);

// Such a block, for std::free. It begins with a cache line, or with a huge page if it has that
// size: what just fits a cache then has no two lines too many in one of its sets. Throws
// std::bad_alloc.
RNNKERN_API void* allocate_block(size_t bytes);

// A block that the thread keeps between calls, so that a call costs no page faults. Contents are
// undefined. trim() frees a block over kKeep bytes after the call.
class RNNKERN_API Workspace {
 public:
  static Workspace& of_this_thread();
  ~Workspace();
  void* reserve(size_t bytes);
  void trim();

 private:
  void release();

  static constexpr size_t kKeep = size_t(128) << 20;
  void* block_ = nullptr;
  size_t size_ = 0;
};

}  // namespace rnnkern
