// How a layer lies on a cluster of blocks (cluster.h), and which layers lie how.
#pragma once
#include <type_traits>

#include "../cells/registry.h"

namespace rnnkern::cuda {

constexpr int kUnitsPerTile = 16, kRowsPerTile = 8, kElemsPerTile = kUnitsPerTile * kRowsPerTile;
constexpr int kWarpSize = 32;
constexpr int kMaxClusterSize = 16;  // of a cluster on Hopper

// UnitTiles: tiles of units that a block owns. WarpTiles: tiles of units of the whole layer for
// each warp. BatchTiles: tiles of batch rows of a cluster. Of a warp's fragments of the weights
// RegFragments are kept in registers, the rest in shared memory.
template <int UnitTiles, int WarpTiles, int BatchTiles, int Warps, int RegFragments>
struct TileConfig {
  static constexpr int kUnitTiles = UnitTiles, kWarpTiles = WarpTiles, kBatchTiles = BatchTiles,
                       kWarps = Warps, kRegFragments = RegFragments;
  static constexpr int kThreads = Warps * kWarpSize;
  static constexpr int kLayerTiles = WarpTiles * Warps;  // of units of a layer, at most
  static constexpr int kBatchRows = BatchTiles * kRowsPerTile;
  static constexpr int kSplitK = Warps / UnitTiles;  // warps that share the depth of a product
  static constexpr int kBlockElems =
      UnitTiles * BatchTiles * kElemsPerTile;  // (unit, row) pairs of a block
  static constexpr int kElemsPerThread =
      (kBlockElems + kThreads - 1) / kThreads;  // of them, to a thread
  static constexpr int fragments(int gates) {
    return gates * UnitTiles * WarpTiles;
  }  // 16 units deep
  static_assert(Warps % UnitTiles == 0);
};

// Calls f(Config{}) with the shape for so many units of a cell in storage type T, or returns false:
// none. bench/README.md has the measurements.
template <class Cell, class T, int BatchTiles, class F>
bool dispatch_config(int64_t units, F&& f) {
  constexpr bool kHalf = sizeof(T) == 2, kElman = Cell::kGates == 1;
  if (units <= 64)
    f(TileConfig<1, 1, BatchTiles, 4, 32>{});
  else if (units <= 128)
    f(TileConfig<1, 2, BatchTiles, 4, 32>{});
  else if (units <= 256)
    f(std::conditional_t<kHalf, TileConfig<1, 4, BatchTiles, 4, 32>,
                         TileConfig<1, 2, BatchTiles, 8, 32>>{});
  else if (units <= 384)
    f(TileConfig<2, 3, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if (units <= 512)
    f(TileConfig<2, 4, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if constexpr (kElman) {
    if (units > 1024) return false;
    f(TileConfig<4, 8, BatchTiles, 8, 32>{});
  } else {
    if (!kHalf || units > 768) return false;
    f(TileConfig<3, 4, BatchTiles, 12, 22>{});
  }
  return true;
}

template <class Config>
int cluster_size_for(int64_t units) {
  const int64_t tiles = (units + kUnitsPerTile - 1) / kUnitsPerTile;
  return int((tiles + Config::kUnitTiles - 1) / Config::kUnitTiles);
}

}  // namespace rnnkern::cuda
