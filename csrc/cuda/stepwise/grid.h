// The grid of a stepwise kernel over rows and units, and a thread's part of it.
// Host code too: the tests walk the same grids on the CPU.
#pragma once
#include <cstdint>

namespace rnnkern::cuda {

// 2-D, so that no index needs a division.
struct Grid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};

// The first (row, unit) of a thread and the steps of its grid-stride loops.
struct GridStride {
  int64_t row, row_step, unit, unit_step;
};

constexpr int kThreads = 256;

inline Grid make_grid(int64_t rows, int64_t units) {
  constexpr int64_t kMaxBlocksY = 65535, kMaxBlocksX = 65536;
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  Grid g;
  g.threads_x = 32;
  while (g.threads_x < kThreads && g.threads_x < units) g.threads_x *= 2;
  g.threads_y = kThreads / g.threads_x;
  g.blocks_x = unsigned(least((units + g.threads_x - 1) / g.threads_x, kMaxBlocksX));
  g.blocks_y = unsigned(least((rows + g.threads_y - 1) / g.threads_y, kMaxBlocksY));
  return g;
}

}  // namespace rnnkern::cuda
