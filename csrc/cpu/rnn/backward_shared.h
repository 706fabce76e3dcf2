// What all blocks of a direction share in the backward pass: packed weights, and the weight
// gradients of each block. Block 0 writes to the result, to which the others are added.
#pragma once
#include <atomic>

#include "../runtime/arena.h"
#include "packed_weights.h"
#include "projection.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
struct BackwardShared {
  using S = Acc<T>;
  using F = PackedElem<T>;

  PackedWeights<T> ih, hh, hr;
  S* zeros;
  WeightGrads<S> grads[Plan::kMaxBlocks];
  std::atomic<int> next{0};  // first block that no worker has taken

  BackwardShared(const BackwardParams<T>& p, const Plan& plan, Arena& arena, int direction)
      : ih{{p.input_size, 1}, p.weights[direction].ih, nullptr, p.hidden_size, Cell::kGates,
           Cell::input_gate,  plan.unpacked_weights},
        hh{unit_layout(p.h_size(), p, plan),
           p.weights[direction].hh,
           nullptr,
           p.hidden_size,
           Cell::kGates,
           Cell::hidden_gate,
           plan.unpacked_weights},
        hr{unit_layout(p.hidden_size, p, plan),
           p.weights[direction].hr,
           nullptr,
           p.proj_size,
           1,
           the_only_gate,
           plan.unpacked_weights} {
    if (direction >= p.directions) return;
    if (appends_input(p, plan)) hh.append_columns(ih.weight, p.input_size);
    for (PackedWeights<T>* w : {&ih, &hh, &hr})
      if (w->weight) w->packed = arena.alloc<F>(w->panels.size(w->k()));
    zeros = arena.alloc<S>(max(p.hidden_size, int64_t(Vec<S>::kLanes)));
    grads[0] = p.grads[direction];
    for (int block = 1; block < plan.blocks(p.sequence.batch); ++block)
      each_gradient(p, [&](S* WeightGrads<S>::* grad, int64_t size) {
        grads[block].*grad = grads[0].*grad ? arena.alloc<S>(size) : nullptr;
      });
  }

  // Whether propagate_dh computes dx too: where this makes fewer panels, and a step has rows and k
  // enough for it.
  static bool appends_input(const BackwardParams<T>& p, const Plan& plan) {
    if (Cell::kInputPreact != Cell::kHiddenPreact || !p.dx.data || p.proj_size ||
        plan.split_units || plan.unpacked_weights || p.sequence.batch < max_mr(kMaxNR) ||
        Cell::kGates * p.hidden_size < kKC)
      return false;
    const PackedLayout<F> x(p.input_size, 1), h(p.hidden_size, 1);
    return PackedLayout<F>(h.padded_cols() + p.input_size, 1).count() < x.count() + h.count();
  }

  template <class F>
  static void each_gradient(const BackwardParams<T>& p, F&& f) {
    const int64_t gate_rows = Cell::kGates * p.hidden_size;
    f(&WeightGrads<S>::ih, gate_rows * p.input_size);
    f(&WeightGrads<S>::hh, gate_rows * p.h_size());
    f(&WeightGrads<S>::bias_ih, gate_rows);
    f(&WeightGrads<S>::bias_hh, gate_rows);
    f(&WeightGrads<S>::hr, p.proj_size * p.hidden_size);
    f(&WeightGrads<S>::params, Cell::kParams * p.hidden_size);
  }

  void pack(const BackwardParams<T>& p, Team team) {
    if (p.dx.data && !hh.appended) ih.pack(team);
    hh.pack(team);
    if (p.proj_size) hr.pack(team);
    if (team.rank == 0)
      for (int64_t u = 0; u < max(p.hidden_size, int64_t(Vec<S>::kLanes)); ++u) zeros[u] = 0;
  }

  void reduce_wgrad(const BackwardParams<T>& p, const Plan& plan, Team team) const {
    each_gradient(p, [&](S* WeightGrads<S>::* grad, int64_t size) {
      S* const sum = grads[0].*grad;
      if (!sum) return;
      for (int block = 1; block < plan.blocks(p.sequence.batch); ++block) {
        const S* const part = grads[block].*grad;
        for (int64_t i = team.begin(size); i < team.end(size); ++i) sum[i] += part[i];
      }
    });
  }
};

}  // namespace rnnkern::RNNKERN_ISA
