// The weight gradients of a block of batch rows: which gate gradients belong to which weights.
#pragma once
#include "backward_shared.h"
#include "wgrad.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BlockWgrad {
  using S = Acc<T>;
  using Shared = BackwardShared<Cell, T>;
  static constexpr bool kRecurs = Products<Cell>::kRecurs, kGiven = Products<Cell>::kGiven;
  static constexpr bool kHeads = Shared::kHeads;
  // Whether each pre-activation is of one gate, for W_ih and for W_hh.
  static constexpr bool kSharesPreacts = [] {
    bool same = Cell::kInputPreact == Cell::kHiddenPreact;
    for (int s = 0; s < Cell::kGates; ++s) same &= Cell::input_gate(s) == Cell::hidden_gate(s);
    return same;
  }();
  static constexpr int kHidden = Products<Cell>::kHidden;

 public:
  BlockWgrad(const BackwardParams<T>& p, const Shared& shared, const WeightGrads<S>& grads,
             Arena& arena)
      : shared_(shared),
        wgrad_(make_wgrad(p, grads, arena)),
        params_wgrad_(make_params_wgrad(p, grads, arena)),
        head_grad_(grads.hh) {}

  // Accumulates a chunk, given the rows of x and of h before a step.
  template <class XAt, class HAt>
  void accumulate(const WgradArgs<T>& chunk, XAt x, HAt h_prev) {
    if constexpr (kGiven) {
      if constexpr (kRecurs) wgrad_.of[0].accumulate(chunk, h_prev, Ones());
    } else if constexpr (kSharesPreacts) {
      wgrad_.of[0].accumulate(chunk, x, Ones(), h_prev, Ones());
    } else {
      wgrad_.of[0].accumulate(chunk, x, Ones());
      wgrad_.of[1].accumulate(chunk, h_prev, Ones());
    }
    if constexpr (kHeads)
      HeadWgrad<T>{head_grad_, shared_.hh.panels, shared_.hh.range,
                   kHidden,    Cell::kGates,      Cell::hidden_gate}
          .accumulate(chunk, h_prev);
    if constexpr (Cell::kParams > 0) params_wgrad_.accumulate(chunk, Ones());
  }

  // Writes what is in buffers, once all chunks have been accumulated.
  void write(Team team) const {
    for (const Wgrad<T>& wgrad : wgrad_.of) wgrad.write(team);
    if constexpr (Cell::kParams > 0) params_wgrad_.write(team);
  }

 private:
  // The gradients of all weights, or where the input's and the recurrent pre-activations differ,
  // those of each kind.
  struct Wgrads {
    Wgrad<T> of[kGiven || kSharesPreacts ? 1 : 2];
  };
  static Wgrads make_wgrad(const BackwardParams<T>& p, const WeightGrads<S>& g, Arena& arena) {
    const WgradTarget<S> targets[] = {{g.ih, p.input_size},
                                      {g.bias_ih, 1},
                                      {kHeads ? nullptr : g.hh, p.h_size()},
                                      {g.bias_hh, 1}};
    const auto make = [&](int first, int count, int first_preact, int (*gate_of)(int)) {
      return Wgrad<T>(targets + first, count, first_preact, Cell::kGates, p.hidden_size, gate_of,
                      arena);
    };
    if constexpr (kGiven)
      return {{make(2, kRecurs ? 2 : 0, kHidden, Cell::hidden_gate)}};
    else if constexpr (kSharesPreacts)
      return {{make(0, 4, Cell::kInputPreact, Cell::input_gate)}};
    else
      return {{make(0, 2, Cell::kInputPreact, Cell::input_gate),
               make(2, 2, Cell::kHiddenPreact, Cell::hidden_gate)}};
  }

  // The learned values' gradients are summed over all rows, as a bias's: their parts are columns of
  // dgates behind the pre-activations.
  static Wgrad<T> make_params_wgrad(const BackwardParams<T>& p, const WeightGrads<S>& g,
                                    Arena& arena) {
    const WgradTarget<S> target{g.params, 1};
    return Wgrad<T>(&target, Cell::kParams > 0, Products<Cell>::kCount, Cell::kParams,
                    p.hidden_size, CellDefaults::input_gate, arena);
  }

  const Shared& shared_;
  Wgrads wgrad_;
  Wgrad<T> params_wgrad_;
  S* const head_grad_;  // of W_hh in heads
};

}  // namespace rnnkern::RNNKERN_ISA
