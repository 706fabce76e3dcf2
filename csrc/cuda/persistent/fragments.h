// The layouts of the operands of mma (../mma.h): W_hh in registers and shared memory; h or dgates,
// and the accumulators, in shared memory. Where each pass has its arrays is in its Smem struct.
//
//   A, W_hh      [fragment][warp][lane][4 registers]    the first kRegFragments only in registers
//
//   B, h         [unit tile][batch tile][fragment][lane][2 registers]
//      dgates    [gate][unit tile][batch tile][fragment][lane][2 registers]
//      A tile is 16 units x 8 rows: one fragment for halves, two for float. A lane loads its
//      BFragment as 8 contiguous bytes, a warp 256.
//
//   accumulators [tile][lane, swizzled][4 floats]
//      A lane stores its four sums of a tile as 16 bytes; in the epilogue a thread loads one float.
#pragma once
#include "../mma.h"
#include "config.h"

namespace rnnkern::cuda {

template <class T>
constexpr int kElemsPerReg = 4 / int(sizeof(T));
template <class T>
constexpr int kFragmentK = 8 * kElemsPerReg<T>;  // K of one mma_sync
template <class T>
constexpr int kFragmentsPerTile = kUnitsPerTile / kFragmentK<T>;
template <class T>
constexpr int kElemsPerVector = 16 / int(sizeof(T));

// A (unit, row) pair of a tile.
struct TileCoord {
  int unit, row;
};

// The pair at an element of a stored B tile, and with it of a thread's elements.
template <class T>
RNNKERN_DEVICE TileCoord b_tile_coord(int element) {
  constexpr int P = kElemsPerReg<T>;
  const int lane = element / (2 * P) % kWarpSize, reg = element / P % 2;
  const int fragment = element / (2 * P * kWarpSize);
  return {fragment * kFragmentK<T> + reg * 4 * P + lane % 4 * P + element % P, lane / 4};
}

// The offset of a stored fragment, in BFragments of lanes: the k-th along K, for a batch tile.
template <class T, class Config>
RNNKERN_DEVICE int b_fragment_index(int k, int batch_tile) {
  constexpr int F = kFragmentsPerTile<T>;
  return ((k / F * Config::kBatchTiles + batch_tile) * F + k % F) * kWarpSize;
}

// Accumulators of a tile: the 16-byte vector that a lane stores, and the float of a (unit, row)
// pair. Swizzled so that both are free of bank conflicts.
RNNKERN_DEVICE int acc_vector(int lane) { return lane / 4 * 4 + (lane % 4 ^ lane / 8); }
RNNKERN_DEVICE int acc_index(const TileCoord& at) {
  const int g = at.unit % 8;
  return g * 16 + (at.row / 2 ^ g / 2) * 4 + at.unit / 8 * 2 + at.row % 2;
}

RNNKERN_DEVICE U32x4 as_u32x4(const float (&acc)[4]) {
  U32x4 vector;
  memcpy(&vector, acc, sizeof(vector));
  return vector;
}

// A warp's part of W_hh as A operands: the first RegFragments of Count in registers.
template <class T, int Count, int RegFragments, int Warps>
class WeightFragments {
 public:
  // value(fragment, m, k) is the element of a fragment.
  template <class F>
  RNNKERN_DEVICE_MEMBER void load(AFragment* smem, int warp, int lane, F&& value) {
    constexpr int P = kElemsPerReg<T>;
    smem_ = smem + warp * kWarpSize + lane;
    RNNKERN_UNROLL
    for (int f = 0; f < Count; ++f) {
      AFragment fragment;
      RNNKERN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int m = lane / 4 + r % 2 * 8, k = lane % 4 * P + r / 2 * 4 * P;
        T elements[P];
        RNNKERN_UNROLL
        for (int i = 0; i < P; ++i) elements[i] = value(f, m, k + i);
        memcpy(&fragment.reg[r], elements, sizeof(elements));
      }
      if (f < RegFragments)
        regs_[f] = fragment;
      else
        smem_[(f - RegFragments) * Warps * kWarpSize] = fragment;
    }
  }
  RNNKERN_DEVICE_MEMBER AFragment operator[](int f) const {
    return f < RegFragments ? regs_[f] : smem_[(f - RegFragments) * Warps * kWarpSize];
  }
  static constexpr int kSmemFragments = (Count - RegFragments) * Warps * kWarpSize;

 private:
  AFragment regs_[RegFragments];
  AFragment* smem_;
};

template <class T, class Config, int Gates,
          int Count = Config::fragments(Gates) * kFragmentsPerTile<T>>
using WeightFragmentsFor =
    WeightFragments<T, Count, (Count < Config::kRegFragments ? Count : Config::kRegFragments),
                    Config::kWarps>;

// The (unit, row) pairs of a block that a thread finishes in each step: up to kElemsPerThread.
template <class T, class Config>
struct ThreadPartition {
  int tile[Config::kElemsPerThread];  // unit tile * kBatchTiles + batch tile; -1: no pair
  int unit[Config::kElemsPerThread], row[Config::kElemsPerThread];
  bool in_bounds[Config::kElemsPerThread];  // not beyond the last unit or batch row
  int element;                              // of a stored B tile
  int acc;                                  // of stored accumulators

  RNNKERN_DEVICE_MEMBER ThreadPartition(int64_t units, int64_t batch, int first_row) {
    element = thread_index() % kElemsPerTile;
    const TileCoord at = b_tile_coord<T>(element);
    acc = acc_index(at);
    RNNKERN_UNROLL
    for (int e = 0; e < Config::kElemsPerThread; ++e) {
      const int i = e * Config::kThreads + thread_index(), t = i / kElemsPerTile;
      const int unit_tile = block_rank_in_group() * Config::kUnitTiles + t / Config::kBatchTiles;
      tile[e] = i < Config::kBlockElems ? t : -1;
      unit[e] = unit_tile * kUnitsPerTile + at.unit;
      row[e] = first_row + t % Config::kBatchTiles * kRowsPerTile + at.row;
      // No short circuit: a branch here costs registers in the loop over time.
      in_bounds[e] = (i < Config::kBlockElems) & (unit[e] < units) & (row[e] < batch);
    }
  }
};

}  // namespace rnnkern::cuda
