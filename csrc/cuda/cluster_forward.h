// Steps of a run forward (cluster.h says how): one block's share, one thread of it.
#pragma once
#include "cluster.h"

namespace rnnkern::cuda {

template <class Cell, class T, class Config>
struct ForwardSmem {
  static constexpr int G = Cell::kGates;
  using Weights = WeightFragmentsFor<T, Config, G>;
  static constexpr int kOperandElems = Config::kLayerTiles * Config::kBatchTiles * kElemsPerTile;

  uint64_t* mbarriers;  // of the two buffers
  T* h;                 // the right operand of all units, twice
  float* sums;          // (warp, row tile, gate, tile)
  T* staging;           // a warp's new h
  U32x4* weights;
  size_t bytes;

  RNNKERN_HD explicit ForwardSmem(char* memory) {
    SmemCarver pieces(memory);
    mbarriers = pieces.alloc<uint64_t>(2);
    h = pieces.alloc<T>(2 * kOperandElems);
    sums = pieces.alloc<float>(Config::kWarps * Config::kBatchTiles * G * kElemsPerTile);
    staging = pieces.alloc<T>(Config::kElemsPerThread * Config::kThreads);
    weights = pieces.alloc<U32x4>(Weights::kSmemVectors);
    bytes = pieces.bytes();
  }
};

template <class Cell, class T, class Config>
size_t smem_bytes(const PersistentForwardParams*, int) {
  return ForwardSmem<Cell, T, Config>(nullptr).bytes;
}

template <class Cell, class T, class Config>
RNNKERN_DEVICE void run_cluster(const PersistentForwardParams& params) {
  constexpr int G = Cell::kGates,
                kKFragments = Config::kUnitTiles * Config::kWarpTiles * kFragmentsPerTile<T>;
  using Memory = ForwardSmem<Cell, T, Config>;
  const StepForwardParams& step = params.step;
  const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group = warp % Config::kUnitTiles, part = warp / Config::kUnitTiles;
  const int block_rank = block_rank_in_cluster(), blocks = blocks_in_cluster(), H = int(step.units);
  const int bytes = blocks * Config::kBlockElems * int(sizeof(T));
  const Memory memory(dynamic_smem());
  const ThreadPartition<T, Config> elems(H, step.batch);

  typename Memory::Weights weights;
  const auto w_hh = static_cast<const T*>(params.w_hh);
  weights.load(memory.weights, warp, lane, [&](int f, int row, int column) {
    const int unit = (block_rank * Config::kUnitTiles + group) * kUnitsPerTile + row;
    const int k = (part * kKFragments + f / G) * kFragmentK<T> + column;
    return unit < H && k < H ? w_hh[(int64_t(Cell::hidden_gate(f % G)) * H + unit) * H + k]
                             : T(0.f);
  });
  const auto first_h = static_cast<const T*>(step.h_operand ? step.h_operand : step.h);
  for (int i = thread; i < Memory::kOperandElems; i += Config::kThreads) {
    const FragmentCoord at = fragment_coord<T>(i % kElemsPerTile);
    const int tile = i / kElemsPerTile, unit = tile / Config::kBatchTiles * kUnitsPerTile + at.unit;
    const int64_t row = cluster_id_in_grid() * Config::kBatchRows +
                        tile % Config::kBatchTiles * kRowsPerTile + at.row;
    memory.h[i] = unit < H && row < step.batch ? first_h[row * H + unit] : T(0.f);
    memory.h[Memory::kOperandElems + i] = T(0.f);
  }

  float state[Config::kElemsPerThread][Cell::kStates],
      bias[Config::kElemsPerThread][Cell::kPreacts], input[Config::kElemsPerThread][G];
  ForwardOffsets at[Config::kElemsPerThread];
  const ForwardOffsets strides{params.row_step * step.input_row, params.row_step * step.y_row,
                               params.row_step * H, 0};
  RNNKERN_UNROLL
  for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
    if (elems.in_bounds[slot]) {
      at[slot] = forward_offsets(step, elems.row[slot], elems.unit[slot]);
      load_bias<Cell, T>(step, elems.unit[slot], bias[slot]);
      load_states<Cell, T>(step, elems.row[slot], elems.unit[slot], state[slot]);
      load_input<Cell, T>(step, at[slot], input[slot]);
    }
  init_mbarriers(memory.mbarriers, bytes);

  for (int64_t i = 0; i < params.steps; ++i) {
    if (i) wait_for_exchange(memory.mbarriers, i, bytes);
    const int now = int(i) & 1;

    float sum[Config::kBatchTiles][G][4] = {};
    const auto operand = reinterpret_cast<const U32x2*>(memory.h + now * Memory::kOperandElems) +
                         part * kKFragments * Config::kBatchTiles * kWarpSize + lane;
    RNNKERN_UNROLL
    for (int d = 0; d < kKFragments; ++d) {
      constexpr int F = kFragmentsPerTile<T>;
      RNNKERN_UNROLL
      for (int w = 0; w < Config::kBatchTiles; ++w) {
        const BFragment<T> h(operand[((d / F * Config::kBatchTiles + w) * F + d % F) * kWarpSize]);
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) mma(sum[w][s], weights[d * G + s], h);
      }
    }
    const auto sums = reinterpret_cast<U32x4*>(memory.sums);
    RNNKERN_UNROLL
    for (int w = 0; w < Config::kBatchTiles; ++w) {
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s)
        sums[((warp * Config::kBatchTiles + w) * G + s) * kWarpSize + swizzled_lane(lane)] =
            as_u32x4(sum[w][s]);
    }
    sync_block();

