// Many time steps in one kernel: the recurrent weights stay on the chip, shared out over the blocks
// of a cluster, and in every step the blocks exchange what the next one needs through each other's
// shared memory. Clusters share the batch and know nothing of each other.
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

// How elements lie in the operands of multiply_add: one or two to a word, so a fragment of the
// weights is 8 or 16 units deep.
template <class T>
constexpr int kPerWord = 4 / int(sizeof(T));
template <class T>
constexpr int kFragmentUnits = 8 * kPerWord<T>;
template <class T>
constexpr int kFragmentsOfTile = kTileUnits / kFragmentUnits<T>;
template <class T>
constexpr int kPerPiece = 16 / int(sizeof(T));  // of what is sent

// A (unit, row) pair of a tile, by its place among the elements of the right operand of a product.
struct Place {
  int unit, row;
};

template <class T>
RNNKERN_DEVICE Place place(int element) {
  constexpr int P = kPerWord<T>;
  const int lane = element / (2 * P) % kLanes, word = element / P % 2;
  const int fragment = element / (2 * P * kLanes);
  return {fragment * kFragmentUnits<T> + word * 4 * P + lane % 4 * P + element % P, lane / 4};
}

// Where a lane puts its four sums of a tile, and where the sum of a pair is found then: in such an
// order that neither has two lanes ask the same bank of the shared memory for different words.
RNNKERN_DEVICE int lane_slot(int lane) { return lane / 4 * 4 + (lane % 4 ^ lane / 8); }
RNNKERN_DEVICE int sum_slot(const Place& at) {
  const int g = at.unit % 8;
  return g * 16 + (at.row / 2 ^ g / 2) * 4 + at.unit / 8 * 2 + at.row % 2;
}

RNNKERN_DEVICE Words4 words(const float (&sum)[4]) {
  Words4 all;
  memcpy(&all, sum, sizeof(all));
  return all;
}

// Shared memory, handed out piece by piece.
class Pieces {
 public:
  RNNKERN_HD explicit Pieces(char* memory) : begin_(memory), at_(memory) {}

  template <class V>
  RNNKERN_HD V* take(int count) {
    V* piece = reinterpret_cast<V*>(at_);
    at_ += (size_t(count) * sizeof(V) + 127) / 128 * 128;
    return piece;
  }
  RNNKERN_HD size_t taken() const { return size_t(at_ - begin_); }

 private:
  char *begin_, *at_;
};

// A warp's share of the weights, as left operands of its products.
template <class T, int Count, int Held, int Warps>
class Fragments {
 public:
  // value(fragment, row, column) is what stands there.
  template <class F>
  RNNKERN_DEVICE_MEMBER void load(Words4* shared, int warp, int lane, F&& value) {
    constexpr int P = kPerWord<T>;
    rest_ = shared + warp * kLanes + lane;
    RNNKERN_UNROLL
    for (int f = 0; f < Count; ++f) {
      Words4 words;
      RNNKERN_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int row = lane / 4 + w % 2 * 8, column = lane % 4 * P + w / 2 * 4 * P;
        T elements[P];
        RNNKERN_UNROLL
        for (int i = 0; i < P; ++i) elements[i] = value(f, row, column + i);
        memcpy(&words.word[w], elements, sizeof(elements));
      }
      if (f < Held)
        held_[f] = words;
      else
        rest_[(f - Held) * Warps * kLanes] = words;
    }
  }
  RNNKERN_DEVICE_MEMBER Words4 operator[](int f) const {
    return f < Held ? held_[f] : rest_[(f - Held) * Warps * kLanes];
  }
  static constexpr int kShared = (Count - Held) * Warps * kLanes;  // words of 16 bytes

 private:
  Words4 held_[Held];
  Words4* rest_;
};

template <class T, class S, int Gates, int Count = S::fragments(Gates) * kFragmentsOfTile<T>>
using FragmentsOf = Fragments<T, Count, (Count < S::kHeld ? Count : S::kHeld), S::kWarps>;

// What a thread finishes of each step: up to kSlots (unit, row) pairs of its block.
template <class T, class S>
struct Share {
  int slot_tile[S::kSlots];  // (tile of units, row tile) within the block; -1: none
  int unit[S::kSlots], row[S::kSlots];
  bool real[S::kSlots];  // not beyond the last unit or batch row
  int element;           // within a tile
  int sum;               // where its sums are found

  RNNKERN_DEVICE_MEMBER Share(int64_t units, int64_t batch) {
    element = thread_index() % kTileValues;
    const Place at = place<T>(element);
    sum = sum_slot(at);
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int value = slot * S::kThreads + thread_index(), tile = value / kTileValues;
      slot_tile[slot] = value < S::kValues ? tile : -1;
      unit[slot] = (block_index() * S::kGroups + tile / S::kWide) * kTileUnits + at.unit;
      row[slot] = cluster_index() * S::kRows + tile % S::kWide * kTileRows + at.row;
      real[slot] = value < S::kValues && unit[slot] < units && row[slot] < batch;
    }
  }
};

// Opens the barriers of both buffers, which get so many bytes each time; all blocks are there then.
RNNKERN_DEVICE void open_both(uint64_t* arrived, int bytes) {
  if (thread_index() == 0)
    for (int i = 0; i < 2; ++i) {
      open_barrier(arrived + i);
      expect(arrived + i, uint32_t(bytes));
    }
  sync_cluster();
}

// Waits for what was sent in the step before. A block alone sends nothing: it stores.
RNNKERN_DEVICE void wait_for_step(uint64_t* arrived, int64_t i, int bytes) {
  if (block_count() == 1) return sync_block();
  const auto turn = uint32_t(i);
  wait(arrived + turn % 2, (turn - 1) / 2 % 2);
  if (thread_index() == 0) expect(arrived + turn % 2, uint32_t(bytes));
}

}  // namespace rnnkern::cuda
