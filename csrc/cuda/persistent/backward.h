// The persistent backward kernel, for one thread: its registers, and the phases of a time step.
//
//   load_weights, load_elements
//   each step:  receive_dh | cell_epilogue | sync | mma_mainloop, send_dh |
//               store_and_prefetch, while the exchange is in flight
//   receive_dh, store_final_states
//
// A block multiplies the rows of W_hh of its units, transposed, by dgates of its units, and so has
// a part of W_hh^T dgates for all units. Each part goes to the block that owns the units.
//
// Where the next step in time began with a reset, dh and dc end: carry_gradients hands them to the
// states that the row got there.
#pragma once
#include "../step.h"
#include "exchange.h"

namespace rnnkern::cuda {

template <class Cell, class T, class Config>
struct BackwardSmem {
  static constexpr int G = Cell::kGates;
  using Weights = WeightFragmentsFor<T, Config, G>;
  static constexpr int kDgatesElems = G * Config::kBlockTiles * kElemsPerTile;
  using Exchange = ExchangeFor<T, Config>;

  uint64_t* mbarriers;
  T* dgates;       // two buffers: B operand of the block's units, (gate, tile)
  float* dh_sums;  // the exchange's buffers: accumulators of each sender, at dh_sums()
  AFragment* weights;
  size_t bytes;

  RNNKERN_HD BackwardSmem(char* memory, int blocks) {
    SmemCarver carver(memory);
    const int senders = Exchange::senders(blocks);
    mbarriers = carver.alloc<uint64_t>(Exchange::kBarriers);
    dgates = carver.alloc<T>(2 * kDgatesElems);
    dh_sums = carver.alloc<float>(Exchange::kDhBuffers * senders * Config::kBlockElems);
    weights = carver.alloc<AFragment>(Weights::kSmemFragments);
    bytes = carver.bytes();
  }

  RNNKERN_DEVICE_MEMBER static int dgates_tile(int gate, int tile) {
    return (gate * Config::kBlockTiles + tile) * kElemsPerTile;
  }
};

template <class Cell, class T, class Config>
size_t smem_bytes(const PersistentBackwardParams*, int blocks) {
  return BackwardSmem<Cell, T, Config>(nullptr, blocks).bytes;
}

constexpr int largest_divisor(int n, int at_most) {
  while (n % at_most) --at_most;
  return at_most;
}

// Scalars only, as in ForwardThread.
template <class Cell, class T, class Config, bool kResets>
struct BackwardThread {
  static constexpr int G = Cell::kGates, kElems = Config::kElemsPerThread;
  static constexpr int kKFragments =  // of a warp
      G * Config::kUnitTiles / Config::kBackwardSplitK * kFragmentsPerTile<T>;
  // Accumulators of one product: independent mma chains hide the latency of a short K.
  static constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kBatchTiles;
  static constexpr int kMTilesAtOnce =  // larger layers than a cluster holds: in several products
      Config::kGroup == Group::grid ? largest_divisor(kMTiles, 8 / kNTiles) : kMTiles;
  static constexpr int kChains = kMTiles * kNTiles < 4 ? 4 / (kMTiles * kNTiles) : 1;
  using Smem = BackwardSmem<Cell, T, Config>;
  using Exchange = typename Smem::Exchange;
  using Accumulators = float[kChains][kMTilesAtOnce][kNTiles][4];
  using Weights = typename Smem::Weights;
  using Partition = ThreadPartition<T, Config>;

  // Of a thread's elements, from step to step.
  struct Registers {
    float dh[kElems], dc[kElems], dh_recurrent[kElems];
    T dy[kElems];
    SavedValues<Cell, T> saved[kElems];
    BackwardOffsets at[kElems];
    // With resets alone: whether the row is reset before this step, and before the next in time.
    bool is_reset[kElems], ended[kElems];
  };
  // Of a thread's elements, within a step.
  struct Gradients {
    float dnext[kElems][Cell::kStates], dgates[kElems][Cell::kPreacts];
  };

  const PersistentBackwardParams& params;
  const StepBackwardParams& step;
  const int warp, lane, block_rank, blocks, H;
  const int m_tile, split;  // the warp's first of the layer, and which part of K
  const Smem smem;
  const Exchange exchange;
  const BackwardOffsets strides;  // from one step to the next

  RNNKERN_DEVICE_MEMBER explicit BackwardThread(const PersistentBackwardParams& p)
      : params(p),
        step(p.step),
        warp(thread_index() / kWarpSize),
        lane(thread_index() % kWarpSize),
        block_rank(block_rank_in_group()),
        blocks(blocks_in_group()),
        H(int(step.units)),
        m_tile(Config::kBackwardSplitK > 1 ? warp % Config::kLayerTiles : warp * kMTiles),
        split(Config::kBackwardSplitK > 1 ? warp / Config::kLayerTiles : 0),
        smem(dynamic_smem(), blocks),
        exchange(smem.mbarriers, exchange_memory<Config>(p), int(sizeof(float))),
        strides{p.y_step, p.dy_step, p.row_step * H, p.row_step * H, 0, 0, false} {}

