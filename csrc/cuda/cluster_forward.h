// Steps of a run forward (cluster.h says how): one block's share, one thread of it.
#pragma once
#include "cluster.h"

namespace rnnkern::cuda {

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

  RNNKERN_HD explicit ForwardMemory(char* memory) {
    Pieces pieces(memory);
    arrived = pieces.take<uint64_t>(2);
    h = pieces.take<T>(2 * kOperand);
    sums = pieces.take<float>(S::kWarps * S::kWide * G * kTileValues);
    staged = pieces.take<T>(S::kSlots * S::kThreads);
    weights = pieces.take<Words4>(Weights::kShared);
    bytes = pieces.taken();
  }
};

template <class Cell, class T, class S>
size_t shared_bytes(const ForwardRun*, int) {
  return ForwardMemory<Cell, T, S>(nullptr).bytes;
}

template <class Cell, class T, class S>
RNNKERN_DEVICE void run_cluster(const ForwardRun& run) {
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

  float state[S::kSlots][Cell::kStates], bias[S::kSlots][Cell::kPreacts], input[S::kSlots][G];
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
    for (int w = 0; w < S::kWide; ++w) {
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s)
        sums[((warp * S::kWide + w) * G + s) * kLanes + lane_slot(lane)] = words(sum[w][s]);
    }
    sync_block();

    float saved[S::kSlots][Cell::kSaved + 1];
    RNNKERN_UNROLL
    for (int slot = 0; slot < S::kSlots; ++slot)
      if (share.real[slot]) {
        float total[Cell::kPreacts], next[Cell::kStates];
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kPreacts; ++s) total[s] = bias[slot][s];
        const float* products = memory.sums + share.sum + share.slot_tile[slot] * G * kTileValues;
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) {
          total[Cell::kInputPreact + s] += input[slot][s];
          float product = products[s * kTileValues];
          RNNKERN_UNROLL
          for (int p = 1; p < S::kParts; ++p)
            product += products[(p * S::kGroups * S::kWide * G + s) * kTileValues];
          total[Cell::kHiddenPreact + s] += product;
        }
        cell_forward<Cell, T>(total, state[slot], next, saved[slot]);
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kStates; ++s) state[slot][s] = next[s];
      }

    // A warp's 32 values of a slot go out together, in pieces of 16 bytes, to every block.
    if (i + 1 < run.steps) {
      constexpr int kPieces = kLanes / kPerPiece<T>, kAtOnce = kLanes / kPieces;
      const int piece = lane % kPieces;
      RNNKERN_UNROLL
      for (int slot = 0; slot < S::kSlots; ++slot)
        memory.staged[slot * S::kThreads + thread] = share.real[slot] ? T(state[slot][0]) : T(0.f);
      sync_warp();
      RNNKERN_UNROLL
      for (int slot = 0; slot < S::kSlots; ++slot) {
        const int tile = share.slot_tile[slot];
        if (tile < 0) continue;
        const Words4 value = reinterpret_cast<const Words4*>(memory.staged + slot * S::kThreads +
                                                             warp * kLanes)[piece];
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
      }
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

}  // namespace rnnkern::cuda
