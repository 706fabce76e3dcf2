// How a layer lies on a cluster of blocks (cluster.h), and which layers lie how.
#pragma once
#include <type_traits>

#include "../cells/registry.h"

namespace rnnkern::cuda {

constexpr int kTileUnits = 16, kTileRows = 8, kTileValues = kTileUnits * kTileRows;
constexpr int kLanes = 32;
constexpr int kMostBlocks = 16;  // of a cluster on Hopper

// Groups: tiles of units that a block owns. Deep: tiles of units of the whole layer for each warp.
// Wide: tiles of batch rows of a cluster. Of a warp's fragments of the weights Held are kept in
// registers, the rest in shared memory.
template <int Groups, int Deep, int Wide, int Warps, int Held>
struct Shape {
  static constexpr int kGroups = Groups, kDeep = Deep, kWide = Wide, kWarps = Warps, kHeld = Held;
  static constexpr int kThreads = Warps * kLanes;
  static constexpr int kTiles = Deep * Warps;  // of units of a layer, at most
  static constexpr int kRows = Wide * kTileRows;
  static constexpr int kParts = Warps / Groups;  // warps that share the depth of a product
  static constexpr int kValues = Groups * Wide * kTileValues;  // (unit, row) pairs of a block
  static constexpr int kSlots = (kValues + kThreads - 1) / kThreads;  // of them, to a thread
  static constexpr int fragments(int gates) { return gates * Groups * Deep; }  // 16 units deep
  static_assert(Warps % Groups == 0);
};

// Calls f(S{}) with the shape for so many units of a cell in storage type T, or returns false:
// none. bench/README.md has the measurements.
template <class Cell, class T, int Wide, class F>
bool visit_shape(int64_t units, F&& f) {
  constexpr bool kHalf = sizeof(T) == 2, kElman = Cell::kGates == 1;
  if (units <= 64)
    f(Shape<1, 1, Wide, 4, 32>{});
  else if (units <= 128)
    f(Shape<1, 2, Wide, 4, 32>{});
  else if (units <= 256)
    f(std::conditional_t<kHalf, Shape<1, 4, Wide, 4, 32>, Shape<1, 2, Wide, 8, 32>>{});
  else if (units <= 384)
    f(Shape<2, 3, Wide, 8, kHalf ? 32 : 20>{});
  else if (units <= 512)
    f(Shape<2, 4, Wide, 8, kHalf ? 32 : 20>{});
  else if constexpr (kElman) {
    if (units > 1024) return false;
    f(Shape<4, 8, Wide, 8, 32>{});
  } else {
    if (!kHalf || units > 768) return false;
    f(Shape<3, 4, Wide, 12, 22>{});
  }
  return true;
}

template <class S>
int blocks_for(int64_t units) {
  const int64_t tiles = (units + kTileUnits - 1) / kTileUnits;
  return int((tiles + S::kGroups - 1) / S::kGroups);
}

}  // namespace rnnkern::cuda