  RNNKERN_DEVICE_MEMBER void load_weights(Weights& weights) const {
    constexpr int F = kFragmentsPerTile<T>;
    const auto w_hh = static_cast<const T*>(params.w_hh);
    weights.load(smem.weights, warp, lane, [&](int fragment, int m, int k) {
      const int to = (m_tile + fragment / kKFragments) * kUnitsPerTile + m;
      const int k_tile = (split * kKFragments + fragment % kKFragments) / F;
      const int gate = k_tile / Config::kUnitTiles;
      const int unit_tile = block_rank * Config::kUnitTiles + k_tile % Config::kUnitTiles;
      const int unit = unit_tile * kUnitsPerTile + fragment % F * kFragmentK<T> + k;
      const bool inside = unit < H && to < H;
      return inside ? w_hh[(int64_t(Cell::hidden_gate(gate)) * H + unit) * H + to] : T(0.f);
    });
  }

  // What element e reads at step i.
  RNNKERN_DEVICE_MEMBER void load_step(const Partition& elems, Registers& regs, int e,
                                       int64_t i) const {
    PrevStepOffset prev = prev_step_offset(step);
    if (i + 1 == params.steps) {
      prev = {params.last_prev_y, params.last_prev_row * H};
      regs.at[e].began = elems.row[e] >= params.last_prev_batch;
    }
    load_saved<Cell, T>(step, regs.at[e], prev, &regs.saved[e]);
    if constexpr (kResets)
      regs.is_reset[e] =
          load_reset<Cell, T>(step, step.t - i, elems.row[e], elems.unit[e], &regs.saved[e]);
    if (step.dy) regs.dy[e] = static_cast<const T*>(step.dy)[regs.at[e].dy];
  }

