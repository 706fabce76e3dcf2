// Many time steps in one kernel: the recurrent weights stay on the chip, shared out over the
// blocks of a cluster, and in every step the blocks exchange what the next one needs through each
// other's shared memory. Clusters share the batch and know nothing of each other.
//
// A block owns some tiles of 16 hidden units, with all their gates. Forward, its warps multiply the
// rows of W_hh of those units by h of all units, finish the step for them, and send the new h to
// every block. Backward, it has dsum of its own units; its warps multiply the same rows,
// transposed, by them, and send each part of W_hh^T dsum to the block whose units it is for, which
// adds up what it gets from all, always in the same order.
//
// Nothing waits for more than it needs: what is sent is counted by a barrier in the shared memory
// of the block that receives it. There are two buffers for it. A block sends into the one that
// another has read in the step before only after that other's values of this step have come, and
// these are sent after all of its reading.
//
// Nothing here needs a GPU: the tests run the same functions on the CPU, with fibers for threads.
#pragma once
#include <cstring>

#include "chip.h"
#include "pointwise.h"
#include "run.h"
#include "shape.h"

namespace rnnkern::cuda {

// How elements lie in the operands of mma: one or two to a register, so a fragment of the
// weights is 8 or 16 units deep.
template <class T>
constexpr int kElemsPerReg = 4 / int(sizeof(T));
template <class T>
constexpr int kFragmentK = 8 * kElemsPerReg<T>;
template <class T>
constexpr int kFragmentsPerTile = kUnitsPerTile / kFragmentK<T>;
template <class T>
constexpr int kElemsPerVector = 16 / int(sizeof(T));  // of what is sent

// A (unit, row) pair of a tile, by its place among the elements of the right operand of a product.
struct FragmentCoord {
  int unit, row;
};

template <class T>
RNNKERN_DEVICE FragmentCoord fragment_coord(int element) {
  constexpr int P = kElemsPerReg<T>;
  const int lane = element / (2 * P) % kWarpSize, reg = element / P % 2;
  const int fragment = element / (2 * P * kWarpSize);
  return {fragment * kFragmentK<T> + reg * 4 * P + lane % 4 * P + element % P, lane / 4};
}

// Where a lane puts its four sums of a tile, and where the sum of a pair is found then: in such an
// order that neither has two lanes ask the same bank of the shared memory for different words.
RNNKERN_DEVICE int swizzled_lane(int lane) { return lane / 4 * 4 + (lane % 4 ^ lane / 8); }
RNNKERN_DEVICE int swizzled_elem(const FragmentCoord& at) {
  const int g = at.unit % 8;
  return g * 16 + (at.row / 2 ^ g / 2) * 4 + at.unit / 8 * 2 + at.row % 2;
}

RNNKERN_DEVICE U32x4 as_u32x4(const float (&sum)[4]) {
  U32x4 all;
  memcpy(&all, sum, sizeof(all));
  return all;
}

// Shared memory, handed out piece by piece.
class SmemCarver {
 public:
  RNNKERN_HD explicit SmemCarver(char* memory) : begin_(memory), at_(memory) {}

  template <class V>
  RNNKERN_HD V* alloc(int count) {
    V* piece = reinterpret_cast<V*>(at_);
    at_ += (size_t(count) * sizeof(V) + 127) / 128 * 128;
    return piece;
  }
  RNNKERN_HD size_t bytes() const { return size_t(at_ - begin_); }

 private:
  char *begin_, *at_;
};

// A warp's share of the weights, as left operands of its products.
template <class T, int Count, int RegFragments, int Warps>
class WeightFragments {
 public:
  // value(fragment, row, column) is what stands there.
  template <class F>
  RNNKERN_DEVICE_MEMBER void load(U32x4* shared, int warp, int lane, F&& value) {
    constexpr int P = kElemsPerReg<T>;
    smem_ = shared + warp * kWarpSize + lane;
    RNNKERN_UNROLL
    for (int f = 0; f < Count; ++f) {
      U32x4 regs;
      RNNKERN_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int row = lane / 4 + w % 2 * 8, column = lane % 4 * P + w / 2 * 4 * P;
        T elements[P];
        RNNKERN_UNROLL
        for (int i = 0; i < P; ++i) elements[i] = value(f, row, column + i);
        memcpy(&regs.reg[w], elements, sizeof(elements));
      }
      if (f < RegFragments)
        regs_[f] = regs;
      else
        smem_[(f - RegFragments) * Warps * kWarpSize] = regs;
    }
  }
  RNNKERN_DEVICE_MEMBER U32x4 operator[](int f) const {
    return f < RegFragments ? regs_[f] : smem_[(f - RegFragments) * Warps * kWarpSize];
  }
  static constexpr int kSmemVectors =
      (Count - RegFragments) * Warps * kWarpSize;  // vectors of 16 bytes

 private:
  U32x4 regs_[RegFragments];
  U32x4* smem_;
};

template <class T, class Config, int Gates,
          int Count = Config::fragments(Gates) * kFragmentsPerTile<T>>
using WeightFragmentsFor =
    WeightFragments<T, Count, (Count < Config::kRegFragments ? Count : Config::kRegFragments),
                    Config::kWarps>;

// What a thread finishes of each step: up to kElemsPerThread (unit, row) pairs of its block.
template <class T, class Config>
struct ThreadPartition {
  int tile_of[Config::kElemsPerThread];  // (tile of units, row tile) within the block; -1: none
  int unit[Config::kElemsPerThread], row[Config::kElemsPerThread];
  bool in_bounds[Config::kElemsPerThread];  // not beyond the last unit or batch row
  int element;                              // within a tile
  int sum;                                  // where its sums are found

  RNNKERN_DEVICE_MEMBER ThreadPartition(int64_t units, int64_t batch) {
    element = thread_index() % kElemsPerTile;
    const FragmentCoord at = fragment_coord<T>(element);
    sum = swizzled_elem(at);
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot) {
      const int value = slot * Config::kThreads + thread_index(), tile = value / kElemsPerTile;
      tile_of[slot] = value < Config::kBlockElems ? tile : -1;
      unit[slot] = (block_rank_in_cluster() * Config::kUnitTiles + tile / Config::kBatchTiles) *
                       kUnitsPerTile +
                   at.unit;
      row[slot] = cluster_id_in_grid() * Config::kBatchRows +
                  tile % Config::kBatchTiles * kRowsPerTile + at.row;
      in_bounds[slot] = value < Config::kBlockElems && unit[slot] < units && row[slot] < batch;
    }
  }
};

// Opens the barriers of both buffers, which get so many bytes each time; all blocks are there then.
RNNKERN_DEVICE void init_mbarriers(uint64_t* mbarriers, int bytes) {
  if (thread_index() == 0)
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(mbarriers + i);
      mbarrier_arrive_expect_tx(mbarriers + i, uint32_t(bytes));
    }
  sync_cluster();
}

// Waits for what was sent in the step before. A block alone sends nothing: it stores.
RNNKERN_DEVICE void wait_for_exchange(uint64_t* mbarriers, int64_t i, int bytes) {
  if (blocks_in_cluster() == 1) return sync_block();
  const auto turn = uint32_t(i);
  mbarrier_wait_parity(mbarriers + turn % 2, (turn - 1) / 2 % 2);
  if (thread_index() == 0) mbarrier_arrive_expect_tx(mbarriers + turn % 2, uint32_t(bytes));
}

}  // namespace rnnkern::cuda
