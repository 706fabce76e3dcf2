// How a layer is tiled over the blocks that share its recurrent weights, a group, and which sizes
// have a tiling.
//
// Unit tiles are 16 hidden units with all their gates, batch tiles 8 rows: M and N of one mma
// whose A operand is W_hh. Every block owns kUnitTiles unit tiles and works on kBatchTiles batch
// tiles. A change here changes registers, shared memory and occupancy, and nothing else.
//
//   group     blocks                          exchange                GPU
//   block     one                             shared memory           sm_80 and later
//   cluster   up to 16                        stores between blocks   sm_90, sm_100
//   grid      as many as run at once          global memory, L2       sm_80 and later
#pragma once
#include <type_traits>

#include "../cell_math.h"
#include "../params.h"

namespace rnnkern::cuda {

constexpr int kUnitsPerTile = 16, kRowsPerTile = 8, kElemsPerTile = kUnitsPerTile * kRowsPerTile;
constexpr int kWarpSize = 32;
constexpr int kMaxClusterSize = 16;  // on Hopper, beyond the portable 8

// UnitTiles:    unit tiles of a block
// LayerTiles:   unit tiles of the layer, at most: K of the forward product, M of the backward one
// BatchTiles:   batch tiles of a group
// RegFragments: a warp's fragments of W_hh that are kept in registers; the rest in shared memory
template <Group Kind, int UnitTiles, int LayerTiles, int BatchTiles, int Warps, int RegFragments>
struct TileConfig {
  static constexpr Group kGroup = Kind;
  static constexpr int kUnitTiles = UnitTiles, kLayerTiles = LayerTiles, kBatchTiles = BatchTiles;
  static constexpr int kWarps = Warps, kRegFragments = RegFragments;
  static constexpr int kThreads = Warps * kWarpSize;
  static constexpr int kMaxBlocks = (LayerTiles + UnitTiles - 1) / UnitTiles;
  static constexpr int kBlockTiles = UnitTiles * BatchTiles;       // (unit tile, batch tile) pairs
  static constexpr int kBlockElems = kBlockTiles * kElemsPerTile;  // (unit, row) pairs of a block
  static constexpr int kGroupElems =
      LayerTiles * BatchTiles * kElemsPerTile;  // of a group, at most
  static constexpr int kElemsPerThread = (kBlockElems + kThreads - 1) / kThreads;
  static constexpr int kBatchRows = BatchTiles * kRowsPerTile;
  // Forward, warps share K of a unit tile; backward, a warp has tiles of M, or warps share its K.
  static constexpr int kSplitK = Warps / UnitTiles;
  static constexpr int kMTiles = LayerTiles > Warps ? LayerTiles / Warps : 1;
  static constexpr int kBackwardSplitK = Warps > LayerTiles ? Warps / LayerTiles : 1;
  // Of 16 x 16 elements of W_hh, to a warp.
  static constexpr int fragments(int gates) { return gates * UnitTiles * LayerTiles / Warps; }
  static_assert(Warps % UnitTiles == 0 && LayerTiles % kSplitK == 0);
  static_assert(LayerTiles % Warps == 0 ||
                (Warps % LayerTiles == 0 && UnitTiles % kBackwardSplitK == 0));
};

// Those of the built-in cells have what the persistent kernels rely on.
template <class Cell>
constexpr bool check_persistent_limits() {
  static_assert(Cell::kStates <= 2 && (Cell::kSaved == 0 || Cell::kSaved >= Cell::kGates));
  static_assert(Cell::kRecurrent == Recurrent::dense && Cell::kParams + Cell::kMasks == 0);
  return true;
}

// Calls f(Config{}) with the tiling for `units` of a cell in storage type T, or returns false if
// there is none. docs/performance/gpu.md has the measurements of clusters.
template <class Cell, class T, int BatchTiles, class F>
bool dispatch_cluster_config(int64_t units, F&& f) {
  constexpr bool kHalf = sizeof(T) == 2, kElman = Cell::kGates == 1;
  constexpr Group kGroup = Group::cluster;
  if (units <= 64)
    f(TileConfig<kGroup, 1, 4, BatchTiles, 4, 32>{});
  else if (units <= 128)
    f(TileConfig<kGroup, 1, 8, BatchTiles, 4, 32>{});
  else if (units <= 256)
    f(std::conditional_t<kHalf, TileConfig<kGroup, 1, 16, BatchTiles, 4, 32>,
                         TileConfig<kGroup, 1, 16, BatchTiles, 8, 32>>{});
  else if (units <= 384)
    f(TileConfig<kGroup, 2, 24, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if (units <= 512)
    f(TileConfig<kGroup, 2, 32, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if constexpr (kElman) {
    if (units > 1024) return false;
    f(TileConfig<kGroup, 4, 64, BatchTiles, 8, 32>{});
  } else {
    if (!kHalf || units > 768) return false;
    f(TileConfig<kGroup, 3, 48, BatchTiles, 12, 22>{});
  }
  return true;
}

// Four warps to a scheduler hide the latency of each other's functions; they leave 128 registers
// to a thread.
template <class Cell, class T, int BatchTiles, class F>
bool dispatch_block_config(int64_t units, F&& f) {
  if constexpr (BatchTiles == 1) {
    if (units <= 64) {
      f(TileConfig<Group::block, 4, 4, 1, 16, 16>{});
      return true;
    }
    if constexpr (sizeof(T) == 2)
      if (units <= 128) {
        f(TileConfig<Group::block, 8, 8, 1, 16, 10>{});
        return true;
      }
  }
  return false;
}

// As many blocks as there are unit tiles, so that each has few weights. With more fragments in
// registers those of a step spill; at H 2048 and 16 rows shared memory has no room for more.
template <class Cell, class T, int BatchTiles, class F>
bool dispatch_grid_config(int64_t units, F&& f) {
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr Group kGroup = Group::grid;
  if (units <= 256)
    f(TileConfig<kGroup, 1, 16, BatchTiles, 8, 32>{});
  else if (units <= 512)
    f(TileConfig<kGroup, 1, 32, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if (units <= 768)
    f(TileConfig<kGroup, 1, 48, BatchTiles, 8, kHalf ? 32 : 20>{});
  else if (units <= 1024)
    f(TileConfig<kGroup, 1, 64, BatchTiles, 8, kHalf ? 24 : 20>{});
  else if constexpr (kHalf) {
    if (units <= 1536)
      f(TileConfig<kGroup, 1, 96, BatchTiles, 8, 24>{});
    else if (units <= 2048)
      f(TileConfig<kGroup, 1, 128, BatchTiles, 8, 32>{});
    else
      return false;
  } else {
    return false;
  }
  return true;
}

template <Group kGroup, class Cell, class T, int BatchTiles, class F>
bool dispatch_config(int64_t units, F&& f) {
  static_assert(check_persistent_limits<Cell>());
  if constexpr (kGroup == Group::block)
    return dispatch_block_config<Cell, T, BatchTiles>(units, f);
  else if constexpr (kGroup == Group::cluster)
    return dispatch_cluster_config<Cell, T, BatchTiles>(units, f);
  else
    return dispatch_grid_config<Cell, T, BatchTiles>(units, f);
}

// The blocks of a group that have units.
template <class Config>
int blocks_for(int64_t units) {
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
