// The persistent forward kernel, for one thread: its registers, and the phases of a time step.
//
//   load_weights, load_h0, load_elements
//   each step:  receive_h | mma_mainloop, store_partials | sync | reduce_and_epilogue |
//               send_h | store_and_prefetch, while the exchange is in flight
//   store_final_states
//
// With resets, a step stores the states it ends with, but sends and keeps those that the next step
// begins with. States after a reset are loaded a step ahead.
//
// A block multiplies the rows of W_hh of its units by h of all units. kSplitK warps share K of one
// unit tile; the epilogue adds their partial sums and finishes the block's units.
#pragma once
#include "../step.h"
#include "exchange.h"

namespace rnnkern::cuda {

template <class Cell, class T, class Config>
struct ForwardSmem {
  static constexpr int G = Cell::kGates;
  using Weights = WeightFragmentsFor<T, Config, G>;
  static constexpr int kHElems = Config::kGroupElems;
  using Exchange = ExchangeFor<T, Config>;

  uint64_t* mbarriers;
  T* h;             // the exchange's buffers: B operand of all units
  float* partials;  // accumulators, at partial()
  T* staging;       // (element of a thread, thread): new h
  AFragment* weights;
  size_t bytes;

  RNNKERN_HD explicit ForwardSmem(char* memory) {
    SmemCarver carver(memory);
    mbarriers = carver.alloc<uint64_t>(Exchange::kBarriers);
    h = carver.alloc<T>(Exchange::kHBuffers * kHElems);
    partials = carver.alloc<float>(Config::kSplitK * Config::kBlockTiles * G * kElemsPerTile);
    staging = carver.alloc<T>(Config::kElemsPerThread * Config::kThreads);
    weights = carver.alloc<AFragment>(Weights::kSmemFragments);
    bytes = carver.bytes();
  }

  RNNKERN_DEVICE_MEMBER const T* h_of_step(int64_t i) const {
    return h + buffer_of(i) % Exchange::kHBuffers * kHElems;
  }
  // (warp, batch tile, gate); of a part of K the warps of all unit tiles follow each other, so that
  // (warp, batch tile) is (part of K, tile of the block) as well.
  RNNKERN_DEVICE_MEMBER static int partial(int warp_tile, int gate) {
    return (warp_tile * G + gate) * kElemsPerTile;
  }
};

template <class Cell, class T, class Config>
size_t smem_bytes(const PersistentForwardParams*, int /*blocks*/) {
  return ForwardSmem<Cell, T, Config>(nullptr).bytes;
}

// The object has scalars only. Arrays are locals of run(): their indices are constant only once
// the loops are unrolled, and until then the compiler keeps the whole object around them in memory.
template <class Cell, class T, class Config, bool kResets>
struct ForwardThread {
  static constexpr int G = Cell::kGates, kElems = Config::kElemsPerThread;
  static constexpr int kKFragments =  // of a warp
      Config::kLayerTiles / Config::kSplitK * kFragmentsPerTile<T>;
  using Smem = ForwardSmem<Cell, T, Config>;
  using Exchange = typename Smem::Exchange;
  using Accumulators = float[Config::kBatchTiles][G][4];
  using Saved = float[kElems][Cell::kSaved + 1];
  using Weights = typename Smem::Weights;
  using Partition = ThreadPartition<T, Config>;

  // Of a thread's elements, from step to step.
  struct Registers {
    float state[kElems][Cell::kStates], bias[kElems][Cell::kPreacts], input[kElems][G];
    ForwardOffsets at[kElems];
    // With resets alone: whether the row is reset before the next step, and to which states.
    bool is_reset[kElems];
    float state_after_reset[kElems][Cell::kStates];
  };

  const PersistentForwardParams& params;
  const StepForwardParams& step;
  const int thread, warp, lane, block_rank, H;
  const int unit_tile, split;  // of the block's, and which part of K
  const Smem smem;
  const Exchange exchange;
  const ForwardOffsets strides;  // from one step to the next

