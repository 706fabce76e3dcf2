// What all blocks of a direction share in the backward pass: its weights, packed, and its weight
// gradients, block by block; those of the first are the result's place.
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
  std::atomic<int> next{0};  // block that nobody has taken yet

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

  // Whether dx is a part of the product that carries dh back: where this makes fewer panels, and
  // the rows and terms of a step are enough for it.
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
    const int64_t sums = Cell::kGates * p.hidden_size;
    f(&WeightGrads<S>::ih, sums * p.input_size);
    f(&WeightGrads<S>::hh, sums * p.h_size());
    f(&WeightGrads<S>::bias_ih, sums);
    f(&WeightGrads<S>::bias_hh, sums);
    f(&WeightGrads<S>::hr, p.proj_size * p.hidden_size);
  }

  void pack(const BackwardParams<T>& p, Team team) {
    if (p.dx.data && !hh.appended) ih.pack(team);
    hh.pack(team);
    if (p.proj_size) hr.pack(team);
    if (team.rank == 0)
      for (int64_t u = 0; u < max(p.hidden_size, int64_t(Vec<S>::kLanes)); ++u) zeros[u] = 0;
  }

  void gate_gemm(const BackwardParams<T>& p, const Plan& plan, Team team) const {
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