    float saved[Config::kElemsPerThread][Cell::kSaved + 1];
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
      if (elems.in_bounds[slot]) {
        float total[Cell::kPreacts], next[Cell::kStates];
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kPreacts; ++s) total[s] = bias[slot][s];
        const float* products = memory.sums + elems.sum + elems.tile_of[slot] * G * kElemsPerTile;
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) {
          total[Cell::kInputPreact + s] += input[slot][s];
          float product = products[s * kElemsPerTile];
          RNNKERN_UNROLL
          for (int p = 1; p < Config::kSplitK; ++p)
            product +=
                products[(p * Config::kUnitTiles * Config::kBatchTiles * G + s) * kElemsPerTile];
          total[Cell::kHiddenPreact + s] += product;
        }
        cell_forward<Cell, T>(total, state[slot], next, saved[slot]);
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kStates; ++s) state[slot][s] = next[s];
      }

    // A warp's 32 values of a slot go out together, in pieces of 16 bytes, to every block.
    if (i + 1 < params.steps) {
      constexpr int kVectorsPerWarp = kWarpSize / kElemsPerVector<T>,
                    kBlocksPerStore = kWarpSize / kVectorsPerWarp;
      const int piece = lane % kVectorsPerWarp;
      RNNKERN_UNROLL
      for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
        memory.staging[slot * Config::kThreads + thread] =
            elems.in_bounds[slot] ? T(state[slot][0]) : T(0.f);
      sync_warp();
      RNNKERN_UNROLL
      for (int slot = 0; slot < Config::kElemsPerThread; ++slot) {
        const int tile = elems.tile_of[slot];
        if (tile < 0) continue;
        const U32x4 value = reinterpret_cast<const U32x4*>(
            memory.staging + slot * Config::kThreads + warp * kWarpSize)[piece];
        T* to = memory.h + (1 - now) * Memory::kOperandElems +
                (block_rank * Config::kUnitTiles * Config::kBatchTiles + tile) * kElemsPerTile +
                elems.element - lane + piece * kElemsPerVector<T>;
        if (blocks == 1) {
          if (lane < kVectorsPerWarp) *reinterpret_cast<U32x4*>(to) = value;
        } else {
          RNNKERN_UNROLL
          for (int k = 0; k < kMaxClusterSize; k += kBlocksPerStore)
            if (const int block = k + lane / kVectorsPerWarp; block < blocks)
              st_async(to, memory.mbarriers + 1 - now, block, value);
        }
      }
    }

    // While that is on its way.
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
      if (elems.in_bounds[slot]) {
        store_forward<Cell, T>(step, at[slot], state[slot], saved[slot]);
        at[slot] += strides;
        if (i + 1 < params.steps) load_input<Cell, T>(step, at[slot], input[slot]);
      }
  }
  RNNKERN_UNROLL
  for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
    if (elems.in_bounds[slot])
      store_states<Cell, T>(step, elems.row[slot], elems.unit[slot], state[slot]);
  sync_cluster();
}

}  // namespace rnnkern::cuda