  RNNKERN_DEVICE_MEMBER explicit ForwardThread(const PersistentForwardParams& p)
      : params(p),
        step(p.step),
        thread(thread_index()),
        warp(thread / kWarpSize),
        lane(thread % kWarpSize),
        block_rank(block_rank_in_group()),
        H(int(step.units)),
        unit_tile(warp % Config::kUnitTiles),
        split(warp / Config::kUnitTiles),
        smem(dynamic_smem()),
        exchange(smem.mbarriers, exchange_memory<Config>(p), int(sizeof(T))),
        strides{p.row_step * step.input_stride, p.row_step * step.y_stride, p.row_step * H, 0} {}

  RNNKERN_DEVICE_MEMBER void load_weights(Weights& weights) const {
    const auto w_hh = static_cast<const T*>(params.w_hh);
    weights.load(smem.weights, warp, lane, [&](int fragment, int m, int k) {
      const int gate = Cell::hidden_gate(fragment % G);
      const int unit = (block_rank * Config::kUnitTiles + unit_tile) * kUnitsPerTile + m;
      const int from = (split * kKFragments + fragment / G) * kFragmentK<T> + k;
      const bool inside = unit < H && from < H;
      return inside ? w_hh[(int64_t(gate) * H + unit) * H + from] : T(0.f);
    });
  }

  // h before the first step, of all units; units and rows beyond the last are zero in all buffers.
  RNNKERN_DEVICE_MEMBER void load_h0() const {
    const auto h0 = static_cast<const T*>(step.h_operand ? step.h_operand : step.h);
    for (int i = thread; i < Smem::kHElems; i += Config::kThreads) {
      const TileCoord coord = b_tile_coord<T>(i % kElemsPerTile);
      const int tile = i / kElemsPerTile;
      const int unit = tile / Config::kBatchTiles * kUnitsPerTile + coord.unit;
      const int64_t row =
          first_row<Config>(params) + tile % Config::kBatchTiles * kRowsPerTile + coord.row;
      smem.h[i] = unit < H && row < step.batch ? h0[row * H + unit] : T(0.f);
      if constexpr (Exchange::kHBuffers > 1) smem.h[Smem::kHElems + i] = T(0.f);
    }
  }

