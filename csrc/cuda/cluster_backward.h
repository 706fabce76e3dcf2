// Steps of a run backward (cluster.h says how): one block's share, one thread of it.
#pragma once
#include "cluster.h"

namespace rnnkern::cuda {

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

  RNNKERN_HD BackwardMemory(char* memory, int blocks) {
    Pieces pieces(memory);
    arrived = pieces.take<uint64_t>(2);
    dsum = pieces.take<T>(2 * kOperand);
    received = pieces.take<float>(2 * blocks * S::kValues);
    weights = pieces.take<Words4>(Weights::kShared);
    bytes = pieces.taken();
  }
};

template <class Cell, class T, class S>
size_t shared_bytes(const BackwardRun*, int blocks) {
  return BackwardMemory<Cell, T, S>(nullptr, blocks).bytes;
}

template <class Cell, class T, class S>
RNNKERN_DEVICE void run_cluster(const BackwardRun& run) {
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
        float part[4] = {};
        RNNKERN_UNROLL
        for (int block = 0; block < kMostBlocks; ++block)
          part[block % 4] += block < blocks ? from[block * S::kValues] : 0.f;
        recurrent[slot] = (part[0] + part[1]) + (part[2] + part[3]);
      }
  };

  for (int64_t i = 0; i < run.steps; ++i) {
    if (i) receive(i);
    const int now = int(i) & 1;
    T* const operand = memory.dsum + now * Memory::kOperand;
    float dnext[S::kSlots][Cell::kStates], dsum[S::kSlots][Cell::kPreacts];
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot) {
      const int tile = share.slot_tile[slot];
      if (tile < 0) continue;
      RNNKERN_UNROLL
      for (int s = 0; s < Cell::kPreacts; ++s) dsum[slot][s] = 0.f;
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
            T(dsum[slot][Cell::kHiddenPreact + s]);
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
        for (int j = 0; j < 4; ++j) {
          RNNKERN_UNROLL
          for (int c = 1; c < kChains; ++c) sum[0][m][w][j] += sum[c][m][w][j];
        }
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
