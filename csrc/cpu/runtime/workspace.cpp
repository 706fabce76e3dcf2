#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnkern {

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)block, (void)bytes;
#endif
}

void* allocate_block(size_t bytes) {
  const size_t alignment = bytes < kHugePage ? kCacheLine : kHugePage;
  const size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* const block = std::aligned_alloc(alignment, whole);
  if (!block) throw std::bad_alloc();
  advise_huge_pages(block, whole);
  return block;
}

Workspace& Workspace::of_this_thread() {
  static thread_local Workspace workspace;
  return workspace;
}

Workspace::~Workspace() { std::free(block_); }

void* Workspace::reserve(size_t bytes) {
  if (bytes > size_) {
    release();
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block_ = allocate_block(whole);
    size_ = whole;
  }
  return block_;
}

void Workspace::trim() {
  if (size_ > kKeep) release();
}

void Workspace::release() {
  std::free(block_);
  block_ = nullptr;
  size_ = 0;
}

}  // namespace rnnkern