  RNNKERN_DEVICE_MEMBER void load_elements(const Partition& elems, Registers& regs) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        regs.at[e] = forward_offsets(step, elems.row[e], elems.unit[e]);
        load_bias<Cell, T>(step, elems.unit[e], regs.bias[e]);
        load_states<Cell, T>(step, elems.row[e], elems.unit[e], regs.state[e]);
        load_input<Cell, T>(step, regs.at[e], regs.input[e]);
        load_next_reset(elems, regs, e, 0);
      }
  }

  // The reset before the step that follows step i.
  RNNKERN_DEVICE_MEMBER void load_next_reset(const Partition& elems, Registers& regs, int e,
                                             int64_t i) const {
    if constexpr (kResets)
      regs.is_reset[e] = load_reset<Cell, T>(step, step.t + i + 1, elems.row[e], elems.unit[e],
                                             regs.state_after_reset[e]);
  }

  // A state that the next step begins with.
  RNNKERN_DEVICE_MEMBER float carried(const Registers& regs, int e, int s) const {
    if constexpr (kResets)
      if (regs.is_reset[e]) return regs.state_after_reset[e][s];
    return regs.state[e][s];
  }

  // The warp's part of W_hh h: M = 16 units of each gate, N = the group's rows.
  RNNKERN_DEVICE_MEMBER void mma_mainloop(const Weights& weights, int64_t i,
                                          Accumulators& acc) const {
    const auto h = reinterpret_cast<const U32x2*>(smem.h_of_step(i)) +
                   b_fragment_index<T, Config>(split * kKFragments, 0) + lane;
    RNNKERN_UNROLL
    for (int k = 0; k < kKFragments; ++k) {
      RNNKERN_UNROLL
      for (int n = 0; n < Config::kBatchTiles; ++n) {
        const BFragment<T> b(h[b_fragment_index<T, Config>(k, n)]);
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) mma(acc[n][s], weights[k * G + s], b);
      }
    }
  }

  RNNKERN_DEVICE_MEMBER void store_partials(const Accumulators& acc) const {
    RNNKERN_UNROLL
    for (int n = 0; n < Config::kBatchTiles; ++n) {
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s) {
        float* tile = smem.partials + Smem::partial(warp * Config::kBatchTiles + n, s);
        reinterpret_cast<U32x4*>(tile)[acc_vector(lane)] = as_u32x4(acc[n][s]);
      }
    }
  }

  // Adds the parts of K in order, then runs the cell: new states, and what backward needs.
  RNNKERN_DEVICE_MEMBER void reduce_and_epilogue(const Partition& elems, Registers& regs,
                                                 Saved& saved) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        float preact[Cell::kPreacts], next[Cell::kStates];
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kPreacts; ++s) preact[s] = regs.bias[e][s];
        RNNKERN_UNROLL
        for (int s = 0; s < G; ++s) {
          preact[Cell::kInputPreact + s] += regs.input[e][s];
          const float* partials = smem.partials + Smem::partial(elems.tile[e], s) + elems.acc;
          float product = partials[0];
          RNNKERN_UNROLL
          for (int p = 1; p < Config::kSplitK; ++p)
            product += partials[Smem::partial(p * Config::kBlockTiles, 0)];
          preact[Cell::kHiddenPreact + s] += product;
        }
        cell_forward<Cell, T>(preact, regs.state[e], next, saved[e]);
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kStates; ++s) regs.state[e][s] = next[s];
      }
  }

  // For step i, by warp: 32 values at a time.
  RNNKERN_DEVICE_MEMBER void send_h(const Partition& elems, const Registers& regs,
                                    int64_t i) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      smem.staging[e * Config::kThreads + thread] =
          elems.in_bounds[e] ? T(carried(regs, e, 0)) : T(0.f);
    sync_warp();
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e) {
      if (elems.tile[e] < 0) continue;
      const int tile = block_rank * Config::kBlockTiles + elems.tile[e];
      exchange.send_h(smem.h, i, tile * kElemsPerTile + elems.element - lane,
                      smem.staging + e * Config::kThreads + warp * kWarpSize);
    }
  }

  RNNKERN_DEVICE_MEMBER void store_and_prefetch(const Partition& elems, Registers& regs,
                                                const Saved& saved, int64_t i) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        store_forward<Cell, T>(step, regs.at[e], regs.state[e], saved[e]);
        RNNKERN_UNROLL
        for (int s = 0; s < Cell::kStates; ++s) regs.state[e][s] = carried(regs, e, s);
        regs.at[e] += strides;
        if (i + 1 < params.steps) {
          load_input<Cell, T>(step, regs.at[e], regs.input[e]);
          load_next_reset(elems, regs, e, i + 1);
        }
      }
  }

  RNNKERN_DEVICE_MEMBER void store_final_states(const Partition& elems,
                                                const Registers& regs) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e])
        store_states<Cell, T>(step, elems.row[e], elems.unit[e], regs.state[e]);
  }

  RNNKERN_DEVICE_MEMBER void run() const {
    const Partition elems(H, step.batch, first_row<Config>(params));
    Weights weights;
    Registers regs;
    load_weights(weights);
    load_h0();
    load_elements(elems, regs);
    exchange.init();
    for (int64_t i = 0; i < params.steps; ++i) {
      if (i) exchange.receive_h(smem.h, i);
      Accumulators acc = {};
      mma_mainloop(weights, i, acc);
      store_partials(acc);
      sync_block();
      Saved saved;
      reduce_and_epilogue(elems, regs, saved);
      if (i + 1 < params.steps) send_h(elems, regs, i + 1);
      store_and_prefetch(elems, regs, saved, i);
    }
    store_final_states(elems, regs);
    exchange.finish();
  }
};

template <class Cell, class T, class Config, bool kResets>
RNNKERN_DEVICE void persistent_thread(const PersistentForwardParams& params) {
  ForwardThread<Cell, T, Config, kResets>(params).run();
}

}  // namespace rnnkern::cuda