  RNNKERN_DEVICE_MEMBER void load_elements(const Partition& elems, Registers& regs) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        regs.at[e] = backward_offsets(step, elems.row[e], elems.unit[e]);
        const int64_t state = regs.at[e].first;
        regs.dh[e] = static_cast<const float*>(step.dh)[state];
        regs.dh_recurrent[e] = static_cast<const float*>(step.dh_recurrent)[state];
        if constexpr (Cell::kStates == 2) regs.dc[e] = static_cast<const float*>(step.dc)[state];
        if constexpr (kResets) regs.ended[e] = is_reset(step.resets, step.t + 1, elems.row[e]);
        load_step(elems, regs, e, 0);
      }
  }

  // W_hh^T dgates of step i - 1, added up over the senders in a fixed order.
  RNNKERN_DEVICE_MEMBER void receive_dh(const Partition& elems, Registers& regs, int64_t i) const {
    exchange.receive_dh(smem.dh_sums, i);
    const int senders = Exchange::senders(blocks),
              first = buffer_of(i) % Exchange::kDhBuffers * senders;
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.tile[e] >= 0) {
        const float* from = smem.dh_sums + dh_sums<Config>(first, elems.tile[e]) + elems.acc;
        float part[4] = {};
        RNNKERN_UNROLL
        for (int s = 0; s < Exchange::kMaxSenders; ++s)
          part[s % 4] += s < senders ? from[dh_sums<Config>(s, 0)] : 0.f;
        regs.dh_recurrent[e] = (part[0] + part[1]) + (part[2] + part[3]);
      }
  }

  // The derivatives by the states after step i, but for dy.
  RNNKERN_DEVICE_MEMBER void carry_gradients(const Partition& elems, const Registers& regs,
                                             Gradients& grads, int e, int64_t i) const {
    float* const dnext = grads.dnext[e];
    dnext[0] = regs.dh[e] + regs.dh_recurrent[e];
    if constexpr (Cell::kStates == 2) dnext[1] = regs.dc[e];
    if constexpr (kResets)
      if (regs.ended[e]) {
        const int64_t t = step.t - i + 1;
        end_gradient(step.dreset_h, t, elems.row[e], elems.unit[e], &dnext[0]);
        if constexpr (Cell::kStates == 2)
          end_gradient(step.dreset_c, t, elems.row[e], elems.unit[e], &dnext[1]);
      }
  }

  // The cell's adjoint; dgates becomes the B operand of the product.
  RNNKERN_DEVICE_MEMBER void cell_epilogue(const Partition& elems, Registers& regs, T* operand,
                                           Gradients& grads, int64_t i) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e) {
      if (elems.tile[e] < 0) continue;
      RNNKERN_UNROLL
      for (int s = 0; s < Cell::kPreacts; ++s) grads.dgates[e][s] = 0.f;
      if (elems.in_bounds[e]) {
        float dprev[Cell::kStates];
        carry_gradients(elems, regs, grads, e, i);
        if (step.dy) grads.dnext[e][0] += float(regs.dy[e]);
        cell_backward<Cell, T>(regs.saved[e], grads.dnext[e], dprev, grads.dgates[e]);
        regs.dh[e] = dprev[0];
        if constexpr (Cell::kStates == 2) regs.dc[e] = dprev[1];
      }
      RNNKERN_UNROLL
      for (int s = 0; s < G; ++s)
        operand[Smem::dgates_tile(s, elems.tile[e]) + elems.element] =
            T(grads.dgates[e][Cell::kHiddenPreact + s]);
    }
  }

  // M = unit tiles of the layer from the warp's m0-th on, N = the group's rows, K = gates of the
  // block's units.
  RNNKERN_DEVICE_MEMBER void mma_mainloop(const Weights& weights, const T* operand, int m0,
                                          Accumulators& acc) const {
    const auto dgates = reinterpret_cast<const U32x2*>(operand) +
                        b_fragment_index<T, Config>(split * kKFragments, 0) + lane;
    RNNKERN_UNROLL
    for (int k = 0; k < kKFragments; ++k) {
      RNNKERN_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        const BFragment<T> b(dgates[b_fragment_index<T, Config>(k, n)]);
        RNNKERN_UNROLL
        for (int m = 0; m < kMTilesAtOnce; ++m)
          mma(acc[k % kChains][m][n], weights[(m0 + m) * kKFragments + k], b);
      }
    }
  }

  // Sends each tile of the product, for step i, to the block that owns its units.
  RNNKERN_DEVICE_MEMBER void send_dh(int m0, int64_t i, Accumulators& acc) const {
    RNNKERN_UNROLL
    for (int m = 0; m < kMTilesAtOnce; ++m) {
      const int tile = m_tile + m0 + m, block = tile / Config::kUnitTiles;
      if (block >= blocks) continue;
      RNNKERN_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        RNNKERN_UNROLL
        for (int j = 0; j < 4; ++j) {
          RNNKERN_UNROLL
          for (int c = 1; c < kChains; ++c) acc[0][m][n][j] += acc[c][m][n][j];
        }
        exchange.send_dh(smem.dh_sums, i, block, tile % Config::kUnitTiles * kNTiles + n,
                         as_u32x4(acc[0][m][n]));
      }
    }
  }

  RNNKERN_DEVICE_MEMBER void store_and_prefetch(const Partition& elems, Registers& regs,
                                                const Gradients& grads, int64_t i) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        store_backward<Cell, T>(step, regs.at[e], regs.saved[e], grads.dnext[e], grads.dgates[e]);
        regs.at[e] += strides;
        if constexpr (kResets) regs.ended[e] = regs.is_reset[e];
        if (i + 1 < params.steps) load_step(elems, regs, e, i + 1);
      }
  }

  RNNKERN_DEVICE_MEMBER void store_final_states(const Partition& elems,
                                                const Registers& regs) const {
    RNNKERN_UNROLL
    for (int e = 0; e < kElems; ++e)
      if (elems.in_bounds[e]) {
        const int64_t state = regs.at[e].first;
        static_cast<float*>(step.dh)[state] = regs.dh[e];
        static_cast<float*>(step.dh_recurrent)[state] = regs.dh_recurrent[e];
        if constexpr (Cell::kStates == 2) static_cast<float*>(step.dc)[state] = regs.dc[e];
      }
  }

  RNNKERN_DEVICE_MEMBER void run() const {
    const Partition elems(H, step.batch, first_row<Config>(params));
    Weights weights;
    Registers regs;
    load_weights(weights);
    load_elements(elems, regs);
    exchange.init();
    for (int64_t i = 0; i < params.steps; ++i) {
      if (i) receive_dh(elems, regs, i);
      T* const operand = smem.dgates + buffer_of(i) * Smem::kDgatesElems;
      Gradients grads;
      cell_epilogue(elems, regs, operand, grads, i);
      sync_block();
      RNNKERN_UNROLL
      for (int m = 0; m < kMTiles; m += kMTilesAtOnce) {
        Accumulators acc = {};
        mma_mainloop(weights, operand, m, acc);
        send_dh(m, i + 1, acc);
      }
      store_and_prefetch(elems, regs, grads, i);
    }
    receive_dh(elems, regs, params.steps);
    store_final_states(elems, regs);
    exchange.finish();
  }
};

template <class Cell, class T, class Config, bool kResets>
RNNKERN_DEVICE void persistent_thread(const PersistentBackwardParams& params) {
  BackwardThread<Cell, T, Config, kResets>(params).run();
}

}  // namespace rnnkern::cuda
