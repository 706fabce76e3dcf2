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
  RNNKERN_BOTH_MEMBER explicit Pieces(char* memory) : begin_(memory), at_(memory) {}

  template <class V>
  RNNKERN_BOTH_MEMBER V* take(int count) {
    V* piece = reinterpret_cast<V*>(at_);
    at_ += (size_t(count) * sizeof(V) + 127) / 128 * 128;
    return piece;
  }
  RNNKERN_BOTH_MEMBER size_t taken() const { return size_t(at_ - begin_); }

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

template <class Cell, class T, class S>
struct ForwardMemory {
  static constexpr int G = Cell::kGates;
  using Weights = FragmentsOf<T, S, G>;
  static constexpr int kOperand = S::kTiles * S::kWide * kTileValues;

  uint64_t* arrived;  // of the two buffers
  T* h;               // the right operand of all units, twice
  float* sums;        // (warp, row tile, gate, tile)
  T* staged;          // a warp's new h
  Words4* weights;
  size_t bytes;

  RNNKERN_BOTH_MEMBER explicit ForwardMemory(char* memory) {
    Pieces pieces(memory);
    arrived = pieces.take<uint64_t>(2);
    h = pieces.take<T>(2 * kOperand);
    sums = pieces.take<float>(S::kWarps * S::kWide * G * kTileValues);
    staged = pieces.take<T>(S::kThreads);
    weights = pieces.take<Words4>(Weights::kShared);
    bytes = pieces.taken();
  }
};

template <class Cell, class T, class S>
struct BackwardMemory {
  static constexpr int G = Cell::kGates;
  using Weights = FragmentsOf<T, S, G>;
  static constexpr int kOperand = G * S::kGroups * S::kWide * kTileValues;

  uint64_t* arrived;
  T* dsum;          // the right operand, twice: (gate, tile of units, row tile, tile)
  float* received;  // twice: (block that sent it, tile of units, row tile, tile)
  Words4* weights;
  size_t bytes;

  RNNKERN_BOTH_MEMBER BackwardMemory(char* memory, int blocks) {
    Pieces pieces(memory);
    arrived = pieces.take<uint64_t>(2);
    dsum = pieces.take<T>(2 * kOperand);
    received = pieces.take<float>(2 * blocks * S::kValues);
    weights = pieces.take<Words4>(Weights::kShared);
    bytes = pieces.taken();
  }
};

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

