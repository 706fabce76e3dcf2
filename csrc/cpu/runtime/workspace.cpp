#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rnnkern {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

}  // namespace

void advise_huge_pages(void* block, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)block, (void)bytes;
#endif
}

Workspace& Workspace::of_this_thread() {
  static thread_local Workspace workspace;
  return workspace;
}

Workspace::~Workspace() { std::free(block_); }

void* Workspace::reserve(size_t bytes) {
  if (bytes > size_) {
    std::free(block_);
    size_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    block_ = std::aligned_alloc(kHugePage, size_);
    if (!block_) {
      size_ = 0;
      throw std::bad_alloc();
    }
    advise_huge_pages(block_, size_);
  }
  return block_;
}

void Workspace::trim() {
  if (size_ <= kKeep) return;
  std::free(block_);
  block_ = nullptr;
  size_ = 0;
}

}  // namespace rnnkern
