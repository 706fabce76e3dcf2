// Steps of a run backward (cluster.h says how): one block's share, one thread of it.
#pragma once
#include "cluster.h"

namespace rnnkern::cuda {

template <class Cell, class T, class Config>
struct BackwardSmem {
  static constexpr int G = Cell::kGates;
  using Weights = WeightFragmentsFor<T, Config, G>;
  static constexpr int kOperandElems = G * Config::kUnitTiles * Config::kBatchTiles * kElemsPerTile;

  uint64_t* mbarriers;
  T* dgates;           // the right operand, twice: (gate, tile of units, row tile, tile)
  float* dh_partials;  // twice: (block that sent it, tile of units, row tile, tile)
  U32x4* weights;
  size_t bytes;

  RNNKERN_HD BackwardSmem(char* memory, int blocks) {
    SmemCarver pieces(memory);
    mbarriers = pieces.alloc<uint64_t>(2);
    dgates = pieces.alloc<T>(2 * kOperandElems);
    dh_partials = pieces.alloc<float>(2 * blocks * Config::kBlockElems);
    weights = pieces.alloc<U32x4>(Weights::kSmemVectors);
    bytes = pieces.bytes();
  }
};

template <class Cell, class T, class Config>
size_t smem_bytes(const PersistentBackwardParams*, int blocks) {
  return BackwardSmem<Cell, T, Config>(nullptr, blocks).bytes;
}

template <class Cell, class T, class Config>
RNNKERN_DEVICE void run_cluster(const PersistentBackwardParams& params) {
  constexpr int G = Cell::kGates, kKTiles = G * Config::kUnitTiles;
  constexpr int kKFragments = kKTiles * kFragmentsPerTile<T>;
  using Memory = BackwardSmem<Cell, T, Config>;
  const StepBackwardParams& step = params.step;
  const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int block_rank = block_rank_in_cluster(), blocks = blocks_in_cluster(), H = int(step.units);
  const int bytes = blocks * Config::kBlockElems * int(sizeof(float));
  const Memory memory(dynamic_smem(), blocks);
  const ThreadPartition<T, Config> elems(H, step.batch);

  typename Memory::Weights weights;
  const auto w_hh = static_cast<const T*>(params.w_hh);
  weights.load(memory.weights, warp, lane, [&](int f, int row, int column) {
    constexpr int F = kFragmentsPerTile<T>;
    const int to = (warp * Config::kWarpTiles + f / kKFragments) * kUnitsPerTile + row;
    const int tile = f % kKFragments / F, gate = tile / Config::kUnitTiles,
              group = tile % Config::kUnitTiles;
    const int unit =
        (block_rank * Config::kUnitTiles + group) * kUnitsPerTile + f % F * kFragmentK<T> + column;
    return unit < H && to < H ? w_hh[(int64_t(Cell::hidden_gate(gate)) * H + unit) * H + to]
                              : T(0.f);
  });

  float dh[Config::kElemsPerThread], dc[Config::kElemsPerThread],
      dh_recurrent[Config::kElemsPerThread];
  T dy[Config::kElemsPerThread];
  SavedValues<Cell, T> saved_values[Config::kElemsPerThread];
  BackwardOffsets at[Config::kElemsPerThread];
  const BackwardOffsets strides{
      params.y_step, params.dy_step, params.row_step * H, params.row_step * H, 0, 0, false};
  const auto load = [&](int slot, int64_t i) {
    PrevStepOffset before = prev_step_offset(step);
    if (i + 1 == params.steps) {
      before = {params.last_prev_y, params.last_prev_row * H};
      at[slot].began = elems.row[slot] >= params.last_prev_batch;
    }
    load_saved<Cell, T>(step, at[slot], before, &saved_values[slot]);
    if (step.dy) dy[slot] = static_cast<const T*>(step.dy)[at[slot].dy];
  };
  RNNKERN_UNROLL
  for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
    if (elems.in_bounds[slot]) {
      at[slot] = backward_offsets(step, elems.row[slot], elems.unit[slot]);
      const int64_t first = at[slot].first;
      dh[slot] = static_cast<const float*>(step.dh)[first];
      dh_recurrent[slot] = static_cast<const float*>(step.dh_recurrent)[first];
      if constexpr (Cell::kStates == 2) dc[slot] = static_cast<const float*>(step.dc)[first];
      load(slot, 0);
    }
  init_mbarriers(memory.mbarriers, bytes);

  const auto receive = [&](int64_t i) {
    wait_for_exchange(memory.mbarriers, i, bytes);
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
      if (elems.tile_of[slot] >= 0) {
        const float* from = memory.dh_partials + (int(i) & 1) * blocks * Config::kBlockElems +
                            elems.tile_of[slot] * kElemsPerTile + elems.sum;
        float part[4] = {};
        RNNKERN_UNROLL
        for (int block = 0; block < kMaxClusterSize; ++block)
          part[block % 4] += block < blocks ? from[block * Config::kBlockElems] : 0.f;
        dh_recurrent[slot] = (part[0] + part[1]) + (part[2] + part[3]);
      }
  };

  for (int64_t i = 0; i < params.steps; ++i) {
    if (i) receive(i);
    const int now = int(i) & 1;
    T* const operand = memory.dgates + now * Memory::kOperandElems;
    float dnext[Config::kElemsPerThread][Cell::kStates],
        dgates[Config::kElemsPerThread][Cell::kPreacts];
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot) {
      const int tile = elems.tile_of[slot];
      if (tile < 0) continue;
      RNNKERN_UNROLL
      for (int s = 0; s < Cell::kPreacts; ++s) dgates[slot][s] = 0.f;
      if (elems.in_bounds[slot]) {
        float dprev[Cell::kStates];
        dnext[slot][0] = dh[slot] + dh_recurrent[slot];
        if (step.dy) dnext[slot][0] += float(dy[slot]);
        if constexpr (Cell::kStates == 2) dnext[slot][1] = dc[slot];
        cell_backward<Cell, T>(saved_values[slot], dnext[slot], dprev, dgates[slot]);
        dh[slot] = dprev[0];
        if constexpr (Cell::kStates == 2) dc[slot] = dprev[1];
      }
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s)
        operand[(s * Config::kUnitTiles * Config::kBatchTiles + tile) * kElemsPerTile +
                elems.element] = T(dgates[slot][Cell::kHiddenPreact + s]);
    }
    sync_block();

