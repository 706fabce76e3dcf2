// How a layer is tiled over a cluster of thread blocks, and which sizes have a tiling.
//
// Unit tiles are 16 hidden units with all their gates, batch tiles 8 rows: M and N of one mma
// whose A operand is W_hh. Every block owns kUnitTiles unit tiles and works on kBatchTiles batch
// tiles. A change here changes registers, shared memory and occupancy, and nothing else.
#pragma once
#include <type_traits>

#include "../cell_math.h"

namespace rnnkern::cuda {

constexpr int kUnitsPerTile = 16, kRowsPerTile = 8, kElemsPerTile = kUnitsPerTile * kRowsPerTile;
constexpr int kWarpSize = 32;
constexpr int kMaxClusterSize = 16;  // on Hopper, beyond the portable 8

// UnitTiles:    unit tiles of a block
// WarpTiles:    unit tiles of the layer, to a warp: K of the forward product, M of the backward one
// BatchTiles:   batch tiles of a cluster
// RegFragments: a warp's fragments of W_hh that are kept in registers; the rest in shared memory
template <int UnitTiles, int WarpTiles, int BatchTiles, int Warps, int RegFragments>
struct TileConfig {
  static constexpr int kUnitTiles = UnitTiles, kWarpTiles = WarpTiles, kBatchTiles = BatchTiles;
  static constexpr int kWarps = Warps, kRegFragments = RegFragments;
  static constexpr int kThreads = Warps * kWarpSize;
  static constexpr int kLayerTiles = WarpTiles * Warps;            // unit tiles of a layer, at most
  static constexpr int kBlockTiles = UnitTiles * BatchTiles;       // (unit tile, batch tile) pairs
  static constexpr int kBlockElems = kBlockTiles * kElemsPerTile;  // (unit, row) pairs of a block
  static constexpr int kElemsPerThread = (kBlockElems + kThreads - 1) / kThreads;
  static constexpr int kBatchRows = BatchTiles * kRowsPerTile;
  static constexpr int kSplitK = Warps / UnitTiles;  // warps that share K of the forward product
  // Of 16 x 16 elements of W_hh, to a warp.
  static constexpr int fragments(int gates) { return gates * UnitTiles * WarpTiles; }
  static_assert(Warps % UnitTiles == 0);
};

// Those of the built-in cells have what the persistent kernels rely on.
template <class Cell>
constexpr bool check_persistent_limits() {
  static_assert(Cell::kStates <= 2 && (Cell::kSaved == 0 || Cell::kSaved >= Cell::kGates));
  static_assert(Cell::kRecurrent == Recurrent::dense && Cell::kParams + Cell::kMasks == 0);
  return true;
}

// Calls f(Config{}) with the tiling for `units` of a cell in storage type T, or returns false if
// there is none. docs/performance/gpu.md has the measurements.
template <class Cell, class T, int BatchTiles, class F>
bool dispatch_config(int64_t units, F&& f) {
  static_assert(check_persistent_limits<Cell>());
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

// Carves arrays out of the dynamic shared memory, each aligned to 128 bytes. Given null, it only
// counts the bytes.
class SmemCarver {
 public:
  RNNKERN_HD explicit SmemCarver(char* memory) : begin_(memory), at_(memory) {}

  template <class V>
  RNNKERN_HD V* alloc(int count) {
    V* array = reinterpret_cast<V*>(at_);
    at_ += (size_t(count) * sizeof(V) + 127) / 128 * 128;
    return array;
  }
  RNNKERN_HD size_t bytes() const { return size_t(at_ - begin_); }

 private:
  char *begin_, *at_;
};

}  // namespace rnnkern::cuda
