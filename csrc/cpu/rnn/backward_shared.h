// What all blocks of a direction share in the backward pass: packed weights, and the weight
// gradients of each block. Block 0 writes to the result, to which the others are added.
#pragma once
#include <atomic>

#include "../runtime/arena.h"
#include "given_sums.h"
#include "heads_backward.h"
#include "projection.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
struct BackwardShared {
  using S = Acc<T>;
  using F = PackedElem<T>;

  static constexpr bool kHeads = Cell::kRecurrent == Recurrent::heads;
  using HiddenWeights = std::conditional_t<kHeads, HeadWeights<T>, PackedWeights<T>>;

  PackedWeights<T> ih, hr;
  HiddenWeights hh;  // its weight is null without W_hh
  S* zeros;
  WeightGrads<S> grads[Plan::kMaxBlocks];
  std::atomic<int> next{0};  // first block that no worker has taken

  BackwardShared(const BackwardParams<T>& p, const Plan& plan, Arena& arena, int direction)
      : ih{{p.input_size, 1}, p.weights[direction].ih, nullptr, p.hidden_size, Cell::kGates,
           Cell::input_gate,  plan.unpacked_weights},
        hr{unit_layout(p.hidden_size, p, plan),
           p.weights[direction].hr,
           nullptr,
           p.proj_size,
           1,
           the_only_gate,
           plan.unpacked_weights},
        hh(hidden_weights(p, plan, p.weights[direction].hh)) {
    if (direction >= p.directions) return;
    if (appends_input(p, plan)) hh.append_columns(ih.weight, p.input_size);
    for (PackedWeights<T>* w : {&ih, static_cast<PackedWeights<T>*>(&hh), &hr})
      if (w->weight) w->packed = arena.alloc<F>(w->panels.size(w->k()));
    zeros = arena.alloc<S>(max(p.hidden_size, int64_t(Vec<S>::kLanes)));
    grads[0] = p.grads[direction];
    for (int block = 1; block < plan.blocks(p.sequence.batch); ++block)
      each_gradient(p, [&](S* WeightGrads<S>::* grad, int64_t size) {
        grads[block].*grad = grads[0].*grad ? arena.alloc<S>(size) : nullptr;
      });
  }

  static HiddenWeights hidden_weights(const BackwardParams<T>& p, const Plan& plan, const T* w_hh) {
    const PackedLayout<F> panels = hidden_layout(p.h_size(), p, plan);
    if constexpr (kHeads)
      return {panels, p.heads, w_hh, Cell::kGates, Cell::hidden_gate};
    else
      return {panels,
              w_hh,
              nullptr,
              p.hidden_size,
              Cell::kGates,
              Cell::hidden_gate,
              plan.unpacked_weights};
  }

  // The layout of columns that are units of h.
  static PackedLayout<F> hidden_layout(int64_t units, const BackwardParams<T>& p,
                                       const Plan& plan) {
    if constexpr (kHeads)
      return head_layout<F>(units, p.heads);
    else
      return unit_layout(units, p, plan);
  }

  // Whether propagate_dh computes dx too: where this makes fewer panels, and a step has rows and k
  // enough for it.
  static bool appends_input(const BackwardParams<T>& p, const Plan& plan) {
    if (Products<Cell>::kGiven || Cell::kMasksHidden || Cell::kInputPreact != Cell::kHiddenPreact ||
        Cell::kRecurrent != Recurrent::dense || !p.dx.data || p.proj_size || plan.split_units ||
        plan.unpacked_weights || p.sequence.batch < max_mr(kMaxNR) ||
        Cell::kGates * p.hidden_size < kKC)
      return false;
    const PackedLayout<F> x(p.input_size, 1), h(p.hidden_size, 1);
    return PackedLayout<F>(h.padded_cols() + p.input_size, 1).count() < x.count() + h.count();
  }

  template <class F>
  static void each_gradient(const BackwardParams<T>& p, F&& f) {
    const int64_t gate_rows = Cell::kGates * p.hidden_size;
    f(&WeightGrads<S>::ih, gate_rows * p.input_size);
    f(&WeightGrads<S>::hh, kHeads ? gate_rows * p.h_size() / p.heads : gate_rows * p.h_size());
    f(&WeightGrads<S>::bias_ih, gate_rows);
    f(&WeightGrads<S>::bias_hh, gate_rows);
    f(&WeightGrads<S>::hr, p.proj_size * p.hidden_size);
    f(&WeightGrads<S>::params, Cell::kParams * p.hidden_size);
  }

  void pack(const BackwardParams<T>& p, Team team) {
    if (!Products<Cell>::kGiven && p.dx.data && !hh.appended) ih.pack(team);
    if (Cell::kRecurrent != Recurrent::none) hh.pack(team);
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