template <class Cell, class T, class S>
RNNKERN_DEVICE void forward_cluster(const ForwardRun& run) {
  constexpr int G = Cell::kGates, kDepth = S::kGroups * S::kDeep * kFragmentsOfTile<T>;
  using Memory = ForwardMemory<Cell, T, S>;
  const ForwardStep& step = run.step;
  const int thread = thread_index(), warp = thread / kLanes, lane = thread % kLanes;
  const int group = warp % S::kGroups, part = warp / S::kGroups;
  const int me = block_index(), blocks = block_count(), H = int(step.units);
  const int bytes = blocks * S::kValues * int(sizeof(T));
  const Memory memory(shared_memory());
  const Share<T, S> share(H, step.batch);

  typename Memory::Weights weights;
  const auto w_hh = static_cast<const T*>(run.w_hh);
  weights.load(memory.weights, warp, lane, [&](int f, int row, int column) {
    const int unit = (me * S::kGroups + group) * kTileUnits + row;
    const int k = (part * kDepth + f / G) * kFragmentUnits<T> + column;
    return unit < H && k < H ? w_hh[(int64_t(Cell::hidden_gate(f % G)) * H + unit) * H + k]
                             : T(0.f);
  });
  const auto first_h = static_cast<const T*>(step.h_operand ? step.h_operand : step.h);
  for (int i = thread; i < Memory::kOperand; i += S::kThreads) {
    const Place at = place<T>(i % kTileValues);
    const int tile = i / kTileValues, unit = tile / S::kWide * kTileUnits + at.unit;
    const int64_t row = cluster_index() * S::kRows + tile % S::kWide * kTileRows + at.row;
    memory.h[i] = unit < H && row < step.batch ? first_h[row * H + unit] : T(0.f);
    memory.h[Memory::kOperand + i] = T(0.f);
  }

  float state[S::kSlots][Cell::kStates], bias[S::kSlots][Cell::kSums], input[S::kSlots][G];
  ForwardAt at[S::kSlots];
  const ForwardAt onward{run.row_step * step.input_row, run.row_step * step.y_row, run.row_step * H,
                         0};
  RNNKERN_UNROLL
  for (int slot = 0; slot < S::kSlots; ++slot)
    if (share.real[slot]) {
      at[slot] = forward_at(step, share.row[slot], share.unit[slot]);
      load_bias<Cell, T>(step, share.unit[slot], bias[slot]);
      load_states<Cell, T>(step, share.row[slot], share.unit[slot], state[slot]);
      load_input<Cell, T>(step, at[slot], input[slot]);
    }
  open_both(memory.arrived, bytes);

  for (int64_t i = 0; i < run.steps; ++i) {
    if (i) wait_for_step(memory.arrived, i, bytes);
    const int now = int(i) & 1;

    float sum[S::kWide][G][4] = {};
    const auto operand = reinterpret_cast<const Words2*>(memory.h + now * Memory::kOperand) +
                         part * kDepth * S::kWide * kLanes + lane;
    RNNKERN_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      constexpr int F = kFragmentsOfTile<T>;
      RNNKERN_UNROLL
      for (int w = 0; w < S::kWide; ++w) {
        const Right<T> h(operand[((d / F * S::kWide + w) * F + d % F) * kLanes]);
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) multiply_add(sum[w][s], weights[d * G + s], h);
      }
    }
    const auto sums = reinterpret_cast<Words4*>(memory.sums);
    RNNKERN_UNROLL
    for (int w = 0; w < S::kWide; ++w) RNNKERN_UNROLL
    for (int s = 0; s < G; ++s)
      sums[((warp * S::kWide + w) * G + s) * kLanes + lane_slot(lane)] = words(sum[w][s]);
    sync_block();

    float saved[S::kSlots][Cell::kSaved + 1];
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int tile = share.slot_tile[slot];
      if (tile < 0) continue;
      if (share.real[slot]) {
        float total[Cell::kSums], next[Cell::kStates];
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kSums; ++s) total[s] = bias[slot][s];
        const float* products = memory.sums + share.sum +
                                (tile / S::kWide * S::kWide + tile % S::kWide) * G * kTileValues;
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) {
          total[Cell::kInputSum + s] += input[slot][s];
          float product = products[s * kTileValues];
          RNNKERN_UNROLL
          for (int p = 1; p < S::kParts; ++p)
            product += products[(p * S::kGroups * S::kWide * G + s) * kTileValues];
          total[Cell::kHiddenSum + s] += product;
        }
        cell_forward<Cell, T>(total, state[slot], next, saved[slot]);
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kStates; ++s) state[slot][s] = next[s];
      }
      if (i + 1 == run.steps) continue;

      // A warp's 32 values go out together, in pieces of 16 bytes, to every block.
      constexpr int kPieces = kLanes / kPerPiece<T>, kAtOnce = kLanes / kPieces;
      memory.staged[thread] = share.real[slot] ? T(state[slot][0]) : T(0.f);
      sync_warp();
      const int piece = lane % kPieces;
      const Words4 value = reinterpret_cast<const Words4*>(memory.staged + warp * kLanes)[piece];
      T* to = memory.h + (1 - now) * Memory::kOperand +
              (me * S::kGroups * S::kWide + tile) * kTileValues + share.element - lane +
              piece * kPerPiece<T>;
      if (blocks == 1) {
        if (lane < kPieces) *reinterpret_cast<Words4*>(to) = value;
      } else {
        RNNKERN_UNROLL
        for (int k = 0; k < kMostBlocks; k += kAtOnce)
          if (const int block = k + lane / kPieces; block < blocks)
            send(to, memory.arrived + 1 - now, block, value);
      }
      sync_warp();
    }

    // While that is on its way.
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot)
      if (share.real[slot]) {
        store_forward<Cell, T>(step, at[slot], state[slot], saved[slot]);
        at[slot] += onward;
        if (i + 1 < run.steps) load_input<Cell, T>(step, at[slot], input[slot]);
      }
  }
  RNNKERN_UNROLL
  for (int slot = 0; slot < S::kSlots; ++slot)
    if (share.real[slot])
      store_states<Cell, T>(step, share.row[slot], share.unit[slot], state[slot]);
  sync_cluster();
}