    // Independent sums, so that a product need not wait for the one before.
    constexpr int kAccumulators = Config::kWarpTiles * Config::kBatchTiles < 4
                                      ? 4 / (Config::kWarpTiles * Config::kBatchTiles)
                                      : 1;
    float sum[kAccumulators][Config::kWarpTiles][Config::kBatchTiles][4] = {};
    const auto right = reinterpret_cast<const U32x2*>(operand) + lane;
    RNNKERN_UNROLL
    for (int d = 0; d < kKFragments; ++d) {
      constexpr int F = kFragmentsPerTile<T>;
      RNNKERN_UNROLL
      for (int w = 0; w < Config::kBatchTiles; ++w) {
        const BFragment<T> values(
            right[((d / F * Config::kBatchTiles + w) * F + d % F) * kWarpSize]);
        RNNKERN_UNROLL
        for (int m = 0; m < Config::kWarpTiles; ++m)
          mma(sum[d % kAccumulators][m][w], weights[m * kKFragments + d], values);
      }
    }
    RNNKERN_UNROLL
    for (int m = 0; m < Config::kWarpTiles; ++m) {
      const int tile = warp * Config::kWarpTiles + m, block = tile / Config::kUnitTiles;
      if (block >= blocks) continue;
      RNNKERN_UNROLL
      for (int w = 0; w < Config::kBatchTiles; ++w) {
        RNNKERN_UNROLL
        for (int j = 0; j < 4; ++j) {
          RNNKERN_UNROLL
          for (int c = 1; c < kAccumulators; ++c) sum[0][m][w][j] += sum[c][m][w][j];
        }
        float* to = memory.dh_partials + ((1 - now) * blocks + block_rank) * Config::kBlockElems +
                    (tile % Config::kUnitTiles * Config::kBatchTiles + w) * kElemsPerTile;
        U32x4* const slot = reinterpret_cast<U32x4*>(to) + swizzled_lane(lane);
        if (blocks == 1)
          *slot = as_u32x4(sum[0][m][w]);
        else
          st_async(slot, memory.mbarriers + 1 - now, block, as_u32x4(sum[0][m][w]));
      }
    }

    // While that is on its way.
    RNNKERN_UNROLL
    for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
      if (elems.in_bounds[slot]) {
        store_backward<Cell, T>(step, at[slot], saved_values[slot], dnext[slot], dgates[slot]);
        at[slot] += strides;
        if (i + 1 < params.steps) load(slot, i + 1);
      }
  }
  receive(params.steps);
  RNNKERN_UNROLL
  for (int slot = 0; slot < Config::kElemsPerThread; ++slot)
    if (elems.in_bounds[slot]) {
      const int64_t first = at[slot].first;
      static_cast<float*>(step.dh)[first] = dh[slot];
      static_cast<float*>(step.dh_recurrent)[first] = dh_recurrent[slot];
      if constexpr (Cell::kStates == 2) static_cast<float*>(step.dc)[first] = dc[slot];
    }
  sync_cluster();
}

}  // namespace rnnkern::cuda
