// The cells that are not built in, by number from kCellCount on.
#include <atomic>
#include <mutex>

#include "../../core/cuda_cells.h"
#include "../engine.h"

namespace rnnkern {
namespace {

constexpr int kMaxAdded = 256;
const AddedCell* added[kMaxAdded];
std::atomic<int> count{0};  // those below are read without a lock
std::mutex adding;
std::atomic<const cuda::AddedKernels*> kernels[kMaxAdded];

const AddedCell* find(int64_t id) {
  const int64_t at = id - kCellCount;
  return at >= 0 && at < count.load(std::memory_order_acquire) ? added[at] : nullptr;
}

}  // namespace

int add_cell(const AddedCell& cell) {
  const std::scoped_lock lock(adding);
  const int at = count.load(std::memory_order_relaxed);
  if (at == kMaxAdded) return -1;
  added[at] = &cell;
  count.store(at + 1, std::memory_order_release);
  return kCellCount + at;
}

const CellFacts* added_cell_facts(int64_t id) {
  const AddedCell* const cell = find(id);
  return cell ? &cell->facts : nullptr;
}

const Engine& engine_of(CellId cell) {
  const AddedCell* const found = find(int64_t(cell));
  return found ? found->engine : engine();
}

const cuda::AddedKernels* added_kernels(int64_t cell) {
  return find(cell) ? kernels[cell - kCellCount].load(std::memory_order_acquire) : nullptr;
}

void rnnkern_set_kernels(int cell, const cuda::AddedKernels* given) {
  if (find(cell)) kernels[cell - kCellCount].store(given, std::memory_order_release);
}

}  // namespace rnnkern