template <class Cell, class T, class S>
RNNKERN_DEVICE void backward_cluster(const BackwardRun& run) {
  constexpr int G = Cell::kGates, kTileDepth = G * S::kGroups;
  constexpr int kDepth = kTileDepth * kFragmentsOfTile<T>;
  using Memory = BackwardMemory<Cell, T, S>;
  const BackwardStep& step = run.step;
  const int thread = thread_index(), warp = thread / kLanes, lane = thread % kLanes;
  const int me = block_index(), blocks = block_count(), H = int(step.units);
  const int bytes = blocks * S::kValues * int(sizeof(float));
  const Memory memory(shared_memory(), blocks);
  const Share<T, S> share(H, step.batch);

  typename Memory::Weights weights;
  const auto w_hh = static_cast<const T*>(run.w_hh);
  weights.load(memory.weights, warp, lane, [&](int f, int row, int column) {
    constexpr int F = kFragmentsOfTile<T>;
    const int to = (warp * S::kDeep + f / kDepth) * kTileUnits + row;
    const int tile = f % kDepth / F, gate = tile / S::kGroups, group = tile % S::kGroups;
    const int unit = (me * S::kGroups + group) * kTileUnits + f % F * kFragmentUnits<T> + column;
    return unit < H && to < H ? w_hh[(int64_t(Cell::hidden_gate(gate)) * H + unit) * H + to]
                              : T(0.f);
  });

  float dh[S::kSlots], dc[S::kSlots], recurrent[S::kSlots];
  T dy[S::kSlots];
  Kept<Cell, T> kept[S::kSlots];
  BackwardAt at[S::kSlots];
  const BackwardAt onward{run.y_step, run.dy_step, run.row_step * H, run.row_step * H, 0, 0, false};
  const auto load = [&](int slot, int64_t i) {
    Before before = before_step(step);
    if (i + 1 == run.steps) {
      before = {run.last_before_y, run.last_before_row * H};
      at[slot].began = share.row[slot] >= run.last_previous_batch;
    }
    load_kept<Cell, T>(step, at[slot], before, &kept[slot]);
    if (step.dy) dy[slot] = static_cast<const T*>(step.dy)[at[slot].dy];
  };
  RNNKERN_UNROLL
  for (int slot = 0; slot < S::kSlots; ++slot)
    if (share.real[slot]) {
      at[slot] = backward_at(step, share.row[slot], share.unit[slot]);
      const int64_t first = at[slot].first;
      dh[slot] = static_cast<const float*>(step.dh)[first];
      recurrent[slot] = static_cast<const float*>(step.recurrent)[first];
      if constexpr (Cell::kStates == 2) dc[slot] = static_cast<const float*>(step.dc)[first];
      load(slot, 0);
    }
  open_both(memory.arrived, bytes);

  const auto receive = [&](int64_t i) {
    wait_for_step(memory.arrived, i, bytes);
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot)
      if (share.slot_tile[slot] >= 0) {
        const float* from = memory.received + (int(i) & 1) * blocks * S::kValues +
                            share.slot_tile[slot] * kTileValues + share.sum;
        float total = 0.f;
        RNNKERN_UNROLL
        for (int block = 0; block < kMostBlocks; ++block)
          if (block < blocks) total += from[block * S::kValues];
        recurrent[slot] = total;
      }
  };

  for (int64_t i = 0; i < run.steps; ++i) {
    if (i) receive(i);
    const int now = int(i) & 1;
    T* const operand = memory.dsum + now * Memory::kOperand;
    float dnext[S::kSlots][Cell::kStates], dsum[S::kSlots][Cell::kSums];
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int tile = share.slot_tile[slot];
      if (tile < 0) continue;
      RNNKERN_UNROLL
      for (int s = 0; s < Cell::kSums; ++s) dsum[slot][s] = 0.f;
      if (share.real[slot]) {
        float dprev[Cell::kStates];
        dnext[slot][0] = dh[slot] + recurrent[slot];
        if (step.dy) dnext[slot][0] += float(dy[slot]);
        if constexpr (Cell::kStates == 2) dnext[slot][1] = dc[slot];
        cell_backward<Cell, T>(kept[slot], dnext[slot], dprev, dsum[slot]);
        dh[slot] = dprev[0];
        if constexpr (Cell::kStates == 2) dc[slot] = dprev[1];
      }
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s)
        operand[(s * S::kGroups * S::kWide + tile) * kTileValues + share.element] =
            T(dsum[slot][Cell::kHiddenSum + s]);
    }
    sync_block();

    // Independent sums, so that a product need not wait for the one before.
    constexpr int kChains = S::kDeep * S::kWide < 4 ? 4 / (S::kDeep * S::kWide) : 1;
    float sum[kChains][S::kDeep][S::kWide][4] = {};
    const auto right = reinterpret_cast<const Words2*>(operand) + lane;
    RNNKERN_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      constexpr int F = kFragmentsOfTile<T>;
      RNNKERN_UNROLL
      for (int w = 0; w < S::kWide; ++w) {
        const Right<T> values(right[((d / F * S::kWide + w) * F + d % F) * kLanes]);
        RNNKERN_UNROLL
        for (int m = 0; m < S::kDeep; ++m)
          multiply_add(sum[d % kChains][m][w], weights[m * kDepth + d], values);
      }
    }
    RNNKERN_UNROLL
    for (int m = 0; m < S::kDeep; ++m) {
      const int tile = warp * S::kDeep + m, block = tile / S::kGroups;
      if (block >= blocks) continue;
      RNNKERN_UNROLL
      for (int w = 0; w < S::kWide; ++w) {
        RNNKERN_UNROLL
        for (int c = 1; c < kChains; ++c) RNNKERN_UNROLL
        for (int j = 0; j < 4; ++j) sum[0][m][w][j] += sum[c][m][w][j];
        float* to = memory.received + ((1 - now) * blocks + me) * S::kValues +
                    (tile % S::kGroups * S::kWide + w) * kTileValues;
        Words4* const slot = reinterpret_cast<Words4*>(to) + lane_slot(lane);
        if (blocks == 1)
          *slot = words(sum[0][m][w]);
        else
          send(slot, memory.arrived + 1 - now, block, words(sum[0][m][w]));
      }
    }

    // While that is on its way.
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot)
      if (share.real[slot]) {
        store_backward<Cell, T>(step, at[slot], kept[slot], dnext[slot], dsum[slot]);
        at[slot] += onward;
        if (i + 1 < run.steps) load(slot, i + 1);
      }
  }
  receive(run.steps);
  RNNKERN_UNROLL
  for (int slot = 0; slot < S::kSlots; ++slot)
    if (share.real[slot]) {
      const int64_t first = at[slot].first;
      static_cast<float*>(step.dh)[first] = dh[slot];
      static_cast<float*>(step.recurrent)[first] = recurrent[slot];
      if constexpr (Cell::kStates == 2) static_cast<float*>(step.dc)[first] = dc[slot];
    }
  sync_cluster();
}

}  // namespace rnnkern::cuda
